"""The `centroids` command: embeds the images of downstream tasks."""
