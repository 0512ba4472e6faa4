"""Borrowing a model, calling it on a user's batches, and watching how tensors flow through it."""
