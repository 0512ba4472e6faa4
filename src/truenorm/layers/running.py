"""Running statistics: their buffers, and when they may be read and written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from truenorm.layers.functional import Moments

STATISTICS = ("running_mean", "running_var")
compiling = torch.compiler.is_compiling
graph_task = torch._C._current_graph_task_id  # of the backward pass that runs now
NO_GRAPH_TASK = -1
wrapped = torch._C._functorch.is_functorch_wrapped_tensor
FORGOTTEN = 1024  # forwards without a commit after which one is surely never coming


@dataclass
class Forward:
    """The statistics of one forward that no step has committed yet."""

    moments: Moments
    reached_by_gradient: bool = False

    def mark(self, _: Tensor) -> None:
        self.reached_by_gradient = True


def readable(x: Tensor, *, any_device: bool = False) -> bool:
    """Whether a value can be looked at, and cheaply: no graph capture, no device to wait for."""
    if compiling() or type(x) is not Tensor:
        return False
    if not (x.is_cpu or (any_device and not x.is_meta)):
        return False
    return not wrapped(x)


def writable(statistic: Tensor) -> Tensor:
    """``statistic`` to be written, past autograd's count of versions.

    The backward of a training forward holds the running statistics without looking at them, so
    writing them between is no error; torch's own kernel does not count its writes either.
    """
    return statistic if compiling() else statistic.data


def move_by_few(
    running: tuple[Tensor, Tensor], few: Moments, momentum: Tensor
) -> tuple[Tensor, Tensor]:
    """Track a batch too small for a variance of its own, by its distance from the running mean.

    With d = mean - running mean: mean += m d, var = (1 - m) var + m (var_batch + d^2 (2 - m) / 2).
    The last factor makes the average right for every batch size, one included, if all come from
    one distribution: E[d^2] = sigma^2 / n * 2 / (2 - m) (after Finch 2009, Incremental
    calculation of weighted mean and variance).
    """
    d = few.mean - running[0]
    mean = running[0] + momentum * d
    var = (1 - momentum) * running[1] + momentum * (few.var + d.square() * (2 - momentum) / 2)
    return mean[0], var[0]
