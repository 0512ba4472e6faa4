"""Batch normalization that stays right: torch.nn's layers, with options that compose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import UninitializedBuffer

from truenorm.errors import InputError
from truenorm.kernels import fused, ops
from truenorm.layers import functional, kernel
from truenorm.layers.attributes import CommitOption, Epsilon, Option, check_eps
from truenorm.layers.capture import (
    NO_GRAPH_TASK,
    captured,
    graph_task,
    readable,
    wrapped,
)
from truenorm.layers.foreign import epsilon
from truenorm.layers.functional import ACTIVATIONS, Moments, in_rows, widest
from truenorm.layers.options import Commit, Options
from truenorm.layers.ranks import Ranks
from truenorm.layers.renorm import Renorm
from truenorm.layers.running import RunningStatistics

# Looked up once: see BatchNorm.forward.
_kernel, _cat, _isfinite = torch.native_batch_norm, torch.cat, math.isfinite
_ANY = range(2, 65)  # torch's tensors have up to 64 axes
_ONE = torch.ones((), dtype=torch.int64, device="cpu")  # a number would be made into it each time

OWN = (
    "_options", "_direct", "_least", "_pending", "_told", "_skipped", "_narrow", "_usual", "_reset",
    "_warned", "_past",
)  # fmt: skip
"""The attributes of a layer that torch's has not; a pickle of the layer holds them."""


class BatchNorm(RunningStatistics):
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

    Args:
        num_features: C.
        eps: added to the variance; above 0. It can be set later, and is not told of a layer that
            applies an activation, so that code which replaces layers cannot lose that silently.
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
            forwards since the last commit and written when ``layer.commit()`` is called, as
            ``truenorm.attach(optimizer, model)`` does after each step of the optimizer. Setting
            it, like setting ``frozen``, drops what is pending.

    Raises:
        InputError: an option outside its range, or one that needs statistics it does not have.
    """

    _axes: tuple[int, ...] = ()

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
        parameters, which an optimizer must be given. What is pending for a commit is dropped if
        ``commit`` changes or the statistics are frozen.

        Raises:
            InputError: an option that this layer cannot have; it is then as it was.
        """
        _refuse(self, options)
        if "_skipped" not in vars(self):
            self._begin()
        self._widen_statistics(self._buffers)
        if options.frozen != self._options.frozen:
            for name in ("weight", "bias"):
                _move_affine(self, name, frozen=options.frozen)
            others = [name for name in self._buffers if name not in ("weight", "bias")]
            for name in others:  # statistics stand behind them in torch's state dicts
                self._buffers[name] = self._buffers.pop(name)
        if options.frozen or options.commit != self._options.commit:
            self._pending.clear()
        self._options = options
        # What torch's kernel can do with the running statistics in one go; see forward.
        self._direct = options.ghost is options.sync is options.renorm is None and not (
            options.frozen or options.commit == "step"
        )
        self._least = options.min_count or 2

    eps = Epsilon()
    ghost = Option()
    sync = Option()
    renorm = Option()
    frozen = Option()
    act = Option()
    min_count = Option()
    commit = CommitOption()  # the method's name, and still callable

    @property
    def options(self) -> Options:
        """All options; :meth:`adopt` changes them, as does setting one of them by its name."""
        return self._options

    def __dir__(self) -> list[str]:
        """Without what is not told: torch.jit.trace and inspect read all that is listed."""
        listed: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in listed if name != "eps" or not self._applied()]

    @property
    def _eps(self) -> float:
        """What is added to the variance, past the attribute that may refuse."""
        eps: float = self.__dict__["eps"]
        return eps

    def _applied(self) -> str:
        """What it applies after normalizing, in words; "" for nothing."""
        return "" if self._options.act is None else f"act={self._options.act!r}"

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

    def extra_repr(self) -> str:
        """What ``print(model)`` shows: torch's line and the options that are set."""
        options = [f"{name}={value!r}" for name, value in self._options.set().items()]
        return ", ".join([super().extra_repr(), *options])  # type: ignore[no-untyped-call]

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
        # The commonest case in the fewest calls: a small layer takes some 30 microseconds with its
        # backward, a call of Python's or torch's up to one. All else is in _normalized.
        own = self.__dict__  # past nn.Module's and the class's attributes
        if own["_direct"] and self.training and mask is None and not captured():
            buffers, parameters, features = own["_buffers"], own["_parameters"], own["num_features"]
            mean = buffers.get("running_mean")
            if (
                type(input) is Tensor
                and mean is not None
                and input.dim() in (self._axes or _ANY)
                and input.size(1) == features  # input.shape costs as much as all these lines
                and input.numel() >= own["_least"] * features
                and input.is_cpu
                and own["track_running_stats"]
                and "weight" in parameters  # else it is parametrized, pruned, or the like
                and "bias" in parameters
                and (var := buffers.get("running_var")) is not None
                and (batches := buffers.get("num_batches_tracked")) is not None
                and not wrapped(input)
                and (residual is None or _like(residual, input))
                and (ops.live() or self._torch_serves(input, mean, residual))
            ):
                return self._in_training(input, residual, (mean, var), batches)
        if not isinstance(input, Tensor):
            return traced(self, input, mask, residual)
        self._check_input_dim(input)
        if mask is not None:
            mask = functional.valid(mask, input)
        if self._kernels_serve(input, residual):
            places = None if mask is None else _places(mask, input)
            if mask is None or places is not None:
                out = self._by_kernels(input, residual, places)
                if out is not None:
                    return out
        if mask is not None:
            input = torch.where(mask, input, 0)
        out = self._normalized(input, mask)
        if residual is not None:
            out = _plus(out, residual, mask)
        if self._options.act is not None:
            out = ACTIVATIONS[self._options.act](out)
        return out if mask is None else torch.where(mask, out, 0)

    def _in_training(
        self,
        x: Tensor,
        residual: Tensor | None,
        running: tuple[Tensor, Tensor],
        batches: Tensor,
    ) -> Tensor:
        """The commonest case: all options but ``act`` and ``min_count`` are unset."""
        own = self.__dict__
        momentum, parameters = own["momentum"], own["_parameters"]
        counts = graph_task() == NO_GRAPH_TASK
        if counts:
            batches.add_(_ONE)
            if momentum is None:
                momentum = 1 / int(batches)
        else:  # within a backward pass a forward is repeated that has been counted
            mean, var = running
            running, momentum = (torch.zeros_like(mean), torch.zeros_like(var)), 1.0
        affine = parameters["weight"], parameters["bias"]
        act, eps = own["_options"].act, own["eps"]
        if not ops.live():
            out = self._by_torch(x, affine, running, momentum)
            return out if act is None else ACTIVATIONS[act](out)
        apart = residual is None and (act is None or x.numel() <= fused.SMALL)
        if apart or not fused.serves():
            out, finite = ops.batch_norm(x, affine, running, momentum, eps)
            if residual is not None:
                out = out + residual
            if act is not None:
                out = ACTIVATIONS[act](out)
        else:
            out, _, finite = fused.batch_norm_act(
                x, affine, running, eps, momentum=momentum, act=act or "none", residual=residual
            )
        if not finite and counts:
            batches.sub_(_ONE)
            self._tally(torch.tensor(False))
        return out

    def _kernels_serve(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the kernels can do all for ``x`` in one go, but for what the options ask."""
        return (
            type(x) is Tensor
            and x.is_cpu
            and x.numel() > 0
            and self._buffers.get("running_mean") is not None
            and not (captured() or wrapped(x))
            and (residual is None or _like(residual, x))
            and ops.live()
            and fused.serves()
        )

    def _by_kernels(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """By one sweep over what ``mask`` (N, *S) shows; None where that is not all there is."""
        options, (mean, var, _) = self._options, self._statistics()
        if options.frozen or not self.training:
            out, _, _ = fused.batch_norm_act(
                x,
                (self.weight, self.bias),
                (mean, var),
                self._eps,
                momentum=None,
                act=options.act or "none",
                residual=residual,
                mask=mask,
            )
            return out
        positions = x.shape[2:].numel()
        sizes = options.ghost_sizes(x.shape[0], positions) or [x.shape[0]]
        if mask is None:
            counts = [examples * positions for examples in sizes]
        else:
            parts = torch.split(mask, sizes) if len(sizes) > 1 else [mask]
            counts = [int(part.sum()) for part in parts]
        pools = options.sync is not None and options.sync.active
        if not pools and min(counts) >= self._least:
            return self._in_groups(x, residual, mask, sizes, counts)
        if options.ghost is not None:
            return None
        return self._by_given(x, residual, mask, counts[0])

    def _in_groups(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        sizes: list[int],
        counts: list[int],
    ) -> Tensor:
        """In training on one rank, with any options: ``sizes`` examples, ``counts`` values each."""
        options, running, limits = self._options, self._statistics(), (1.0, 0.0)
        mean, var, batches = running
        first = graph_task() == NO_GRAPH_TASK
        if options.renorm is not None:
            if first:  # a copy: it moves
                running = mean.clone(), var.clone(), batches.clone()
            else:
                found = ops.moments(x, mask, sizes)
                running = self._statistics_for(_in_table(found, counts))
            limits = options.renorm.limits_at(int(running[2]))
        # What moves the statistics in the same go; the cumulative average takes groups by size.
        tracks = self._tracks()
        by_size = self.momentum is None and len(sizes) > 1
        alone = tracks and options.commit == "forward" and not by_size
        momentum = 1 / (int(batches) + 1) if self.momentum is None else self.momentum
        affine, act, eps = (self.weight, self.bias), options.act or "none", self._eps
        whole = residual is mask is None and len(sizes) == 1 and limits == (1.0, 0.0)
        pending = options.commit == "step"  # also where a backward pass repeats it
        if whole and pending and act == "none" and x.numel() <= fused.SMALL:
            out, moments = ops.with_moments(x, affine, eps)
        else:
            out, moments, finite = fused.batch_norm_act(
                x,
                affine,
                (mean, var) if first else running[:2],
                eps,
                momentum=momentum if alone else 0.0,
                act=act,
                residual=residual,
                mask=mask,
                groups=sizes if len(sizes) > 1 else (),
                limits=limits,
            )
            if alone and finite:
                batches.add_(_ONE)
            elif alone:
                self._tally(torch.tensor(False))
        noted = options.renorm is not None and first
        if noted or not alone:
            batch = _in_table(moments, counts)
            if noted:
                self._note(batch, running)
            if not alone:
                self._follow(batch, out)
        return out

    def _torch_serves(self, x: Tensor, mean: Tensor, residual: Tensor | None) -> bool:
        """Whether torch's kernel can do all in one go, for an input that is not far from 0."""
        if residual is not None or mean.dtype is not x.dtype or graph_task() != NO_GRAPH_TASK:
            return False
        return x.numel() <= functional.ROWS * self.num_features or not in_rows(x)

    def _by_torch(
        self,
        x: Tensor,
        affine: tuple[Tensor | None, Tensor | None],
        running: tuple[Tensor, Tensor],
        momentum: float,
    ) -> Tensor:
        """By torch's kernel, which moves the running statistics; undone if need be."""
        mean, var = running
        before = _cat((mean, var))
        out, center, inverse = _kernel(x, *affine, mean, var, True, momentum, self._eps)
        near = kernel.surely_near(center * inverse, x.numel() // self.num_features)
        if near or not kernel.doubtful(x, center, inverse**-2):
            if not _isfinite(var.dot(var).item()):
                self._undo_if_poisoned(before)
            return out
        self._undo(before)
        return self._by_kernel(x, [x.size(0)], again=True)

    def _normalized(self, x: Tensor, mask: Tensor | None) -> Tensor:
        options = self._options
        if self.running_mean is None:
            _refuse_without_statistics(options)
        if options.frozen or not (self.training or self.running_mean is None):
            return self._by_running(x)
        if mask is not None or (self.training and options.sync):
            return self._by_moments(x, mask)
        sizes = options.ghost_sizes(x.shape[0], x.shape[2:].numel()) if self.training else None
        sizes = sizes or [x.shape[0]]
        least = min(sizes) * x.shape[2:].numel()
        if least == 1 and options.min_count is None:
            raise InputError(one_value(x))
        if least < (options.min_count or 2):
            return self._by_moments(x, mask)
        return self._by_kernel(x, sizes)

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
        dtype = functional.statistics_dtype(x)
        if mean.dtype != dtype:
            mean, var = mean.to(dtype), var.to(dtype)
        weight, bias = self._affine_in(dtype)
        return kernel.by_running(x, (mean, var), (weight, bias), self._eps)

    def _by_kernel(self, x: Tensor, sizes: list[int], *, again: bool = False) -> Tensor:
        """By torch's own kernel, for groups of ``sizes`` examples on one rank."""
        renorm = self._options.renorm if self.training else None
        positions = x.shape[2:].numel()
        dtype = functional.statistics_dtype(x)
        affine = self._affine_in(dtype)
        outs, parts = [], []
        for part in torch.split(x, sizes) if len(sizes) > 1 else [x]:
            count = part.shape[0] * positions
            now = affine if renorm is None else (None, None)
            out, mean, var = kernel.batch_norm(part, now, self._eps, again=again)
            outs.append(out)
            parts.append(Moments(mean[None], var[None], mean.new_full((1, 1), count)))
        batch = functional.joined(parts)
        if renorm is not None:
            mean, var, batches = self._statistics_for(batch)
            r, d = renorm.correction(batch, (mean, var), self._eps, batches)
            corrections = zip(r.to(dtype), d.to(dtype), strict=True)
            outs = [
                functional.renormalize(out, correction, affine)
                for out, correction in zip(outs, corrections, strict=True)
            ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        self._follow(batch, out)
        return out

    def _by_moments(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Any combination of options, in differentiable operations of torch."""
        values, ranks = functional.wide(x), self._ranks()
        groups, total = _groups(self._options, x, ranks) if self.training else (None, 1)
        batch = functional.moments(
            values, mask, groups, total=total, reduce=None if ranks is None else ranks.sum
        )
        stats, correction = self._center(batch, x)
        if groups is not None:
            stats = stats[0][groups], stats[1][groups]
            correction = correction and (correction[0][groups], correction[1][groups])
        affine = self._affine_in(stats[0].dtype)
        out = functional.normalize(values, stats, affine, self._eps, correction=correction)
        out = out.to(x.dtype)
        self._follow(batch.detach(), out)
        return out

    def _by_given(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, count: int
    ) -> Tensor:
        """On the kernels by moments of all ranks, or of too few values: a sweep for each part."""
        ranks = self._ranks()
        mean, var = fused.moments(x, mask, count)
        each = Moments(mean, var, mean.new_full((1, 1), count))
        batch = functional.merged(each, reduce=None if ranks is None else ranks.sum)
        stats, correction = self._center(batch, x)
        shift, scale, offset = functional.affine_map(
            stats,
            self._affine_in(stats[0].dtype),
            self._eps,
            functional.statistics_dtype(x),
            correction=correction,
        )
        out, _, _ = fused.batch_norm_act(
            x,
            (scale[0], offset[0]),
            (shift[0], torch.ones_like(shift[0])),
            0.0,
            momentum=None,
            act=self._options.act or "none",
            residual=residual,
            mask=mask,
        )
        self._follow(batch.detach(), out)
        return out

    def _ranks(self) -> Ranks | None:
        """Those to pool this forward's statistics with; None for nobody."""
        ranks: Ranks | None = self._options.sync if self.training else None
        return ranks if ranks is not None and ranks.active else None

    def _center(
        self, batch: Moments, x: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Mean and variance by which to normalize a batch, and renorm's r and d, (G, C) each.

        Raises:
            InputError: one value a channel, and no ``min_count``.
        """
        options = self._options
        if options.min_count is None and _has_one_value(batch.count):
            raise InputError(one_value(x))
        mean = batch.mean
        var = torch.where(batch.count > 0, batch.var, 1)
        correction = None
        if self.training and self.running_mean is not None:
            running_mean, running_var, batches = self._statistics_for(batch)
            running = widest(running_mean), widest(running_var)
            if options.renorm is not None:
                correction = options.renorm.correction(batch, running, self._eps, batches)
            if options.min_count is not None:
                enough = batch.count >= options.min_count
                mean = torch.where(enough, mean, running[0])
                var = torch.where(enough, var, running[1])
                if correction is not None:
                    r, d = correction
                    correction = torch.where(enough, r, 1), torch.where(enough, d, 0)
        return (mean, var), correction

    def _follow(self, batch: Moments, out: Tensor) -> None:
        """Let the running statistics follow ``batch``, which gave ``out``, where they may."""
        if self._tracks():
            self._observe(batch, out)
        elif self._pending:
            self._recognize(batch)

    # -- statistics --------------------------------------------------------------------------


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L); see :class:`BatchNorm`."""

    _axes = (2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W); see :class:`BatchNorm`."""

    _axes = (4,)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); see :class:`BatchNorm`."""

    _axes = (5,)


class LazyChannels(_LazyNormBase):
    """Finds the number of channels at the first forward, also if it has no tensor to make."""

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Take the number of channels from ``input``, though there be nothing to make of it."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        super().initialize_parameters(input)
        self.num_features = input.shape[1]


class _Lazy(LazyChannels, BatchNorm):
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
    check_eps(epsilon(layer))
    if not layer.track_running_stats:
        _refuse_without_statistics(options)
    if options.frozen and isinstance(layer.running_mean, UninitializedBuffer):
        raise InputError("frozen needs statistics to hold; a lazy layer has none yet.")
    was = isinstance(layer, BatchNorm) and "_options" in vars(layer) and layer.options.frozen
    held = layer._buffers if was else layer._parameters
    computed = [n for n in ("weight", "bias") if n not in held and n not in layer._parameters]
    if options.frozen != was and computed:
        raise InputError(
            f"frozen cannot be changed while {' and '.join(computed)} is computed from other "
            "tensors, by parametrizations, pruning or a norm of the weight; remove these first."
        )


def _refuse_without_statistics(options: Options) -> None:
    for name in ("renorm", "min_count", "frozen"):
        if getattr(options, name):
            raise InputError(
                f"{name} needs running statistics, got {getattr(options, name)!r} without; leave "
                "track_running_stats=True, and keep the layer from "
                "torch.func.replace_all_batch_norm_modules_, which takes them away."
            )


def _move_affine(layer: BatchNorm, name: str, *, frozen: bool) -> None:
    """Make a buffer of weight or bias, or a parameter again."""
    values = getattr(layer, name)
    if values is None:
        return
    delattr(layer, name)
    if frozen:
        layer.register_buffer(name, values.detach())
    else:
        layer.register_parameter(name, nn.Parameter(values))


def _groups(options: Options, x: Tensor, ranks: Ranks | None) -> tuple[Tensor | None, int]:
    """The group of each example, and their number, over the joined batch of all ranks."""
    if options.ghost is None:
        return None, 1
    mine = (x.shape[0], x.shape[2:].numel())
    table = [mine] if ranks is None else ranks.table(mine, x.device)
    counts = [examples for examples, _ in table]
    # All ranks must find the same groups: the last example has the positions of its own rank.
    last = next((positions for examples, positions in reversed(table) if examples), 0)
    sizes = options.ghost_sizes(sum(counts), last)
    if sizes is None:
        return None, 1
    first = 0 if ranks is None else sum(counts[: ranks.rank])
    ids = torch.arange(first, first + x.shape[0], device=x.device) // options.ghost
    return ids.clamp(max=len(sizes) - 1), len(sizes)  # a last one alone joins those before


def _in_table(moments: Sequence[Tensor] | Tensor, counts: list[int]) -> Moments:
    """The kernels' mean and variance, (G, C), of groups of ``counts`` values."""
    mean, var = moments[0], moments[1]
    if len(counts) == 1:
        return Moments(mean, var, mean.new_full((1, 1), counts[0]))
    return Moments(mean, var, mean.new_tensor(counts).unsqueeze(1))


def _plus(out: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
    """``out`` + ``residual`` where it is valid, with the dtype of ``out``.

    Raises:
        InputError: the two have other shapes.
    """
    if residual.shape != out.shape:
        raise InputError(
            f"residual must have the input's shape {tuple(out.shape)}, got "
            f"{tuple(residual.shape)}; expand() one that should be repeated."
        )
    if mask is not None:  # what a NaN sends back through an activation is NaN, wherever it stood
        residual = torch.where(mask, residual, 0)
    return (out + residual).to(out.dtype)


def _places(mask: Tensor, x: Tensor) -> Tensor | None:
    """``mask`` (as functional.valid gives it) as (N, *S) for all channels; None if they differ."""
    if mask.shape[1] != 1 or type(mask) is not Tensor or not mask.is_cpu:
        return None
    if mask.shape[0] != x.shape[0] or mask.shape[2:] != x.shape[2:]:
        mask = mask.expand(x.shape[0], 1, *x.shape[2:])
    return mask.squeeze(1).contiguous()


def _like(residual: Any, x: Tensor) -> bool:
    """Whether ``residual`` can be added within the kernel that normalizes ``x``."""
    return (
        type(residual) is Tensor
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.is_cpu
        and not wrapped(residual)
    )


def _has_one_value(count: Tensor) -> bool:
    """Whether some channel has one value; False where counts cannot be looked at."""
    return readable(count, any_device=True) and bool((count == 1).any())


ONE_VALUE = "more than 1 value per channel"  # torch's words


def one_value(x: Tensor) -> str:
    """The error of an input with one value per channel; it begins with torch's own."""
    return (
        f"Expected {ONE_VALUE} when training, got input size {list(x.shape)}; "
        "one value has no variance. Use a larger batch, or min_count=2 to normalize such a batch "
        "by the running statistics."
    )


def traced(layer: nn.Module, input: Any, mask: Any, residual: Any = None) -> Any:
    """Under torch.fx.symbolic_trace: one call_module node, as for torch's own layers."""
    tracer = getattr(input, "tracer", None)
    if tracer is None:
        raise InputError(f"input must be a tensor, got {type(input).__name__}.")
    extra = {k: v for k, v in (("mask", mask), ("residual", residual)) if v is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), extra)


BATCH_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm,)
