"""What a batch norm's buffers tell of its writes: how many there were, and if they are finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from truenorm.layers.batch_norm import BatchNorm


def batches_tracked(module: Any) -> int | None:
    """As a batch norm counts them; None if it does not."""
    counted = module.num_batches_tracked
    return None if counted is None or counted.is_meta else int(counted)


class Foreseen:
    """What a batch norm writes in each forward, as far as is foreseen while it is not hooked.

    Attributes:
        ours: whether it is a layer of truenorm's.
        state: the number that changes with each write, after the last call; see :meth:`look_up`.
        calls, writes: to be expected of a forward; no number of writes where they are none of a
            forward's.
        trains, weight_learns: how it was when that began.
        then: batches tracked and writes when that began.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.ours = isinstance(module, BatchNorm)
        self.state: int | None = None
        self.calls = 0
        self.writes: int | None = 0
        self.trains = self.weight_learns = True
        self.then = 0, 0
        self._by_value = False

    @property
    def possible(self) -> bool:
        """Whether it keeps a number by which its writes can be counted."""
        return self.state is not None

    @property
    def pooled(self) -> bool:
        """Whether its statistics are written when the optimizer steps."""
        return self.ours and self.module.options.commit == "step"

    def look(self) -> None:
        """Take in the number as it is, at the beginning of a block."""
        batches = self.module.num_batches_tracked
        self._by_value = batches is not None and (
            batches.is_inference() or (self.ours and batches.is_cpu)
        )
        self.state = self.look_up()

    def look_up(self) -> int | None:
        """A number that changes with each write; None if the layer keeps none.

        The count itself for truenorm's layers, which take a write back that was not finite. Else
        its version: that costs less and waits for no device.
        """
        counted: Tensor | None = self.module._buffers.get("num_batches_tracked")
        if counted is None:
            return None
        return int(counted) if self._by_value else counted._version

    def moved(self) -> bool:
        """Whether the call in train mode that has just ended moved the statistics."""
        before, self.state = self.state, self.look_up()
        module = self.module
        if self.ours and not module._direct and (module.options.frozen or self.pooled):
            return False
        if self.state is None:
            return bool(module.track_running_stats) and module.running_mean is not None
        return self.state != before

    def begin(self, calls: int, writes: int) -> None:
        """From now on ``calls`` are foreseen in each forward; ``writes`` were made before."""
        self.calls = calls
        self.trains, self.state = self.module.training, self.look_up()
        self.then = batches_tracked(self.module) or 0, writes
        weight = self.module._parameters.get("weight")
        self.weight_learns = weight is not None and weight.requires_grad
        self.writes = calls if self.trains else 0
        if self.ours and (self.module.options.frozen or self.pooled):
            self.writes = None

    def met(self) -> bool:
        """Whether the layer did in the forward that has just ended what it did before."""
        weight = self.module._parameters.get("weight")
        return (
            (self.writes is None or self.look_up() == self.state + self.writes)  # type: ignore[operator]
            and self.module.training is self.trains
            and (weight is not None and weight.requires_grad) is self.weight_learns
        )

    def sum_up(self, writes: int) -> tuple[int, int, bool]:
        """Writes of the forward that has just ended, those besides, and if either surprises.

        ``writes`` were known before. Those besides were made in no forward that was seen.
        """
        if self.writes is None:
            return 0, 0, False
        before, self.state = self.state, self.look_up()
        moved = (self.state or 0) - (before or 0)
        expected = self.calls if self.module.training else 0
        if moved == expected:
            return moved, 0, False
        counted, then = self.then
        if moved > 0 and (batches_tracked(self.module) or 0) - counted == writes - then + moved:
            besides = max(0, moved - expected)
            return moved - besides, besides, True
        return min(max(moved, 0), expected), 0, True


class Finiteness:
    """Whether a batch norm's running statistics are finite, and since when they are not.

    Attributes:
        bad: first and last step that can have made them not finite.
        broken: they were not finite when the block began.
        checked: writes and steps when they were last seen to be finite.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.bad: tuple[int, int] | None = None
        self.broken = False
        self.checked = 0, 0

    @property
    def lasts(self) -> bool:
        """Whether they have been finite so far."""
        return self.bad is None and not self.broken

    def look(self) -> None:
        """Take in how they are at the beginning of a block."""
        if self.bad is None:
            self.broken = not self._finite()

    def check(self, writes: int, step: int) -> None:
        """Look whether they are finite still, after so many writes."""
        if self.lasts:
            if self._finite():
                self.checked = writes, step
            else:
                exact = self.checked[0] + 1 == writes
                self.bad = (step if exact else self.checked[1], step)

    def _finite(self) -> bool:
        """Cheaply, as a square hides nothing."""
        buffers = self.module._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        flat = var if var.dtype.itemsize >= 4 else var.float()
        if math.isfinite(flat.dot(flat).item()):
            return True
        return bool(torch.isfinite(var).all()) and bool(torch.isfinite(mean).all())
