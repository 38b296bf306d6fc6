"""The files of an output folder: layout, tables, reuse, versions, and the lock."""
