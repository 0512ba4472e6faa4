"""Running statistics: their buffers, when they are written, and the tally of skipped batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from truenorm.layers import functional
from truenorm.layers.capture import (
    NO_GRAPH_TASK,
    captured,
    compiling,
    graph_task,
    readable,
    wrapped,
)
from truenorm.layers.functional import Moments, widest
from truenorm.layers.options import Options

STATISTICS = ("running_mean", "running_var")
FORGOTTEN = 1024  # forwards without a commit after which one is surely never coming


@dataclass
class Forward:
    """The statistics of one forward that no step has committed yet."""

    moments: Moments
    reached_by_gradient: bool = False

    def mark(self, _: Tensor) -> None:
        self.reached_by_gradient = True


def writable(statistic: Tensor) -> Tensor:
    """``statistic`` to be written, past autograd's count of versions.

    The backward of a training forward holds the running statistics without looking at them, so
    writing them between is no error; torch's own kernel does not count its writes either.
    """
    return statistic if captured() or wrapped(statistic) else statistic.data


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


class RunningStatistics(_BatchNorm):
    """What a batch norm knows of past batches: kept wide, and moved by whole, finite batches.

    The options say when and how the statistics move; the forward, in the layer itself, says by
    what. Pickles of whole models hold the names of these attributes.
    """

    _options: Options
    _pending: list[Forward]
    _told: bool  # whether the warning of skipped batches was given
    _skipped: Tensor
    _narrow: torch.dtype | None = None  # of the statistics, had they not been widened

    # -- buffers -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Put beside torch's buffers what these statistics need: nothing is pending or skipped."""
        batches = self.num_batches_tracked
        skipped = torch.zeros(
            (), dtype=torch.int64, device=None if batches is None else batches.device
        )
        self.register_buffer("_skipped", skipped, persistent=False)
        self._pending = []
        self._told = False
        self._options = Options()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        if self._narrow is not None:
            self._narrow = fn(torch.empty(0, dtype=self._narrow, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen_statistics(before)
        if before["_skipped"].is_meta and not self._skipped.is_meta:  # type: ignore[union-attr]
            self._skipped.zero_()
        return self

    def _widen_statistics(self, before: dict[str, Tensor | None]) -> None:
        """Take the statistics from ``before`` where they are narrower than float32 now."""
        for name in STATISTICS:
            now, was = self._buffers[name], before[name]
            if now is None or was is None or now.dtype.itemsize >= 4:
                continue
            self._narrow = now.dtype
            if isinstance(now, UninitializedBuffer):
                self._buffers[name] = UninitializedBuffer(  # type: ignore[call-arg]
                    dtype=torch.float32, device=now.device
                )
            else:
                self._buffers[name] = was.to(device=now.device, dtype=torch.float32)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen_statistics(self._buffers)

    def reset_running_stats(self) -> None:
        """Forget the running statistics, what is pending and what was skipped; not if frozen."""
        adopted = "_skipped" in self._buffers  # not while torch's constructor runs
        if adopted and self._options.frozen:
            return  # torch.optim.swa_utils.update_bn resets every batch norm it finds
        super().reset_running_stats()
        if adopted:
            self._skipped.zero_()
            self._pending.clear()
            self._told = False

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation."""
        super().train(mode)
        if not torch.compiler.is_compiling() and not self._skipped.is_meta:
            self._tell_of_skipped()
        return self

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean and variance and the number of batches, past nn.Module's slow attributes."""
        own = self._buffers
        mean, var, batches = own["running_mean"], own["running_var"], own["num_batches_tracked"]
        if mean is None or var is None or batches is None:
            raise AssertionError("asked for statistics that are not tracked")
        return mean, var, batches

    # -- what is pending ---------------------------------------------------------------------

    def _tracks(self) -> bool:
        """Whether this forward may move the running statistics.

        Not inside a backward pass: what runs there repeats a forward that has been seen.
        """
        if not (self.training and self.track_running_stats) or self.running_mean is None:
            return False
        return compiling() or graph_task() == NO_GRAPH_TASK

    def _observe(self, batch: Moments, out: Tensor) -> None:
        if self._options.commit == "forward":
            self._write(batch)
        elif compiling():
            # Not as a decorator, which would import the compiler into every process.
            torch.compiler.disable(self._remember)(batch, out)  # type: ignore[no-untyped-call]
        else:
            self._remember(batch, out)

    def _remember(self, batch: Moments, out: Tensor) -> None:
        forward = Forward(Moments(*(widest(part.detach()) for part in batch)))
        self._pending.append(forward)
        if out.requires_grad:
            out.register_hook(forward.mark)  # type: ignore[no-untyped-call]
        if len(self._pending) == FORGOTTEN:
            warnings.warn(
                f"{FORGOTTEN} forwards of a {type(self).__name__} with commit='step' and no "
                "commit: its running statistics never move. Call truenorm.attach(optimizer, "
                "model) before training.",
                stacklevel=2,
            )

    def commit(self) -> None:
        """Write the pooled statistics of the forwards since the last commit, as one batch.

        If gradient has reached some of them, only those count: the others had no part in the
        step, as a forward for validation has none. With ``ghost`` every group of every forward
        is a group of the one batch.
        """
        pending, self._pending = self._pending, []
        if any(forward.reached_by_gradient for forward in pending):
            pending = [forward for forward in pending if forward.reached_by_gradient]
        finite = [f.moments for f in pending if self._finite(f.moments)]
        for _ in range(len(pending) - len(finite)):
            self._tally(torch.tensor(False))
        if finite:
            groups = functional.joined(finite)
            self._write(groups if self._options.ghost is not None else functional.pool(groups))

    def rollback(self, *, spent_only: bool = False) -> int:
        """Drop the statistics of the forwards since the last commit; return how many.

        Args:
            spent_only: only those that gradient has reached, because it is being thrown away.
        """
        kept = [f for f in self._pending if spent_only and not f.reached_by_gradient]
        dropped = len(self._pending) - len(kept)
        self._pending = kept
        return dropped

    def refuse(self) -> None:
        """Drop what is pending because what came of it was not finite, and count it."""
        for _ in range(self.rollback()):
            self._tally(torch.tensor(False))

    # -- writing -----------------------------------------------------------------------------

    @torch.no_grad()
    def _write(self, parts: Moments) -> None:
        """Move the running statistics by ``parts``, the groups of one batch.

        No branch depends on data, so that it can be compiled and no device is waited for; where
        neither matters and the batch is one group, the same in fewer calls.
        """
        running_mean, running_var, batches = self._statistics()
        if parts.count.numel() == 1 and readable(parts.count):
            count = parts.count.item()
            if count >= max(2, self._options.min_count or 2):
                self._write_one(parts.mean[0], parts.var[0] * (count / (count - 1)))
                return
        parts = Moments(*(widest(part) for part in parts))
        mean, var = widest(running_mean), widest(running_var)
        finite = self._finite(parts)
        enough = parts.count >= max(2, self._options.min_count or 2)
        counts = torch.where(enough, parts.count, 0)
        seen = (parts.count > 0 if self._options.min_count is not None else enough).any()
        # The factor of the cumulative average is 1/n at the n-th batch.
        momentum = 1 / (widest(batches) + 1) if self.momentum is None else self.momentum
        in_turn = self.momentum is not None
        weights = functional.group_weights(counts, momentum, in_turn=in_turn)
        keep = 1 - weights.sum(0)
        new_mean = mean * keep + (weights * parts.mean).sum(0)
        new_var = var * keep + (weights * functional.unbiased(parts.var, parts.count)).sum(0)
        if self._options.min_count is not None:
            rest = functional.pool(parts._replace(count=torch.where(enough, 0, parts.count)))
            new_mean, new_var = move_by_few(
                (new_mean, new_var), rest, self._share_of_few(rest.count)
            )
        moved = finite & seen
        writable(running_mean).copy_(torch.where(moved, new_mean, mean))
        writable(running_var).copy_(torch.where(moved, new_var, var))
        batches.add_(moved.to(torch.int64))
        self._tally(finite)

    def _write_one(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics toward the mean and the unbiased variance of a batch."""
        running_mean, running_var, batches = self._statistics()
        mean, var = mean.to(running_mean.dtype), var.to(running_var.dtype)
        if not math.isfinite((mean.sum() + var.sum()).item()) and not (
            bool(torch.isfinite(mean).all()) and bool(torch.isfinite(var).all())
        ):
            self._tally(torch.tensor(False))
            return
        batches.add_(1)
        momentum = 1 / int(batches) if self.momentum is None else self.momentum
        writable(running_mean).lerp_(mean, momentum)
        writable(running_var).lerp_(var, momentum)

    def _undo_if_poisoned(self, before: Tensor) -> None:
        """Restore the statistics if the last batch made one of them infinite or NaN.

        Its variance tells: no value that is not finite leaves it finite. What was broken before
        the batch, by an old checkpoint, is not this batch's doing.
        """
        old_var, var = before.chunk(2)[1], self._statistics()[1]
        if bool((torch.isfinite(old_var) & ~torch.isfinite(var)).any()):
            self._undo(before)
            self._tally(torch.tensor(False))

    def _undo(self, before: Tensor) -> None:
        """Restore mean and variance, joined in ``before``, and count a batch less."""
        mean, var, batches = self._statistics()
        for now, old in zip((mean, var), before.chunk(2), strict=True):
            writable(now).copy_(old)
        batches.sub_(1)

    def _finite(self, parts: Moments) -> Tensor:
        """A scalar: all of ``parts`` is finite, also in the dtype of the running statistics."""
        dtype = self._statistics()[0].dtype
        return torch.stack([torch.isfinite(p.to(dtype)).all() for p in parts[:2]]).all()

    def _share_of_few(self, count: Tensor) -> Tensor:
        """The momentum of ``count`` values, fewer than min_count: in proportion to them."""
        assert self._options.min_count is not None
        if self.momentum is None:  # the initial statistics count as one batch
            return torch.where(count > 0, 1 / (widest(self._statistics()[2]) + 2), 0)
        keep = torch.tensor(1 - self.momentum, dtype=count.dtype, device=count.device)
        return 1 - keep ** (count / self._options.min_count).clamp(max=1)

    # -- what was skipped --------------------------------------------------------------------

    @property
    def skipped_batches(self) -> int:
        """Batches left out of the running statistics because they were not finite."""
        return int(self._skipped)

    def _tally(self, finite: Tensor) -> None:
        """Count a batch that was not finite; tell of it now if that can be read cheaply."""
        self._skipped.add_((~finite).to(device=self._skipped.device, dtype=torch.int64))
        if readable(finite) and not bool(finite):
            self._tell_of_skipped()

    def _tell_of_skipped(self) -> None:
        if not self._told and self._skipped > 0:
            self._told = True
            warnings.warn(
                f"a batch with non-finite values reached a {type(self).__name__}"
                f"({self.num_features}); it is left out of the running statistics and counted in "
                "skipped_batches. This is said once.",
                stacklevel=2,
            )
