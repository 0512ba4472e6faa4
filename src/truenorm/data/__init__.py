"""Data: sources of any kind, read into datasets, cut into parts, and given out in batches."""

from truenorm.moved import names_of

__getattr__ = names_of("data")
