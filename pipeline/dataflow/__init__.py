"""Launching, scheduling and following runs on Dataflow."""
