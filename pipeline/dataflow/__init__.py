"""What only runs on Dataflow need."""
