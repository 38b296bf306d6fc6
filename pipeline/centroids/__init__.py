"""The `centroids` command: computes task centroids from the images of downstream tasks."""
