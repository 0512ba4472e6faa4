"""The other normalizations: torch.nn's layers with masks, and what torch lacks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from truenorm.errors import InputError
from truenorm.layers import functional, kernel
from truenorm.layers.batch_norm import BATCH_NORMS, LazyChannels, traced
from truenorm.layers.capture import readable
from truenorm.layers.scripting import Unscriptable


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x`` (N, C, *S) times a weight plus a bias of each channel."""
    along_channels = (-1, *(1,) * (x.ndim - 2))
    if weight is not None:
        x = x * weight.view(along_channels)
    return x if bias is None else x + bias.view(along_channels)


class GroupNorm(Unscriptable, nn.GroupNorm):
    """torch.nn.GroupNorm of (N, C, *S), with a mask (Wu and He 2018).

    Each example's channels are normalized in groups, over the positions that are valid.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input`` (N, C, *S); ``mask`` as for :class:`truenorm.BatchNorm`."""
        if not isinstance(input, Tensor):
            return traced(self, input, mask)
        affine = (self.weight, self.bias)
        if mask is None:
            return _by_groups(input, self.num_groups, affine, self.eps)
        _check_channels(self, input, self.num_channels)
        return _masked_groups(input, mask, self.num_groups, affine, self.eps)


def _by_groups(
    input: Tensor, groups: int, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> Tensor:
    """Group norm by torch's kernel for contiguous input, in the layout of ``input``.

    That for channels-last input takes a difference of large sums for the variance: with a mean of
    100 standard deviations its output is off by 0.1, with one of 1000 by 1000.
    """
    layout = functional.layout_of(input)
    x = input.contiguous()
    if not _looks_at(x):
        out = F.group_norm(x, groups, *affine, eps)
    else:
        out = _looked_at_groups(x, groups, affine, eps)
    return out.contiguous(memory_format=layout)


def _looks_at(x: Tensor) -> bool:
    """Whether the mean that a kernel found for ``x`` can be looked at, and may be too large."""
    single = x.dtype != torch.float64 and not torch.is_autocast_enabled("cpu")
    return single and x.numel() > 0 and readable(x)


def _looked_at_groups(
    x: Tensor, groups: int, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> Tensor:
    """Group norm; again without the mean, where that is so large that it costs the output."""
    examples, channels = x.shape[:2]
    if channels % groups or x[0].numel() == groups:
        return F.group_norm(x, groups, *affine, eps)  # which may refuse it
    sizes = examples, channels, x.numel() // (examples * channels), groups
    out, mean, inverse = torch.native_group_norm(x, *affine, *sizes, eps)
    if not kernel.far(mean, inverse**-2):
        return out
    shift = mean.to(functional.statistics_dtype(x)).repeat_interleave(channels // groups, 1)
    centred = functional.wide(x) - functional.along_channels(shift, x)
    return F.group_norm(centred, groups, *affine, eps).to(x.dtype)


def _check_channels(layer: nn.Module, input: Tensor, channels: int) -> None:
    """Raise InputError unless ``input`` is (N, channels, *S); weights, if any, would not fit."""
    if input.ndim < 2 or input.shape[1] != channels:
        raise InputError(
            f"{type(layer).__name__} expected {channels} channels in axis 1, got input of shape "
            f"{tuple(input.shape)}."
        )


def _masked_groups(
    input: Tensor,
    mask: Tensor,
    groups: int,
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> Tensor:
    mask = functional.valid(mask, input)
    x = functional.wide(torch.where(mask, input, 0))
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    grouped, cells = x.reshape(shape), mask.expand(x.shape).reshape(shape)
    normed = functional.standardized(grouped, cells, tuple(range(2, grouped.ndim)), eps)
    return torch.where(mask, _affine(normed.flatten(1, 2), *affine).to(input.dtype), 0)


class _MaskedInstanceNorm(Unscriptable, _InstanceNorm):
    """Instance norm with a mask."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input`` (N, C, *S); ``mask`` as for :class:`truenorm.BatchNorm`."""
        if not isinstance(input, Tensor):
            return traced(self, input, mask)
        batched = input.ndim == self._get_no_batch_dim() + 1  # type: ignore[no-untyped-call]
        if mask is not None:
            if self.track_running_stats or not batched:
                raise InputError(
                    "a mask needs input with a batch axis and track_running_stats=False, got "
                    f"input of shape {tuple(input.shape)} and {self.track_running_stats}."
                )
            _check_channels(self, input, self.num_features)
            affine = (self.weight, self.bias)
            return _masked_groups(input, mask, input.shape[1], affine, self.eps)
        # In float32 group norm, a group for each channel, is faster and keeps the layout.
        fits = batched and input.shape[1] == self.num_features and input.shape[2:].numel() > 1
        if self.track_running_stats or not fits or input.dtype != torch.float32:
            return super().forward(input)
        return _by_groups(input, self.num_features, (self.weight, self.bias), self.eps)


class InstanceNorm1d(_MaskedInstanceNorm, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with a mask."""


class InstanceNorm2d(_MaskedInstanceNorm, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with a mask."""


class InstanceNorm3d(_MaskedInstanceNorm, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with a mask."""


class _Lazy(LazyChannels, _MaskedInstanceNorm):
    """Becomes its plain class at the first forward, which may be of one example."""

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Take the number of channels from ``input``, with or without an axis of examples."""
        if input.ndim == self._get_no_batch_dim():  # type: ignore[no-untyped-call]
            input = input.unsqueeze(0)
        super().initialize_parameters(input)


class LazyInstanceNorm1d(_Lazy, InstanceNorm1d):
    """:class:`InstanceNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_Lazy, InstanceNorm2d):
    """:class:`InstanceNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_Lazy, InstanceNorm3d):
    """:class:`InstanceNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = InstanceNorm3d


class LayerNorm(Unscriptable, nn.LayerNorm):
    """torch.nn.LayerNorm with a mask."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize the trailing axes of ``input``.

        Args:
            input: (*, normalized_shape).
            mask: bool, True where valid: one value for each normalized vector, (*), or with as
                many axes as the input. Invalid values are not seen, and zero in the output.
        """
        if not isinstance(input, Tensor):
            return traced(self, input, mask)
        if mask is None:
            return self._unmasked(input)
        axes = tuple(range(input.ndim - len(self.normalized_shape), input.ndim))
        if tuple(input.shape[axes[0] :]) != tuple(self.normalized_shape) or axes[0] < 0:
            raise InputError(
                f"LayerNorm expected trailing axes {tuple(self.normalized_shape)}, got input of "
                f"shape {tuple(input.shape)}."
            )
        if mask.ndim == axes[0]:
            mask = mask.view(*mask.shape, *(1,) * len(axes))
        if mask.dtype != torch.bool or mask.ndim != input.ndim:
            raise InputError(
                f"mask must be bool with {axes[0]} or {input.ndim} axes for input of shape "
                f"{tuple(input.shape)}, got {mask.dtype} of shape {tuple(mask.shape)}."
            )
        x = functional.wide(torch.where(mask, input, 0))
        out = functional.standardized(x, mask, axes, self.eps)
        if self.weight is not None:
            out = out * self.weight
        if self.bias is not None:
            out = out + self.bias
        return torch.where(mask, out.to(input.dtype), 0)

    def _unmasked(self, input: Tensor) -> Tensor:
        """By torch's kernel; again without the mean, where that is so large that it costs it."""
        if not _looks_at(input):
            return super().forward(input)
        settings = self.normalized_shape, self.weight, self.bias, self.eps
        out, mean, inverse = torch.native_layer_norm(input, *settings)
        if not kernel.far(mean, inverse**-2):
            return out
        return F.layer_norm(functional.wide(input) - mean, *settings).to(input.dtype)


class RMSNorm(Unscriptable, nn.Module):
    """Root-mean-square normalization of (N, C, *S), an example at a time.

    y = x / sqrt(mean(x^2 over C and S) + eps) * weight, with one weight per channel
    (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467). ``torch.nn.RMSNorm``
    normalizes trailing axes only and would need one weight per position of an image.

    Args:
        num_channels: C.
        eps: added to the mean of the squares.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.eps = num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x`` (N, C, *S); the squares are summed in at least float32."""
        if not isinstance(x, Tensor):
            return traced(self, x, mask)
        _check_channels(self, x, self.num_channels)
        axes = tuple(range(1, x.ndim))
        values, count = functional.wide(x), None
        if mask is not None:
            mask = functional.valid(mask, x)
            values = torch.where(mask, values, 0)
            count = mask.expand(x.shape).sum(axes, keepdim=True).clamp(min=1)
        square = values.square()
        mean = square.mean(axes, keepdim=True) if count is None else square.sum(axes, True) / count
        out = _affine(values * torch.rsqrt(mean + self.eps), self.weight, None)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_channels}, eps={self.eps}"


class _StandardizedWeight(nn.Module):
    """The parametrization behind :func:`weight_standardization`."""

    def __init__(self, axis: int, eps: float) -> None:
        super().__init__()
        self.axis, self.eps = axis, eps

    def forward(self, weight: Tensor) -> Tensor:
        axes = [a for a in range(weight.ndim) if a != self.axis]
        mean = weight.mean(axes, keepdim=True)
        centred = weight - mean
        var = centred.square().mean(axes, keepdim=True)
        return centred * torch.rsqrt(var + self.eps)


def weight_standardization(module: nn.Module, name: str = "weight", *, eps: float = 1e-5) -> Any:
    """Parametrize ``module`` so that each output channel's weights have mean 0 and variance 1.

    w_hat = (w - mean) / sqrt(var + eps), over all but the output axis (Qiao et al. 2019,
    https://arxiv.org/abs/1903.10520). Undone by
    ``torch.nn.utils.parametrize.remove_parametrizations``.

    Args:
        module: a convolution, transposed convolution or linear layer.
        name: the parameter.
        eps: added to the variance.

    Returns:
        ``module``.

    Raises:
        InputError: no such parameter, or one with fewer than two axes, or a transposed
            convolution in groups, whose output channels share rows.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise InputError(
            f"weight standardization needs a parameter of at least two axes, got {name!r} of "
            f"{type(module).__name__}."
        )
    transposed = getattr(module, "transposed", False)
    if transposed and getattr(module, "groups", 1) != 1:
        raise InputError("weight standardization of a transposed convolution needs groups=1.")
    standardized = _StandardizedWeight(1 if transposed else 0, eps)
    return parametrize.register_parametrization(module, name, standardized)


def groups_of(channels: int) -> int:
    """Groups for group norm: the most, up to 32, that leave each at least 4 channels.

    32 is the paper's number (Wu and He 2018); with one value a group, a vector would be
    normalized to zero.
    """
    return max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 4 or g == 1))


NORMS: tuple[type[nn.Module], ...] = (
    *BATCH_NORMS,
    _InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    RMSNorm,
)
