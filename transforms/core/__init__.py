"""Recipe, settings, records, metrics, and errors."""
