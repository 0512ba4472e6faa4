"""How a training went: its epochs, and what it tells while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stopped = Literal["early", "finished", "interrupted", "nan"]


@dataclass(frozen=True)
class Epoch:
    """One epoch's record. Losses are means per example: cross entropies in nats, or fit's loss=.

    ``train_loss`` is what was minimized: with label smoothing, in train mode, while the
    weights moved. ``valid_loss`` and ``valid_accuracy`` are plain, in eval mode, at its end; the
    accuracy is NaN where it is no classification.
    """

    epoch: int  # from 1
    train_loss: float
    valid_loss: float
    valid_accuracy: float
    lr: float  # of the epoch's last step
    seconds: float  # of fitting, up to this epoch's end
    best: bool


@dataclass(frozen=True)
class History:
    """How a fit went.

    Attributes:
        epochs: the record of each.
        best_epoch: the epoch whose weights and buffers the model now holds; 0 for those it
            came with.
        stopped: why training ended.
        seconds: time of fitting, validation and checkpoints included.
        fault: for ``nan``, what happened where.
        loss: what the losses are.
    """

    epochs: tuple[Epoch, ...]
    best_epoch: int
    stopped: Stopped
    seconds: float
    fault: str | None = None
    loss: str = "cross entropy (nats)"

    @property
    def best(self) -> Epoch | None:
        """The best epoch's record."""
        return self.epochs[self.best_epoch - 1] if self.best_epoch else None

    def _repr_html_(self) -> str:
        from truenorm.templates import table

        names = ("epoch", "train loss", "val loss", "val accuracy", "lr", "seconds", "")
        rows = [
            (
                *(e.epoch, f"{e.train_loss:.4f}", f"{e.valid_loss:.4f}"),
                "-" if math.isnan(e.valid_accuracy) else f"{e.valid_accuracy:.2%}",
                *(f"{e.lr:.3g}", f"{e.seconds:.1f}", "best" if e.epoch == self.best_epoch else ""),
            )
            for e in self.epochs
        ]
        line = f"stopped: {self.stopped}; the model is that of epoch {self.best_epoch}"
        return table(names, rows, [line, *([] if self.fault is None else [self.fault])])


@dataclass(frozen=True)
class EpochProgress:
    """What an observer is told: the examples done of this epoch, and its record at its end."""

    epoch: int
    epochs: int
    done: int
    total: int
    record: Epoch | None = None


Observer = Callable[[EpochProgress], None]
