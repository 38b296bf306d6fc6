"""Readers of the pool: shard listing, tar and webdataset parsing, decoded batches, and tables of annotations."""
