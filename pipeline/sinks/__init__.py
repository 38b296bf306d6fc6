"""Writers of a run's outputs."""
