"""The arithmetic of normalization. Every convention is stated here, once.

- Statistics of batch norm are over the batch and all positions of a channel; x is (N, C, *S).
- A batch is normalized by its biased variance (divided by n); the unbiased one (n - 1) is
  tracked. eps is added to the variance, inside the root.
- ``momentum`` is the weight of the NEW value: (1 - momentum) * running + momentum * batch. Keras,
  Flax and Equinox mean the weight of the old one: their 0.99 is 0.01 here. None is the cumulative
  average.
- Variances are sums of squared differences from the mean, merged by Chan's formula, never
  E[x^2] - E[x]^2. Half-precision values are widened to float32; merging is done in float64.
- With a mask, what is invalid is neither seen nor written: statistics are those of the valid
  values alone, and the invalid outputs are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truenorm.errors import InputError
from truenorm.kernels.fused import OPERATIONS

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks


class Moments(NamedTuple):
    """Statistics of groups of values, one row a group.

    Attributes:
        mean: (G, C).
        var: (G, C), biased.
        count: (G, 1), or (G, C) where a mask differs between channels; values pooled.
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here

    def detach(self) -> Moments:
        """The same numbers, outside of the graph."""
        return Moments(*(part.detach() for part in self))


def wide(x: Tensor) -> Tensor:
    """``x`` in at least float32: squares of half-precision activations overflow."""
    return x.to(statistics_dtype(x))


def widest(x: Tensor) -> Tensor:
    """``x`` in float64, where the device has it."""
    if x.dtype is torch.float64:  # a call of torch's costs more
        return x
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def valid(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` shaped to broadcast against ``x`` (N, C, *S): True where a value counts.

    Args:
        mask: bool; (N,) for whole examples, (N, *S) for positions, or with as many axes as x.
        x: what it belongs to.

    Raises:
        InputError: not bool, or of a shape that fits none of these.
    """
    if mask.dtype != torch.bool:
        raise InputError(
            f"mask must be a bool tensor, True where a value is valid; got {mask.dtype}. "
            "Use mask.bool() if ones mark the valid positions."
        )
    shaped = mask
    if mask.ndim == 1:
        shaped = mask.view(-1, *(1,) * (x.ndim - 1))
    elif mask.ndim == x.ndim - 1:
        shaped = mask.unsqueeze(1)
    sizes = zip(shaped.shape, x.shape, strict=False)
    if shaped.ndim != x.ndim or any(have not in (1, want) for have, want in sizes):
        shape = tuple(x.shape)
        raise InputError(
            f"mask of shape {tuple(mask.shape)} does not fit input of shape {shape}; give "
            f"{(shape[0],)} for examples, {(shape[0], *shape[2:])} for positions, or {len(shape)} "
            "axes that broadcast."
        )
    return shaped


def _over_positions(x: Tensor, mask: Tensor | None) -> Moments:
    """Moments of each example's channels over its positions, as (N, C) rows, widest."""
    axes = list(range(2, x.ndim))
    positions = math.prod(x.shape[2:])
    if mask is None:
        count = x.new_full((x.shape[0], 1), positions, dtype=torch.float64)
        if not axes:
            return Moments(widest(x), torch.zeros_like(widest(x)), widest(count))
        if not positions:
            empty = widest(x.sum(axes))
            return Moments(empty, empty, widest(count))
        # A constant is taken out first: sums of small differences are exact, of large values not.
        shift = x.detach().mean(axes, keepdim=True)
        centred = x - shift
        slip = centred.mean(axes)
        var = centred.square().mean(axes) - slip.square()
        return Moments(widest(shift.flatten(1)) + widest(slip), widest(var), widest(count))
    shape = (x.shape[0], mask.shape[1], *x.shape[2:])
    if not axes:
        return Moments(widest(x), torch.zeros_like(widest(x)), widest(mask.expand(shape)))
    count = widest(mask.expand(shape).sum(axes))
    each = count.clamp(min=1)
    sums = x.detach().sum(axes)  # x is zero where invalid
    shift = (widest(sums) / each).to(x.dtype)
    centred = torch.where(mask, x - shift.view(*shift.shape, *(1,) * len(axes)), 0)
    slip = widest(centred.sum(axes)) / each
    var = widest(centred.square().sum(axes)) / each - slip.square()
    return Moments(widest(shift) + slip, var, count)


def moments(
    x: Tensor,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    total: int = 1,
    reduce: Reduce | None = None,
) -> Moments:
    """Moments of each channel of ``x`` over examples and positions; differentiable twice.

    Each example's positions are reduced first, examples are then merged by the formula of Chan,
    Golub and LeVeque (1979), which also merges ranks: counts and sums travel, then squared
    differences from the common mean.

    Args:
        x: (N, C, *S), float32 or float64; zero where the mask is False.
        mask: as :func:`valid` returns it.
        groups: (N,) group of each example; None for one group.
        total: the number of groups.
        reduce: sums over ranks, each of which must call this with equal C and total.

    Returns:
        Moments of (total, C); a group without values has mean and variance zero.
    """
    return merged(_over_positions(x, mask), groups, total=total, reduce=reduce)


def merged(
    each: Moments,
    groups: Tensor | None = None,
    *,
    total: int = 1,
    reduce: Reduce | None = None,
) -> Moments:
    """The rows of ``each`` in one row a group, and over ranks; see :func:`moments`."""

    def over_rows(values: Tensor) -> Tensor:
        if groups is None:
            return values.sum(0, keepdim=True)
        return values.new_zeros(total, values.shape[1]).index_add(0, groups, values)

    def spread(values: Tensor) -> Tensor:
        return values if groups is None else values[groups]

    count, sums = over_rows(each.count), over_rows(each.mean * each.count)
    if reduce is not None:
        # A column for each channel, on every rank: a mask on one may differ between channels.
        both = reduce(torch.cat([count.expand_as(sums), sums], 1))
        count, sums = both.chunk(2, 1)
        count = count.detach()
    safe = count.clamp(min=1)
    mean = sums / safe
    squares = over_rows((each.var + (each.mean - spread(mean)).square()) * each.count)
    if reduce is not None:
        squares = reduce(squares)
    return Moments(mean, squares / safe, count)


def joined(parts: list[Moments]) -> Moments:
    """All groups of ``parts`` in one table, in order."""
    if len(parts) == 1:
        return parts[0]
    columns = max(part.count.shape[1] for part in parts)
    return Moments(
        torch.cat([part.mean for part in parts]),
        torch.cat([part.var for part in parts]),
        torch.cat([part.count.expand(-1, columns) for part in parts]),
    )


def pool(parts: Moments) -> Moments:
    """All rows of ``parts`` as one: Chan's formula for any number of parts.

    mean = sum(n_i mean_i) / n; var = sum(n_i (var_i + (mean_i - mean)^2)) / n.
    """
    count = parts.count.sum(0, keepdim=True)
    safe = count.clamp(min=1)
    mean = (parts.mean * parts.count).sum(0, keepdim=True) / safe
    squares = (parts.var + (parts.mean - mean).square()) * parts.count
    return Moments(mean, squares.sum(0, keepdim=True) / safe, count)


def unbiased(var: Tensor, count: Tensor) -> Tensor:
    """Bessel-corrected variance: what is tracked, never what normalizes the batch."""
    return var * (count / (count - 1).clamp(min=1))


def group_weights(count: Tensor, momentum: Tensor | float, *, in_turn: bool) -> Tensor:
    """How much of each group enters the running average, (G, C); a column sums to ``momentum``.

    In turn: groups are tracked one after another, the i-th with 1 - (1 - momentum)^(n_i / n), so
    that a batch moves the average equally far in any number of groups: the horizon stays.
    Otherwise, as for the cumulative average, and at momentum 1, which would keep the last group
    alone: by size.
    """
    share = count / count.sum(0).clamp(min=1)
    if not in_turn or momentum == 1:
        return share * momentum
    later = share.sum(0) - share.cumsum(0)
    keep = 1 - momentum
    weights: Tensor = (1 - keep**share) * keep**later
    return weights


def normalize(
    x: Tensor,
    stats: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
    *,
    correction: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, in the dtype of ``x``.

    The mean is subtracted first: folded into the bias it would cancel where it is large.

    Args:
        x: (N, C, *S).
        stats: mean and variance, (1, C) or, for each example, (N, C).
        affine: weight and bias, (C,) or None for 1 and 0.
        eps: added to the variance.
        correction: (r, d) of batch renormalization, shaped as ``stats``: (...) * r + d before
            the affine map.
    """
    shift, scale, offset = affine_map(stats, affine, eps, x.dtype, correction=correction)
    centred = x - along_channels(shift, x)
    if len(shift) == 1:
        return scaled(centred, scale[0], offset[0])
    scale, offset = scale.to(x.dtype), offset.to(x.dtype)
    return centred * along_channels(scale, x) + along_channels(offset, x)


def affine_map(
    stats: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
    dtype: torch.dtype,
    *,
    correction: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`normalize` does, as (x - shift) * scale + offset, each shaped as ``stats``.

    The shift, of ``dtype``, is a constant.
    """
    mean, var = stats
    scale = torch.rsqrt(var + eps)
    # The mean is wider than x: what x can hold of it is subtracted, which is exact where it
    # matters, and the rest enters with the offset, as does the gradient of all of it.
    shift = mean.detach().to(dtype)
    offset = shift - mean
    if correction is not None:
        scale = scale * correction[0]
    offset = offset * scale
    if correction is not None:
        offset = offset + correction[1]
    weight, bias = affine
    if weight is not None:
        scale, offset = scale * weight, offset * weight
    if bias is not None:
        offset = offset + bias
    return shift, scale, offset


def scaled(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Scale and shift channels by (C,) each, in one sweep forward and one backward.

    The kernel is that of batch norm in evaluation; on a CPU its backward is not asked to add up
    more rows than it can: see :data:`ROWS`.
    """
    dtype = statistics_dtype(x)
    scale, offset = scale.to(dtype), offset.to(dtype)
    single = x.is_cpu and x.dtype != torch.float64
    if single and torch.is_grad_enabled() and x.numel() > ROWS * x.shape[1] and in_rows(x):
        return (x * along_channels(scale, x) + along_channels(offset, x)).to(x.dtype)
    still = torch.zeros_like(scale, requires_grad=False), torch.ones_like(scale)
    return torch.batch_norm(x, scale, offset, *still, False, 0.0, 0.0, x.is_cuda)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) or (N, C) shaped to broadcast against ``x`` (N, C, *S)."""
    return values.view(-1, values.shape[-1], *(1,) * (x.ndim - 2))


def renormalize(
    x: Tensor,
    correction: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """(x * r + d) * weight + bias of a normalized ``x`` (N, C, *S); r and d are (C,)."""
    (scale, shift), (weight, bias) = correction, affine
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    return scaled(x, scale, shift)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics of ``x``: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Values a channel that torch's kernel for rows is asked to add up, in float32: its variance is off
# by 0.4 % of itself at the worst; see truenorm.layers.kernel.
ROWS = 2**16


def in_rows(x: Tensor) -> bool:
    """Whether the channels of ``x`` lie side by side, so that torch's kernel for rows is used."""
    if x.is_contiguous():
        return x.numel() == x.size(0) * x.size(1)
    return layout_of(x) is not torch.contiguous_format


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels-last, if ``x`` (N, C, *S) is that and not contiguous, too."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    rows = formats.get(x.ndim)
    if rows is None or x.is_contiguous() or not x.is_contiguous(memory_format=rows):
        return torch.contiguous_format
    return rows


def standardized(x: Tensor, mask: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) of the valid values along ``axes``.

    ``x`` is zero where the mask is False; what comes of that is not to be used.
    """
    count = mask.expand(x.shape).sum(axes, keepdim=True).clamp(min=1)
    centred = x - x.sum(axes, keepdim=True) / count
    # Once more: a mean that is large is rounded to a part of a standard deviation.
    slip = torch.where(mask, centred, 0).sum(axes, keepdim=True) / count
    centred = centred - slip
    var = torch.where(mask, centred, 0).square().sum(axes, keepdim=True) / count
    return centred * torch.rsqrt(var + eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **OPERATIONS,
    # These need only their result for the gradient, and may overwrite the input.
    "relu": torch.relu_,
    "leaky_relu": lambda x: F.leaky_relu(x, inplace=True),
    "elu": lambda x: F.elu(x, inplace=True),
}
