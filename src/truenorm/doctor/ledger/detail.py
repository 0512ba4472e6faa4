"""One call of a batch norm in detail: the moments of its batch, and what these are worth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from truenorm.doctor.ledger.book import Layer, Record
from truenorm.doctor.ledger.forward import Forward

_SMALL_FACTOR = 1e-3  # a write with less weight shows its batch in too few digits


def record_of(
    layer: Layer, forward: Forward, args: Any, out: Any, *, step: int, wrote: bool, backward: bool
) -> Record:
    """The record of a call that has just ended; the forward takes down that it has one."""
    module = layer.module
    x = args[0].detach() if args and isinstance(args[0], Tensor) else None
    first, forward.recorded = not forward.recorded, True
    tracked = layer.settled() if first and not module.training else None
    if module.training:
        mean, var = _moments(layer, module, x, wrote=wrote)
    else:
        mean, var = (None, None) if tracked is None else _of_input(x)
    known = x is not None and var is not None
    return Record(
        layer=layer.name,
        forward=layer.forwards - 1,
        call=layer.call,
        step=step,
        phase="train" if module.training else "eval",
        grad=forward.grad,
        backward=backward,
        n=out.numel() // (module.num_features or 1),
        wrote=wrote,
        finite=layer.finiteness.lasts,
        mean=mean,
        var=var,
        worth=worth(x, var, forward.examples) if known else 0.0,  # type: ignore[arg-type]
        tracked=tracked,
        _within=forward,
    )


def _moments(
    layer: Layer, module: Any, x: Tensor | None, *, wrote: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Mean and unbiased variance of a call in train mode, by its write or else by its input."""
    factor = module.momentum
    if wrote and factor is None and module.num_batches_tracked is not None:
        factor = 1 / max(1, int(module.num_batches_tracked))
    if wrote and factor and factor > _SMALL_FACTOR and layer.shows_batch:
        before = layer.before()
        after = layer.keep()
        if before is not None:
            mean, var = before + (after - before) / factor
            return mean, var
    return _of_input(x)


def _of_input(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if x is None or x.ndim < 2 or x.numel() <= x.shape[1] or not x.is_floating_point():
        return None, None
    wide = x.float() if x.dtype.itemsize < 4 else x
    var, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != 1])
    return mean, var


def worth(x: Tensor, var: Tensor, examples: int) -> float:
    """Independent values per channel that the mean of ``x`` (N, C, *S) is worth.

    The mean's own variance is ``var`` over it: that between the rows' means over their number,
    where rows of one example, as the frames of a video, count as one.
    """
    x = x.detach().float() if x.dtype.itemsize < 4 else x.detach()
    rows = x.flatten(2).mean(2) if x.ndim > 2 else x
    number, n = len(rows), x.numel() // max(1, x.shape[1])
    if number < 2:
        return 1.0
    several = 1 < examples < number and number % examples == 0
    if x.ndim == 2 and not several:
        return float(number)
    variance = rows.var(0) / number
    if several:
        for grouped in (rows.view(examples, -1, rows.shape[1]).mean(1),
                        rows.view(-1, examples, rows.shape[1]).mean(0)):  # fmt: skip
            variance = torch.maximum(variance, grouped.var(0) / examples)
    ratio = (var / variance.clamp(min=1e-12)).median().item()
    return min(max(ratio, 1.0), float(n)) if math.isfinite(ratio) else 1.0
