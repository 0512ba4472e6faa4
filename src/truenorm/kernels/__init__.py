"""Batch norm's own kernels for a CPU: compiled in ``csrc``, reached by ``ops``."""
