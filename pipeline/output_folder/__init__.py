"""The output folder: paths, tables, reuse, lock, versions and accounting."""
