"""Stage 1: rules that look at the caption alone or at the image alone."""
