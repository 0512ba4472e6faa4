"""One file format each: from a path to arrays."""
