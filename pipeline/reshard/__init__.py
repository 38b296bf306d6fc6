"""The `reshard` command: writes the subset as webdataset tars."""
