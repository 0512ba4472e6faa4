"""Batch renormalization and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truenorm.errors import InputError
from truenorm.layers.functional import Moments, widest


@dataclass(frozen=True, kw_only=True)
class Renorm:
    """Batch renormalization and its schedule (Ioffe 2017, https://arxiv.org/abs/1702.03275).

    In training, x_hat = (x - mean) / std * r + d with r = clip(std / running_std, 1/rmax, rmax)
    and d = clip((mean - running_mean) / running_std, -dmax, dmax), both without gradient: the
    activations become those of inference. The limits start at plain batch norm (1 and 0) and
    rise in a straight line; the numbers are the paper's.

    Attributes:
        rmax: last limit of the scale's correction, at least 1.
        dmax: last limit of the shift's correction, in standard deviations, at least 0.
        start: batches of plain batch norm.
        rmax_at: batch at which ``rmax`` is reached.
        dmax_at: batch at which ``dmax`` is reached.

    Raises:
        InputError: a value outside its range.
    """

    rmax: float = 3.0
    dmax: float = 5.0
    start: int = 5_000
    rmax_at: int = 40_000
    dmax_at: int = 25_000

    def __post_init__(self) -> None:
        if not self.rmax >= 1:
            raise InputError(f"rmax must be at least 1, got {self.rmax!r}; 1 corrects nothing.")
        if not self.dmax >= 0:
            raise InputError(f"dmax must be at least 0, got {self.dmax!r}; 0 corrects nothing.")
        if not 0 <= self.start <= min(self.rmax_at, self.dmax_at):
            raise InputError(
                "start must be at least 0 and not after rmax_at and dmax_at, got "
                f"start={self.start!r}, rmax_at={self.rmax_at!r}, dmax_at={self.dmax_at!r}."
            )

    def limits(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """The limits of r and d once ``batches`` have been tracked."""
        tracked = widest(batches)
        r, d = (self._risen(tracked, until).clamp(0, 1) for until in (self.rmax_at, self.dmax_at))
        return 1 + (self.rmax - 1) * r, self.dmax * d

    def limits_at(self, batches: int) -> tuple[float, float]:
        """The same of a number that is known."""
        r, d = (
            min(max(self._risen(batches, until), 0.0), 1.0)
            for until in (self.rmax_at, self.dmax_at)
        )
        return 1 + (self.rmax - 1) * r, self.dmax * d

    def _risen(self, batches: Any, until: int) -> Any:
        """How far a limit has risen, below 0 before the start and above 1 after its end."""
        return (batches - self.start) / max(1, until - self.start)

    def correction(
        self, batch: Moments, running: tuple[Tensor, Tensor], eps: float, batches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(r, d) for each group and channel of ``batch``, without gradient."""
        rmax, dmax = self.limits(batches)
        std = torch.sqrt(running[1] + eps)
        r = torch.sqrt(batch.var.detach() + eps) / std
        d = (batch.mean.detach() - running[0]) / std
        return torch.clamp(r, 1 / rmax, rmax), torch.clamp(d, -dmax, dmax)
