"""Running statistics: their buffers, when they are written, and the tally of skipped batches."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from truenorm.errors import InputError
from truenorm.kernels import ops
from truenorm.layers import functional
from truenorm.layers.capture import (
    NO_GRAPH_TASK,
    captured,
    compiling,
    graph_task,
    held,
    readable,
    wrapped,
)
from truenorm.layers.functional import Moments, widest
from truenorm.layers.options import Options
from truenorm.layers.repeats import Past, Running, same
from truenorm.layers.scripting import Unscriptable

STATISTICS = ("running_mean", "running_var")
FORGOTTEN = 1024  # forwards without a commit after which one is surely never coming


@dataclass
class Forward:
    """The statistics of one forward that no step has committed yet.

    Attributes:
        moments: of its groups.
        reached_by_gradient: it had a part in a backward pass.
        spent: that pass has ended, and the gradient stands in the parameters, as an attachment
            (see :func:`truenorm.attach`) found.
        forgone: the gradient was thrown away, and the forward is pending no more.
        number: its place in the order of all layers' forwards.
        learning: gradients were being recorded when it ran.
        recorded: one was recorded for it; not if nothing before it learns.
        version: the version of the layer's first parameter, which a step changes.
    """

    moments: Moments
    reached_by_gradient: bool = False
    spent: bool = False
    forgone: bool = False
    number: int = -1
    learning: bool = True
    recorded: bool = True
    version: int | None = None


_numbers = itertools.count()


def _abstract(x: Tensor) -> bool:
    """Whether ``x`` is no one value: on the meta device, traced, or many in torch.func."""
    return x.is_meta or wrapped(x) or captured()


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


class RunningStatistics(Unscriptable, _BatchNorm):
    """What a batch norm knows of past batches: kept wide, and moved by whole, finite batches.

    The options say when and how the statistics move; the forward, in the layer itself, says by
    what. Pickles of whole models hold the names of these attributes.
    """

    _options: Options
    _pending: list[Forward]
    _told: bool  # whether the warning of skipped batches was given
    _skipped: Tensor
    _narrow: torch.dtype | None = None  # of the statistics, had they not been widened
    _usual: float | None  # the momentum of training, which a re-estimation replaces for a while
    _reset: bool = False  # statistics were forgotten, and no training has begun since
    _warned: bool = False  # whether the warning of a commit that never comes was given
    _past: Past | None = None  # of forwards that went by running statistics; in no pickle or copy

    # -- buffers -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Put beside torch's buffers what these statistics need: nothing is pending or skipped."""
        self._skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self._place_count()
        self._pending = []
        self._told = False
        self._usual = self.momentum
        self._options = Options()

    def _place_count(self) -> None:
        """Keep the count of skipped batches on the device of the statistics.

        It is a tensor, so that counting waits for no device, but no buffer: a buffer has a key in
        ``functional_call``, is broadcast by DistributedDataParallel, and stays on the meta device
        where a state dict that lacks it is assigned.
        """
        mean = self._buffers.get("running_mean")
        if mean is not None and mean.device.type != "meta":
            self._skipped = self._skipped.to(mean.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_past"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self).setdefault("_usual", self.momentum)  # not in pickles of 0.1.0
        counted = self._buffers.pop("_skipped", None)  # a buffer there
        if counted is not None:
            self._non_persistent_buffers_set.discard("_skipped")
            self._skipped = counted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        if self._narrow is not None:
            self._narrow = fn(torch.empty(0, dtype=self._narrow, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen_statistics(before)
        self._place_count()
        vars(self).pop("_past", None)
        return self

    def _widen_statistics(self, before: dict[str, Tensor | None]) -> None:
        """Take the statistics from ``before`` where they are narrower than float32 now."""
        for name in STATISTICS:
            now, was = self._buffers.get(name), before.get(name)
            if now is None or was is None or now.dtype.itemsize >= 4:
                continue
            self._narrow = now.dtype
            if isinstance(now, UninitializedBuffer):
                self._buffers[name] = UninitializedBuffer(  # type: ignore[call-arg]
                    dtype=torch.float32, device=now.device
                )
            else:
                self._buffers[name] = was.to(device=now.device, dtype=torch.float32)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = f"{prefix}running_mean" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._widen_statistics(self._buffers)
        self._place_count()
        if given:
            self._pending.clear()  # of the statistics, and the weights, that were replaced

    def reset_running_stats(self) -> None:
        """Forget the running statistics, what is pending and what was skipped; not if frozen."""
        adopted = "_skipped" in vars(self)  # not while torch's constructor runs
        if adopted and self._options.frozen:
            return  # torch.optim.swa_utils.update_bn resets every batch norm it finds
        super().reset_running_stats()
        if adopted:
            self._skipped.zero_()
            self._pending.clear()
            self._told = False
            self._reset = True

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation."""
        super().train(mode)
        if not mode:
            self._reset = False
        if not compiling():
            self._tell_of_skipped()
        return self

    def _statistics(self) -> Running:
        """Running mean and variance and the number of batches, past nn.Module's slow attributes.

        Where the layer keeps no number (it may be set to None, or deleted) it is 0, and lost.

        Raises:
            InputError: no number is kept, and training depends on it.
        """
        own = self._buffers
        mean, var, batches = map(own.get, ("running_mean", "running_var", "num_batches_tracked"))
        if mean is None or var is None:
            raise AssertionError("asked for statistics that are not tracked")
        if batches is None:
            self._refuse_uncounted()
            batches = torch.zeros((), dtype=torch.int64, device=mean.device)
        return mean, var, batches

    def _statistics_for(self, batch: Moments) -> Running:
        """The statistics by which to correct ``batch`` in training, and the number of batches.

        Within a backward pass those of the forward that is repeated there, if it is remembered:
        they have moved since.
        """
        now = self._statistics()
        if compiling():
            mean, var, batches = map(held, now)
            return mean, var, batches
        if not readable(batch.mean, any_device=True):
            return now
        if graph_task() == NO_GRAPH_TASK:
            mean, var, batches = (part.clone() for part in now)
            self._note(batch, (mean, var, batches))
            return now
        return (self._past and self._past.repeated(batch)) or now

    def _note(self, batch: Moments, running: Running) -> None:
        """Remember that a forward whose moments are ``batch`` went by ``running``, a copy."""
        if self._past is None:
            self._past = Past()
        self._past.note(batch, running)

    def _refuse_uncounted(self) -> None:
        """Raise InputError if this forward needs ``num_batches_tracked``, which is None."""
        learns = self.training and not self._options.frozen
        if learns and (self.momentum is None or self._options.renorm is not None):
            what = "momentum=None" if self.momentum is None else "renorm"
            raise InputError(
                f"{what} goes by num_batches_tracked, which is None; set it to torch.tensor(0)."
            )

    # -- what is pending ---------------------------------------------------------------------

    def _tracks(self) -> bool:
        """Whether this forward may move the running statistics.

        Not inside a backward pass: what runs there repeats a forward that has been seen.
        """
        if not (self.training and self.track_running_stats) or self.running_mean is None:
            return False
        return compiling() or graph_task() == NO_GRAPH_TASK

    def _observe(self, batch: Moments, out: Tensor) -> None:
        if self._options.commit == "forward" or self._re_estimates():
            self._write(batch)
        elif compiling():
            # The compiler's words where the whole graph is asked for.
            torch._dynamo.graph_break(
                msg="commit='step' notes which forwards a gradient reaches, which a graph cannot "
                "hold; compile with fullgraph=False, or set commit='forward'"
            )
            # Not as a decorator, which would import the compiler into every process.
            torch.compiler.disable(self._remember)(batch, out)  # type: ignore[no-untyped-call]
        else:
            self._remember(batch, out)

    def _re_estimates(self) -> bool:
        """Whether this forward measures the statistics anew, so that no step will follow it.

        None can follow where no gradient is recorded. A validation in train mode by mistake is
        told by what it leaves alone: who re-estimates forgets the statistics first, or takes the
        averaging over, by a momentum of None (all batches alike) or 1 (the last one alone).
        """
        if torch.is_grad_enabled():
            return False
        return self._reset or (self.momentum != self._usual and self.momentum in (None, 1))

    def _remember(self, batch: Moments, out: Tensor) -> None:
        forward = Forward(
            Moments(*(widest(part.detach()) for part in batch)),
            number=next(_numbers),
            learning=torch.is_grad_enabled(),
            recorded=out.requires_grad,
            version=self._version_of_parameters(),
        )
        if forward.learning:
            own = self.__dict__  # past nn.Module's attributes
            own["_usual"], own["_reset"] = own["momentum"], False
        self._tell_of_no_commit(forward)
        self._pending.append(forward)
        if forward.recorded:
            out.register_hook(lambda _: self._reach(forward))  # type: ignore[no-untyped-call]

    def _reach(self, forward: Forward) -> None:
        """Take note of a gradient at the output of ``forward``, which a retained graph repeats."""
        forward.reached_by_gradient = True
        if forward.forgone:
            forward.forgone = forward.spent = False
            self._pending.append(forward)

    def _version_of_parameters(self) -> int | None:
        held = (self._parameters.get(name) for name in ("weight", "bias"))
        learning = (p for p in held if p is not None and p.requires_grad and not p.is_inference())
        return next((p._version for p in learning), None)

    def _tell_of_no_commit(self, now: Forward) -> None:
        """Warn, once, where a step was taken and nothing committed, or nothing ever is."""
        if self._warned:
            return
        stepped = any(
            f.reached_by_gradient and not f.spent and f.version not in (None, now.version)
            for f in self._pending
        )
        if not stepped and len(self._pending) + 1 < FORGOTTEN:
            return
        self._warned = True
        what = "a step was taken" if stepped else f"{FORGOTTEN} forwards"
        warnings.warn(
            f"{what} of a {type(self).__name__} with commit='step' and no commit: its running "
            "statistics do not move. Call truenorm.attach(optimizer, model) before training, also "
            "after either was copied or loaded.",
            stacklevel=2,
        )

    def _recognize(self, batch: Moments) -> None:
        """Within a backward pass: ``batch`` repeats a forward, which has a part in that pass.

        A reentrant checkpoint runs the forward without recording a gradient, as a validation does,
        and repeats it in the backward pass.
        """
        if compiling() or not self.training or graph_task() == NO_GRAPH_TASK:
            return
        moments = Moments(*(widest(part.detach()) for part in batch))
        for forward in self._pending:
            if not forward.reached_by_gradient and same(forward.moments, moments):
                forward.reached_by_gradient = True
                return

    def commit(self) -> None:
        """Write the pooled statistics of the forwards since the last commit, as one batch.

        If gradient has reached some of them, only those count: the others had no part in the
        step, as a forward for validation has none. With ``ghost`` every group of every forward
        is a group of the one batch.
        """
        pending = self._take()
        if len(pending) == 1:
            self._write(pending[0].moments)
            return
        finite = [f.moments for f in pending if self._finite(f.moments)]
        for _ in range(len(pending) - len(finite)):
            self._tally(torch.tensor(False))
        if finite:
            groups = functional.joined(finite)
            self._write(groups if self._options.ghost is not None else functional.pool(groups))

    def refuse(self) -> None:
        """Drop what is pending because what came of it was not finite, and count it."""
        for _ in self._take():
            self._tally(torch.tensor(False))

    def _take(self) -> list[Forward]:
        """The forwards that make up the step, and nothing is pending any more."""
        own = self.__dict__  # past nn.Module's attributes, which cost as much as all these lines
        pending: list[Forward] = own["_pending"]
        own["_pending"], own["_reset"] = [], False
        reached = [forward for forward in pending if forward.reached_by_gradient]
        return reached or pending

    def rollback(self, *, spent_only: bool = False) -> int:
        """Drop the statistics of the forwards since the last commit; return how many.

        Args:
            spent_only: only those whose gradient stood in the parameters and is thrown away.
        """
        kept = []
        for forward in self._pending:
            if spent_only and not forward.spent:
                kept.append(forward)
            else:
                forward.forgone = spent_only
        dropped = len(self._pending) - len(kept)
        self._pending, self._reset = kept, False
        return dropped

    # -- writing -----------------------------------------------------------------------------

    @torch.no_grad()
    def _write(self, parts: Moments) -> None:
        """Move the running statistics by ``parts``, the groups of one batch.

        No branch depends on data, so that it can be compiled and no device is waited for; where
        neither matters and the batch is one group, the same in fewer calls.
        """
        running_mean, running_var, batches = self._statistics()
        if readable(parts.count) and parts.count.shape[1] == 1 and self._write_whole(parts):
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

    def _write_whole(self, parts: Moments) -> bool:
        """The same if no group has too few values and one call can do it; else False."""
        least = max(2, self._options.min_count or 2)
        several = len(parts.count) > 1
        fewest = parts.count.min().item() if several else parts.count.item()
        if fewest < least or (several and (self.momentum is None or not ops.live())):
            return False
        running_mean, running_var, batches = self._statistics()
        momentum = 1 / (int(batches) + 1) if self.momentum is None else self.momentum
        if ops.live():
            table = (widest(parts.mean), widest(parts.var), widest(parts.count))
            finite = ops.track((running_mean, running_var), table, momentum)
        else:
            mean = parts.mean[0].to(running_mean.dtype)
            var = (parts.var[0] * (fewest / (fewest - 1))).to(running_var.dtype)
            finite = math.isfinite((mean.sum() + var.sum()).item()) or (
                bool(torch.isfinite(mean).all()) and bool(torch.isfinite(var).all())
            )
            if finite:
                writable(running_mean).lerp_(mean, momentum)
                writable(running_var).lerp_(var, momentum)
        if finite:
            batches.add_(1)
        else:
            self._tally(torch.tensor(False))
        return True

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
        """Count a batch that was not finite; tell of it now if that can be read cheaply.

        Not in a transform of torch.func or on the meta device, where there is no one number to
        count with, nor in an exported program, in which no one could ask for the count.
        """
        uncounted = torch.compiler.is_exporting() if compiling() else _abstract(finite)
        if uncounted:
            return
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
