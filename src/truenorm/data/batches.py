"""A data set given out in batches, on the device, scaled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truenorm.data.datasets import Dataset, Scaling


class Batch(NamedTuple):
    """One batch, scaled and on the device."""

    x: Tensor  # (B, ...) float32
    y: Tensor  # (B,) int64
    weight: Tensor | None  # (B,) float32

    @property
    def examples(self) -> int:
        """B."""
        return len(self.y)

    def run(self, model: nn.Module) -> Any:
        """What ``model`` says of it."""
        return model(self.x)


_BLOCK = 2**19  # numbers gathered at once; as float32 they fill 2 MB, a core's cache


def chunks(order: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cut ``order`` into runs of ``size``; a last run of one joins the run before it.

    One example alone has no batch statistics (its variance over the batch is zero), and
    torch refuses to normalize by them.
    """
    runs: tuple[Tensor, ...] = order.split(size)  # type: ignore[no-untyped-call]
    if len(runs) > 1 and len(runs[-1]) == 1 < size:
        return (*runs[:-2], order[-(size + 1) :])
    return runs


def gather(data: Dataset, index: Tensor, scaling: Scaling, device: torch.device) -> Batch:
    """Gather the examples at ``index`` (B,) and scale them on ``device``."""
    x = scaling(data.x.index_select(0, index).to(device))
    y = data.y.index_select(0, index).to(device)
    weight = None if data.weight is None else data.weight.index_select(0, index).to(device)
    return Batch(x, y, weight)


def in_batches(
    data: Dataset, order: Tensor, size: int, scaling: Scaling, device: torch.device
) -> Iterator[Batch]:
    """The examples of ``order`` (N,) in batches of ``size``, cut as :func:`chunks` cuts them.

    Small batches are gathered several in one call, of at most ``_BLOCK`` numbers: at batch 64
    that saves a twentieth of a small network's step.
    """
    runs = chunks(order, size)
    together = max(1, _BLOCK // (size * data.x[0].numel()))
    start = 0
    for i in range(0, len(runs), together):
        sizes = [len(run) for run in runs[i : i + together]]
        block = gather(data, order[start : start + sum(sizes)], scaling, device)
        start += sum(sizes)
        cut = [itertools.repeat(None) if t is None else _cut_into(t, sizes) for t in block]
        yield from map(Batch, *cut)


def _cut_into(tensor: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = tensor.split(sizes)  # type: ignore[no-untyped-call]
    return parts


def in_order(
    data: Dataset, scaling: Scaling, device: torch.device, size: int = 1024
) -> Iterator[Batch]:
    """All examples in their stored order, ``size`` at a time."""
    for start in range(0, len(data), size):
        rows = slice(start, start + size)
        weight = None if data.weight is None else data.weight[rows].to(device)
        yield Batch(scaling(data.x[rows].to(device)), data.y[rows].to(device), weight)
