"""RunInference handlers that host the models."""
