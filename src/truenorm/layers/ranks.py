"""Ranks: sums over a process group, with exact gradients, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from truenorm.errors import InputError


def distributed() -> bool:
    """Whether torch.distributed is in use."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The ranks that pool their statistics: all of them, or one process group.

    A process group belongs to its process: a deep copy of a layer keeps it, a pickle cannot.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def active(self) -> bool:
        """Whether there is anyone to pool with."""
        return distributed() and dist.get_world_size(self.group) > 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over ranks. Its gradient is the sum of the ranks' gradients."""
        total: Tensor = _Sum.apply(x, self.group)  # type: ignore[no-untyped-call]
        return total

    def table(self, row: tuple[int, ...], device: torch.device) -> list[tuple[int, ...]]:
        """Each rank's ``row``, in the order of ranks; all rows are of one length."""
        world = dist.get_world_size(self.group)
        rows = torch.zeros(world, len(row), dtype=torch.int64, device=device)
        rows[self.rank] = torch.tensor(row, device=device)
        dist.all_reduce(rows, group=self.group)
        return [tuple(r) for r in rows.tolist()]

    @property
    def rank(self) -> int:
        """The place of this process in the group."""
        return dist.get_rank(self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        if self.group is not None:
            raise InputError(
                "sync holds a process group, which cannot be pickled; save the state_dict, or set "
                "layer.sync = True first."
            )
        return Ranks, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and other.group is self.group

    def __hash__(self) -> int:
        return id(self.group)

    def __repr__(self) -> str:
        return "True" if self.group is None else "<process group>"


def ranks_of(sync: Any) -> Ranks | None:
    """What ``sync`` means: True for all ranks, False or None for none, or a process group.

    Raises:
        InputError: none of these.
    """
    if sync is None or isinstance(sync, bool):
        return Ranks() if sync else None
    known = dist.is_available() and (
        isinstance(sync, dist.ProcessGroup)
        or sync is dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives to ranks outside
    )
    if not known:
        raise InputError(f"sync must be True, False or a process group, got {sync!r}.")
    return Ranks(sync)


class _Sum(torch.autograd.Function):
    """all_reduce is its own adjoint, so that gradients of any order are sums again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


_Result = TypeVar("_Result")


class Collective:
    """All ranks, or this process alone. Every rank makes the same calls in the same order."""

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        self._device, self._ranks = device, Ranks()
        self._joint = self._ranks.active and not alone
        self.sum = self._ranks.sum if self._joint else lambda x: x

    def counts(self, *numbers: float) -> list[int]:
        """Each number summed over ranks."""
        return [int(n) for n in self.sums(*numbers)]

    def sums(self, *numbers: float) -> list[float]:
        """Each number summed over ranks."""
        if not self._joint:
            return list(numbers)
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        summed: list[float] = self.sum(mine).tolist()
        return summed

    def jointly(self, work: Callable[[], _Result]) -> _Result:
        """Do ``work``; if it fails on one rank it fails on all, so that none waits for another.

        Raises:
            RuntimeError: it failed on another rank.
        """
        failure: Exception | None = None
        try:
            done = work()
        except Exception as error:
            failure = error
        (failed,) = self.counts(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(f"recalibrate failed on {failed} other ranks; nothing was changed.")
        return done
