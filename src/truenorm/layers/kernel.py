"""Batch norm by torch's kernels, where they are right; else by a way that is.

On a CPU the kernel for rows of channels, (N, C) or channels-last, adds up in float32, one value
after the other. With n values a channel and r = |mean| / std its mean is off by up to
n r 2^-24 standard deviations, its variance by the square of that and by n 2^-24 of itself. The
kernel for other layouts adds up in float64. Both fold the mean into the bias, which costs the
output r 2^-24. So what a kernel found says whether it was to be believed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from truenorm.kernels import ops
from truenorm.layers.capture import captured, readable, wrapped
from truenorm.layers.functional import (
    ROWS,
    Moments,
    along_channels,
    in_rows,
    pool,
    scaled,
    statistics_dtype,
    wide,
    widest,
)

_PART = 2**14  # rows that are added up in one go where there are more
FAR = 2**10  # r up to which the mean may be folded into the bias: output within 1e-4
_FAR_IN_ROWS = 2**17  # n r of the kernel for rows: mean within 1/128 std, variance within 1e-4
_TRIES = 3  # after one the mean left is that of rounding, which a constant channel still has


def batch_norm(
    x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float, *, again: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization in training: the output, and the batch's mean and biased variance, (C,).

    By torch's kernel, if what it found shows that it was right to ask it; else the mean is taken
    out beforehand, which changes neither output nor gradient.

    Args:
        x: (N, C, *S), with at least two values a channel.
        affine: weight and bias, (C,) or None for 1 and 0, in the dtype of statistics of ``x``.
        eps: added to the variance.
        again: whether the kernel has been found wrong for this ``x``.
    """
    single = x.is_cpu and x.dtype != torch.float64
    if not readable(x):
        by = _by_operations if (single if captured() else wrapped(x)) else _by_kernel
        return by(x, affine, eps)
    if x.is_cpu and ops.live():
        out, table = ops.with_moments(x, affine, eps)
        return out, *table.view(2, -1)
    if not single:
        return _by_kernel(x, affine, eps)
    by = _by_kernel
    if in_rows(x) and x.numel() > ROWS * x.shape[1]:
        by = _in_parts if forward_ad._current_level < 0 else _by_operations
    values, shift = x, x.new_zeros((), dtype=statistics_dtype(x))
    for left in reversed(range(_TRIES)):
        if not again:
            out, mean, var = by(values, affine, eps)
            if not (left and doubtful(values, mean, var + eps)):
                break
        again = False
        values = wide(values)
        found = _over_channels(values.detach())
        values, shift = values - found, shift + found.flatten()
    return out.to(x.dtype), shift + mean, var


def by_running(
    x: Tensor,
    running: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> Tensor:
    """Batch norm by running mean and variance, (C,), in the dtype of statistics of ``x``."""
    (mean, var), values = running, x
    look = readable(x) and x.dtype != torch.float64
    # In most layers no mean is so large that it could be far, were the variance 0.
    if look and mean.dot(mean).item() > FAR**2 * eps and far(mean, var + eps):
        values, mean = wide(x) - along_channels(mean, x), torch.zeros_like(mean)
    out = F.batch_norm(values, mean, var, *affine, False, 0.0, eps)
    return out if values is x else out.to(x.dtype)


def doubtful(x: Tensor, mean: Tensor, spread: Tensor) -> bool:
    """Whether the kernel that found mean and var + eps, (C,), of ``x`` may have been wrong."""
    if x.dtype == torch.float64:
        return False
    return far(mean, spread, _limit(x))


def surely_near(ratio: Tensor, count: int) -> bool:
    """Whether no mean of ``count`` values is far, by ``ratio`` = mean / std, in two calls.

    None of them is larger than all together.
    """
    squares: float = ratio.dot(ratio).item()
    return squares * max(count, 256) ** 2 <= _FAR_IN_ROWS**2


def _limit(x: Tensor) -> float:
    """The r up to which torch's kernel is right for ``x``."""
    rows = in_rows(x)
    if not rows and x.is_contiguous():
        return FAR
    count = x.numel() // x.shape[1]
    return min(FAR, _FAR_IN_ROWS / (min(count, ROWS) if rows else count))


def far(mean: Tensor, spread: Tensor, limit: float = FAR) -> bool:
    """Whether some mean is more than ``limit`` standard deviations from 0, or is none."""
    return not bool((mean.square() <= limit**2 * spread).all())


def _by_kernel(
    x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[1]
    mean = x.new_zeros(x.shape[1], dtype=statistics_dtype(x))
    var = torch.zeros_like(mean)
    cudnn = x.is_cuda and torch.backends.cudnn.enabled
    out = torch.batch_norm(x, *affine, mean, var, True, 1.0, eps, cudnn)
    return out, mean, var * ((count - 1) / count)


def _by_operations(
    x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where nothing can be looked at: right for every input, and slower if not compiled."""
    values = wide(x)
    shift = _over_channels(values.detach())
    normed, _, slip, var = _standardized(values - shift, eps)
    weight, bias = affine
    out = normed if weight is None else normed * along_channels(weight, x)
    out = out if bias is None else out + along_channels(bias, x)
    mean = shift + slip
    return out.to(x.dtype), mean.detach().flatten(), var.detach().flatten()


def _over_channels(x: Tensor) -> Tensor:
    """Mean of each channel, with axes of one for the others; torch's sums of it are exact."""
    return x.mean([0, *range(2, x.ndim)], keepdim=True)


def _standardized(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - mean) / std, and 1 / std, mean and variance, in differentiable operations."""
    mean = _over_channels(x)
    centred = x - mean
    var = _over_channels(centred.square())
    inverse = torch.rsqrt(var + eps)
    return centred * inverse, inverse, mean, var


def _in_parts(
    x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, var = _InParts.apply(wide(x), *affine, eps)  # type: ignore[no-untyped-call]
    return out.to(x.dtype), mean, var


class _InParts(torch.autograd.Function):
    """Batch norm of very many rows of channels: torch's kernels add up a part of them at a time.

    With mean and std of the batch, h = (x - mean) / std and n rows, the gradients are
    sum(dy h) of the weight, sum(dy) of the bias, and of x
    (dy - sum(dy) / n - h sum(dy h) / n) * weight / std.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = torch.split(_rows(x), _PART)
        still = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        found = [torch.batch_norm_update_stats(part, *still, 0.0) for part in parts]
        count = torch.tensor([[len(part)] for part in parts], dtype=torch.float64)
        mean, var = (widest(torch.stack(column)) for column in zip(*found, strict=True))
        pooled = pool(Moments(mean, var, count))
        mean, var = pooled.mean[0].to(x.dtype), pooled.var[0].to(x.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            grads = _gradients(grad, x, weight, ctx.eps)
        else:
            grads = _gradients_in_parts(grad, x, weight, (mean, torch.rsqrt(var + ctx.eps)))
        wanted = ctx.needs_input_grad
        return *(g if want else None for g, want in zip(grads, wanted, strict=False)), None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Those of :class:`_InParts`, differentiable themselves."""
    normed, inverse, _, _ = _standardized(x, eps)
    mean, slope = _over_channels(grad), _over_channels(grad * normed)
    scale = inverse if weight is None else inverse * along_channels(weight, x)
    count = x.numel() // x.shape[1]
    return (
        (grad - mean - normed * slope) * scale,
        slope.flatten() * count,
        mean.flatten() * count,
    )


def _gradients_in_parts(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    mean, inverse = stats
    count = x.numel() // x.shape[1]
    sums = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for part, along in zip(*(torch.split(_rows(v), _PART) for v in (x, grad)), strict=True):
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            along, part, None, None, None, mean, inverse, True, 0.0, [False, True, True]
        )
        sums += torch.stack([of_weight, of_bias])
    of_weight, of_bias = sums.to(x.dtype)
    scale = inverse if weight is None else inverse * weight
    slope = -scale * inverse * of_weight / count
    of_x = scaled(x, slope, -scale * of_bias / count - mean * slope)
    return of_x.add_(scaled(grad, scale, torch.zeros_like(scale))), of_weight, of_bias


def _rows(x: Tensor) -> Tensor:
    """``x`` (N, C, *S) as (values a channel, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
