"""The Beam runners that pairsift supports, and their worker processes."""
