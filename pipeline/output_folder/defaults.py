"""Defaults of the command line that concern an output folder. This module imports nothing, so `--help` starts fast."""

KEPT_VERSIONS = 3
"""Number of versions of the results to keep, including the newest."""
