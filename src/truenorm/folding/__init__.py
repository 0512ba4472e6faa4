"""Batch norm folded into what is beside it, for inference, each pair proved."""
