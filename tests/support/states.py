"""State dicts compared."""

from __future__ import annotations

import torch


def same_state(a, b):
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
