"""Weights of classes in the loss, so that rare ones count as much as frequent ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from truenorm.data.datasets import Dataset


def weights_of(kind: str, data: Dataset) -> Tensor | None:
    """Each class's weight (K,), float32; None where all weigh alike.

    Args:
        kind: "none", or "balanced": n / (K n_c) for a class of n_c examples, as scikit-learn has
            it, with K the classes that have examples. Examples count by their weights, so that
            one of weight two is as two of them. A class without any weighs 1.
        data: the training part.
    """
    if kind == "none":
        return None
    counts = torch.bincount(data.y, data.weight, minlength=len(data.classes)).double()
    present = counts > 0
    balanced = counts.sum() / (present.sum() * counts.clamp_min(1e-300))
    return torch.where(present, balanced, 1.0).float()


def weighted(data: Dataset, weights: Tensor | None) -> Dataset:
    """``data`` with each example's weight times that of its class."""
    if weights is None:
        return data
    of_class = weights[data.y]
    return replace(data, weight=of_class if data.weight is None else data.weight * of_class)
