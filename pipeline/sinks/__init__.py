"""What writes a run's outputs."""
