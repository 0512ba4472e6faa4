"""The running statistics that the last forwards went by, for a backward pass that repeats one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from truenorm.layers.functional import Moments, pool

MOST = 32  # forwards between one and its repetition; four small vectors each

Running = tuple[Tensor, Tensor, Tensor]  # mean, variance, number of batches


def same(one: Moments, other: Moments) -> bool:
    """Whether two forwards had the same moments, to the bit; waits for the device."""
    return all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        and torch.allclose(a, b, 0, 0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _all(moments: Moments) -> Moments:
    """Those of the whole batch, however many groups it has: one row is enough to know it by."""
    return pool(moments.detach()) if len(moments.mean) > 1 else moments.detach()


@dataclass
class _Seen:
    """A forward: its moments, what it went by, and how often a backward pass repeated it."""

    moments: Moments
    running: Running
    repeated: int = 0


class Past:
    """What the last forwards of one layer went by.

    Activation checkpointing runs a forward again in the backward pass, when the running statistics
    have moved; the gradient is right only if both go by the same. Of forwards with equal moments,
    the one repeated least is meant, and of those the last: a backward pass goes from the end.
    """

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=MOST)

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, moments: Moments, running: Running) -> None:
        """Remember a forward; ``running`` is a copy. Forget the oldest if there are too many."""
        self._seen.append(_Seen(_all(moments), running))

    def repeated(self, moments: Moments) -> Running | None:
        """What the forward with these moments went by; None if it is not remembered."""
        wanted = _all(moments)
        found = [seen for seen in reversed(self._seen) if same(seen.moments, wanted)]
        if not found:
            return None
        first = min(found, key=lambda seen: seen.repeated)
        first.repeated += 1
        return first.running
