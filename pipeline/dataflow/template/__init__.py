"""What runs inside a Dataflow flex template."""
