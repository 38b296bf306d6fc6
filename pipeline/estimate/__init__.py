"""The `estimate` command: time, cost, and storage of a run on Dataflow."""
