"""What the product is measured with; never imported by it. Each runs as `python -m benchmarks.NAME`."""
