"""The `run` and `select` commands."""
