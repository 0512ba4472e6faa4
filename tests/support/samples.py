"""Small data sets."""

from __future__ import annotations

import numpy as np


def blobs(count=120, features=6, classes=3, seed=0, spread=1.0):
    """Rows around one centre per class: arrays x (N, F) float32 and y (N,)."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    centres = rng.normal(size=(classes, features)) * 2
    return (centres[y] + spread * rng.normal(size=(count, features))).astype(np.float32), y
