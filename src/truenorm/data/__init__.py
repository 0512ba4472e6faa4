"""Data: sources of any kind, read into datasets, cut into parts, and given out in batches."""
