"""Batch normalization that stays right: torch.nn's layers, with options that compose."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils import parametrize

from truenorm.errors import InputError
from truenorm.layers import functional
from truenorm.layers.functional import ACTIVATIONS, Moments, summed_in_rows, widest
from truenorm.layers.options import Commit, Options
from truenorm.layers.ranks import Ranks
from truenorm.layers.renorm import Renorm
from truenorm.layers.running import (
    FORGOTTEN,
    NO_GRAPH_TASK,
    STATISTICS,
    Forward,
    compiling,
    graph_task,
    move_by_few,
    readable,
    wrapped,
    writable,
)

# Looked up once: see BatchNorm.forward.
_kernel, _cat, _isfinite = torch.batch_norm, torch.cat, math.isfinite
_ONE = torch.ones((), dtype=torch.int64, device="cpu")  # a number would be made into it each time


class _Option:
    """One field of a layer's options, as an attribute of the layer."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: BatchNorm | None, owner: type | None = None) -> Any:
        return self if layer is None else getattr(layer.options, self._name)

    def __set__(self, layer: BatchNorm, value: Any) -> None:
        layer.adopt(dataclasses.replace(layer.options, **{self._name: value}))


class BatchNorm(_BatchNorm):
    """Batch normalization of (N, C, *S), for any number of spatial axes.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the batch's own mean and biased
    variance in training and the running ones in evaluation (Ioffe and Szegedy 2015,
    https://arxiv.org/abs/1502.03167). It is a ``torch.nn`` batch norm: same arguments, same
    parameters and buffers, same numbers where no option is set. What differs without an option:

    - running statistics are float32 or wider, whatever the module's dtype;
    - a batch with a value that is not finite leaves them alone (see :attr:`skipped_batches`);
    - so does a forward inside a backward pass: activation checkpointing counts once;
    - so does an empty batch;
    - large means cost no precision, in any memory layout.

    Inside transforms of torch.func it is torch's layer without these differences.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the NEW value in the running average (Keras's 0.99 is 0.01 here);
            None for the cumulative average.
        affine: learn ``weight`` and ``bias``.
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters; running statistics stay at least float32.
        bias: learn ``bias``, if affine.
        ghost: normalize each group of this many examples by itself in training; the last group
            takes what is left (Hoffer et al. 2017, https://arxiv.org/abs/1705.08741). Running
            statistics move as far per batch as without it.
        sync: pool statistics over all ranks (True) or over a process group, on any backend.
        renorm: batch renormalization.
        frozen: normalize by the running statistics always; they and the affine map (then buffers,
            not parameters) never change. May be set and unset later.
        act: name of the activation applied last; see ``functional.ACTIVATIONS``.
        min_count: with fewer values per channel, normalize by the running statistics, and move
            them in proportion to the values seen, instead of raising an error.
        commit: when running statistics are written. "forward": at once. "step": pooled over all
            forwards since the last commit and written by :meth:`commit`, which
            ``truenorm.attach(optimizer, model)`` calls after each step of the optimizer.

    Raises:
        InputError: an option outside its range, or one that needs statistics it does not have.
    """

    _axes: tuple[int, ...] = ()
    _skipped: Tensor
    _narrow: torch.dtype | None = None  # of the statistics, had they not been widened

    def __init__(  # noqa: PLR0917  the first arguments are torch's, in its order
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        ghost: int | None = None,
        sync: bool | Any = False,
        renorm: Renorm | None = None,
        frozen: bool = False,
        act: str | None = None,
        min_count: int | None = None,
        commit: Commit = "forward",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        self.adopt(
            Options(
                ghost=ghost,
                sync=sync,
                renorm=renorm,
                frozen=frozen,
                act=act,
                min_count=min_count,
                commit=commit,
            )
        )

    def adopt(self, options: Options) -> None:
        """Take ``options``, all of them; also how a layer of torch's becomes one of these.

        Frozen turns weight and bias into buffers: no optimizer, ``requires_grad_``, weight decay
        or DDP reaches them, and their names in the state dict stay. Thawed they are new
        parameters, which an optimizer must be given.

        Raises:
            InputError: an option that this layer cannot have; it is then as it was.
        """
        _refuse(self, options)
        if "_skipped" not in self._buffers:
            held = self.num_batches_tracked
            skipped = torch.zeros(
                (), dtype=torch.int64, device=None if held is None else held.device
            )
            self.register_buffer("_skipped", skipped, persistent=False)
            self._pending: list[Forward] = []
            self._told = False
            self._options = Options()
        self._widen_statistics(self._buffers)
        if options.frozen != self._options.frozen:
            for name in ("weight", "bias"):
                self._move_affine(name, frozen=options.frozen)
        self._options = options
        # What torch's kernel can do with the running statistics in one go; see forward.
        self._direct = options.ghost is options.sync is options.renorm is None and not (
            options.frozen or options.commit == "step"
        )
        self._least = options.min_count or 2

    def _move_affine(self, name: str, *, frozen: bool) -> None:
        held = getattr(self, name)
        if held is None:
            return
        delattr(self, name)
        if frozen:
            self.register_buffer(name, held.detach())
        else:
            self.register_parameter(name, nn.Parameter(held))

    ghost = _Option()
    sync = _Option()
    renorm = _Option()
    frozen = _Option()
    act = _Option()
    min_count = _Option()

    @property
    def options(self) -> Options:
        """All options; :meth:`adopt` changes them, as does setting one of them by its name."""
        return self._options

    @property
    def skipped_batches(self) -> int:
        """Batches left out of the running statistics because they were not finite."""
        return int(self._skipped)

    # -- torch's protocol --------------------------------------------------------------------

    def _check_input_dim(self, input: Tensor) -> None:
        if (input.ndim not in self._axes) if self._axes else input.ndim < 2:
            wanted = " or ".join(f"{n}D" for n in self._axes) or "at least 2D"
            raise InputError(f"expected {wanted} input (got {input.ndim}D input)")
        if input.shape[1] != self.num_features:
            raise InputError(
                f"{type(self).__name__} expected {self.num_features} channels in axis 1, got input "
                f"of shape {tuple(input.shape)}. Channels-last data must be permuted to (N, C, *S)."
            )

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

    def extra_repr(self) -> str:
        """What ``print(model)`` shows: torch's line and the options that are set."""
        told = [f"{name}={value!r}" for name, value in self._options.set().items()]
        return ", ".join([super().extra_repr(), *told])  # type: ignore[no-untyped-call]

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalize, add ``residual``, activate.

        Args:
            input: (N, C, *S).
            mask: bool, True where valid: (N,) for examples, (N, *S) for positions, or with as
                many axes as the input. Invalid values are not seen, and are zero in the output.
            residual: added before the activation, of the input's shape.

        Returns:
            Shape and dtype of ``input``.

        Raises:
            InputError: a shape that does not fit, or one value per channel in training and no
                ``min_count``.
        """
        # The commonest case in the fewest calls. A small layer takes some 60 microseconds with its
        # backward, a call of Python's or torch's up to one: so torch's kernel moves the running
        # statistics itself, and is undone if need be. All else is in _normalized.
        own = self.__dict__  # past nn.Module's and the class's attributes
        if own["_direct"] and own["training"] and mask is residual is None and not compiling():
            held, parameters, features = own["_buffers"], own["_parameters"], own["num_features"]
            mean = held["running_mean"]
            if (
                type(input) is Tensor
                and mean is not None
                and mean.dtype is input.dtype
                and input.dim() in self._axes
                and input.size(1) == features  # input.shape costs as much as all these lines
                and (size := input.numel()) >= own["_least"] * features
                and (size <= functional.ROWS * features or not summed_in_rows(input))
                and input.is_cpu
                and own["track_running_stats"]
                and len(parameters) == 2  # else one is parametrized
                and graph_task() == NO_GRAPH_TASK
                and not wrapped(input)
            ):
                var, batches = held["running_var"], held["num_batches_tracked"]
                before = _cat((mean, var))
                batches.add_(_ONE)
                momentum = own["momentum"]
                if momentum is None:
                    momentum = 1 / int(batches)
                weight, bias = parameters["weight"], parameters["bias"]
                out = _kernel(input, weight, bias, mean, var, True, momentum, own["eps"], False)
                if not _isfinite(var.dot(var).item()):
                    self._undo_if_poisoned(before)
                act = own["_options"].act
                return out if act is None else ACTIVATIONS[act](out)
        if not isinstance(input, Tensor):
            return _traced(self, input, mask, residual)
        self._check_input_dim(input)
        if mask is not None:
            mask = functional.valid(mask, input)
            input = torch.where(mask, input, 0)
        out = self._normalized(input, mask)
        if residual is not None:
            out = out + residual
        if self._options.act is not None:
            out = ACTIVATIONS[self._options.act](out)
        return out if mask is None else torch.where(mask, out, 0)

    def _normalized(self, x: Tensor, mask: Tensor | None) -> Tensor:
        options = self._options
        if options.frozen or not (self.training or self.running_mean is None):
            return self._by_running(x)
        if mask is not None or (self.training and options.sync):
            return self._by_moments(x, mask)
        sizes = self._ghost_sizes(x.shape[0], x.shape[2:].numel()) if self.training else None
        sizes = sizes or [x.shape[0]]
        least = min(sizes) * x.shape[2:].numel()
        if least == 1 and options.min_count is None:
            raise InputError(_one_value(tuple(x.shape)))
        if least < (options.min_count or 2):
            return self._by_moments(x, mask)
        if self._direct and self._tracks() and not compiling() and wrapped(x):
            return self._in_transform(x)
        return self._by_kernel(x, sizes)

    def _in_transform(self, x: Tensor) -> Tensor:
        """Inside a transform of torch.func, such as an ensemble under vmap: as torch's layer.

        No value can be looked at there, so a batch that is not finite is written, too.
        """
        mean, var, batches = self._statistics()
        batches.add_(1)
        momentum = 1 / float(batches) if self.momentum is None else self.momentum
        affine = self._affine_in(mean.dtype)
        return torch.batch_norm(x, *affine, mean, var, True, momentum, self.eps, x.is_cuda)

    def _undo_if_poisoned(self, before: Tensor) -> None:
        """Restore the statistics if the last batch made one of them infinite or NaN.

        Its variance tells: no value that is not finite leaves it finite. What was broken before
        the batch, by an old checkpoint, is not this batch's doing.
        """
        mean, var, batches = self._statistics()
        old_mean, old_var = before.chunk(2)
        if bool((torch.isfinite(old_var) & ~torch.isfinite(var)).any()):
            writable(mean).copy_(old_mean)
            writable(var).copy_(old_var)
            batches.sub_(1)
            self._tally(torch.tensor(False))

    def _affine_in(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in ``dtype``; no operation where they have it: graphs stay clean."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if weight is not None and weight.dtype != dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return weight, bias

    def _by_running(self, x: Tensor) -> Tensor:
        mean, var, _ = self._statistics()
        weight, bias = self._affine_in(mean.dtype)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _by_kernel(self, x: Tensor, sizes: list[int]) -> Tensor:
        """By torch's own kernel, for groups of ``sizes`` examples on one rank."""
        renorm = self._options.renorm if self.training else None
        positions = x.shape[2:].numel()
        outs, parts = [], []
        for part in torch.split(x, sizes) if len(sizes) > 1 else [x]:
            count = part.shape[0] * positions
            mean = x.new_zeros(self.num_features, dtype=functional.statistics_dtype(x))
            var = torch.zeros_like(mean)
            affine = self._affine_in(mean.dtype) if renorm is None else (None, None)
            out = functional.batch_norm(part, (mean, var), affine, 1.0, self.eps)
            batch = Moments(
                mean[None], var[None] * ((count - 1) / count), mean.new_full((1, 1), count)
            )
            if renorm is not None:
                running_mean, running_var, batches = self._statistics()
                r, d = renorm.correction(batch, (running_mean, running_var), self.eps, batches)
                correction = r[0].to(mean.dtype), d[0].to(mean.dtype)
                out = functional.renormalize(out, correction, self._affine_in(mean.dtype))
            outs.append(out)
            parts.append(batch)
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if self._tracks():
            self._observe(functional.joined(parts), out)
        return out

    def _by_moments(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Any combination of options, in differentiable operations of torch."""
        values = functional.wide(x)
        ranks = self._options.sync if self.training else None
        if ranks is not None and not ranks.active:
            ranks = None
        groups, total = self._groups(x, ranks)
        batch = functional.moments(
            values, mask, groups, total=total, reduce=None if ranks is None else ranks.sum
        )
        self._refuse_one_value(batch.count, tuple(x.shape))
        mean = batch.mean
        var = torch.where(batch.count > 0, batch.var, 1)
        correction = None
        if self.training and self.running_mean is not None:
            running_mean, running_var, batches = self._statistics()
            running = widest(running_mean), widest(running_var)
            if self._options.renorm is not None:
                correction = self._options.renorm.correction(batch, running, self.eps, batches)
            if self._options.min_count is not None:
                enough = batch.count >= self._options.min_count
                mean = torch.where(enough, mean, running[0])
                var = torch.where(enough, var, running[1])
                if correction is not None:
                    r, d = correction
                    correction = torch.where(enough, r, 1), torch.where(enough, d, 0)
        if groups is not None:
            mean, var = mean[groups], var[groups]
            correction = correction and (correction[0][groups], correction[1][groups])
        affine = self._affine_in(mean.dtype)
        out = functional.normalize(values, (mean, var), affine, self.eps, correction=correction)
        out = out.to(x.dtype)
        if self._tracks():
            self._observe(batch.detach(), out)
        return out

    def _ghost_sizes(self, examples: int, positions: int) -> list[int] | None:
        """Examples of each group; None for one group of all.

        The last takes what is left, or, if that is one value, it joins the group before: alone it
        has no variance.
        """
        size = self._options.ghost
        if size is None or examples <= size:
            return None
        sizes = [min(size, examples - start) for start in range(0, examples, size)]
        if sizes[-1] * positions == 1:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes

    def _groups(self, x: Tensor, ranks: Ranks | None) -> tuple[Tensor | None, int]:
        """The group of each example, and their number, over the joined batch of all ranks."""
        if self._options.ghost is None or not self.training:
            return None, 1
        counts = [x.shape[0]] if ranks is None else ranks.sizes(x.shape[0], x.device)
        sizes = self._ghost_sizes(sum(counts), x.shape[2:].numel())
        if sizes is None:
            return None, 1
        first = 0 if ranks is None else sum(counts[: ranks.rank])
        ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return ids[first : first + x.shape[0]].to(x.device), len(sizes)

    def _refuse_one_value(self, count: Tensor, shape: tuple[int, ...]) -> None:
        if (
            self._options.min_count is None
            and readable(count, any_device=True)
            and (count == 1).any()
        ):
            raise InputError(_one_value(shape))

    # -- statistics --------------------------------------------------------------------------

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean and variance and the number of batches, past nn.Module's slow attributes."""
        held = self._buffers
        mean, var, batches = held["running_mean"], held["running_var"], held["num_batches_tracked"]
        if mean is None or var is None or batches is None:
            raise AssertionError("asked for statistics that are not tracked")
        return mean, var, batches

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


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L); see :class:`BatchNorm`."""

    _axes = (2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W); see :class:`BatchNorm`."""

    _axes = (4,)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); see :class:`BatchNorm`."""

    _axes = (5,)


class _Lazy(_LazyNormBase, BatchNorm):
    """Finds the number of channels at the first forward, and then becomes its plain class."""

    def __init__(  # noqa: PLR0917  as torch's
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.adopt(Options(**options))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self._axes:
            wanted = " or ".join(f"{n}D" for n in self._axes)
            raise InputError(f"expected {wanted} input (got {input.ndim}D input)")


class LazyBatchNorm1d(_Lazy, BatchNorm1d):
    """:class:`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, BatchNorm2d):
    """:class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, BatchNorm3d):
    """:class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d


def _refuse(layer: _BatchNorm, options: Options) -> None:
    """Raise InputError for what ``layer`` cannot be given."""
    if layer.momentum is not None and not 0 <= layer.momentum <= 1:
        raise InputError(
            f"momentum must lie in [0, 1] or be None, got {layer.momentum!r}. "
            "Coming from Keras or Flax? Their 0.99 is 0.01 here."
        )
    if not layer.eps >= 0:
        raise InputError(f"eps must be at least 0, got {layer.eps!r}.")
    for name in ("renorm", "min_count", "frozen"):
        if getattr(options, name) and not layer.track_running_stats:
            raise InputError(f"{name} needs running statistics; leave track_running_stats=True.")
    if options.frozen and isinstance(layer.running_mean, UninitializedBuffer):
        raise InputError("frozen needs statistics to hold; a lazy layer has none yet.")
    was = isinstance(layer, BatchNorm) and "_options" in vars(layer) and layer.options.frozen
    if options.frozen != was and parametrize.is_parametrized(layer):
        raise InputError(
            "frozen cannot be changed while weight or bias are parametrized; remove the "
            "parametrizations first."
        )


def _one_value(shape: tuple[int, ...]) -> str:
    return (
        f"Expected more than 1 value per channel when training, got input size {list(shape)}; "
        "one value has no variance. Use a larger batch, or min_count=2 to normalize such a batch "
        "by the running statistics."
    )


def _traced(layer: nn.Module, input: Any, mask: Any, residual: Any) -> Any:
    """Under torch.fx.symbolic_trace: one call_module node, as for torch's own layers."""
    tracer = getattr(input, "tracer", None)
    if tracer is None:
        raise InputError(f"input must be a tensor, got {type(input).__name__}.")
    extra = {k: v for k, v in (("mask", mask), ("residual", residual)) if v is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), extra)


BATCH_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm,)
