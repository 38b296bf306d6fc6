"""Running the stages on a Beam runner: `run` over a pool, `select` over stored annotations."""
