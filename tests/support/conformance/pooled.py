"""A layer whose batch is spread over ranks, held against torch's layer on the batch as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conformance.cases import need_close

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def parts_of(shapes: Sequence[Sequence[int]], *, scale: float = 2.0) -> list[Tensor]:
    """Each rank's part of a batch; all ranks know all parts."""
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(tuple(s), generator=generator, dtype=torch.float64) * scale + rank
        for rank, s in enumerate(shapes)
    ]


def _rows(x: Tensor) -> Tensor:
    """Values as rows of channels: parts may have any spatial size."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def need_pooled(
    layer: Any, parts: list[Tensor], members: Sequence[int], *, group: Any = None, **loose: float
) -> None:
    """Train ``layer`` on this rank's part: outputs, gradients, statistics are those of the whole.

    Args:
        layer: of this rank.
        parts: those of ``members``, in order.
        members: the ranks that pool.
        group: their process group; None for all ranks.
        loose: tolerances other than those of float64.
    """
    tolerance = loose or TIGHT
    mine = list(members).index(dist.get_rank())
    reference = nn.BatchNorm1d(parts[0].shape[1], layer.eps, layer.momentum, layer.affine).double()
    reference.load_state_dict(layer.double().state_dict())
    x, whole = parts[mine].clone().requires_grad_(), [p.clone().requires_grad_() for p in parts]
    cotangents = [torch.cos(3 * p) for p in parts]
    out = layer(x)
    out.backward(cotangents[mine])
    sizes = [len(_rows(p)) for p in parts]
    wanted = reference(torch.cat([_rows(p) for p in whole]))
    wanted.backward(torch.cat([_rows(c) for c in cotangents]))
    need_close(_rows(out), wanted.split(sizes)[mine], "output", **tolerance)
    need_close(x.grad, whole[mine].grad, "gradient of the input", **tolerance)
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total, group=group)
        need_close(total, q.grad, f"gradient of {name}, summed over ranks", **tolerance)
    for name in ("running_mean", "running_var"):
        need_close(getattr(layer, name), getattr(reference, name), name, **tolerance)
