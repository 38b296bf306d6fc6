"""Local files and Cloud Storage objects."""
