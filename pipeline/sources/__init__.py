"""What reads a pool."""
