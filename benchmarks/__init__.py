"""Benchmarks. The product never imports them. Run one with `python -m benchmarks.NAME`."""
