"""The affine map that a normalization is in inference, and how it enters the weights beside it.

All arithmetic is in float64; what comes out is rounded once, by who writes it. The layouts are
torch's: a linear layer's weight is (O, I), a convolution's (O, I / groups, *K), a transposed
convolution's (I, O / groups, *K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """y = scale * x + shift for each channel; (C,) each, float64."""

    scale: Tensor
    shift: Tensor

    def after(self, first: Affine) -> Affine:
        """``first``, then this one."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def of_channels(self, index: Tensor) -> Affine:
        """The map of channels that are these here: (C',) numbers of channels."""
        return Affine(self.scale[index], self.shift[index])

    def along(self, x: Tensor, axis: int = 1) -> Tensor:
        """Apply it to ``x``, whose channels lie along ``axis``, in the dtype of ``x``."""
        shape = [1] * x.ndim
        shape[axis] = -1
        return x * self.scale.to(x.dtype).view(shape) + self.shift.to(x.dtype).view(shape)


def of_statistics(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """(x - mean) / sqrt(var + eps) * weight + bias as one map; all (C,)."""
    scale = (var.detach().double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    return Affine(scale, shift if bias is None else shift + bias.detach().double())


class Weighted(NamedTuple):
    """A linear map of channels: float64 weights, and a bias (O,) or None.

    Attributes:
        weight: in torch's layout.
        bias: (O,) or None for zero.
        transposed: whether the layout is that of a transposed convolution.
        groups: of the convolution; 1 for a linear layer.
        border: (O, 1, *K), or transposed (1, O, *K), or None: the weights that a further input
            of ones would have. A shift of the input does not reach where zeros pad it, and this
            says where it does.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool = False
    groups: int = 1
    border: Tensor | None = None

    def followed_by(self, affine: Affine) -> Weighted:
        """The map, then ``affine``: W' = s W, b' = s b + t."""
        shift = affine.shift if self.bias is None else affine.scale * self.bias + affine.shift

        def scaled(weight: Tensor, groups: int) -> Tensor:
            if self.transposed:
                return _by_column(weight, affine.scale, groups)
            return _by_row(weight, affine.scale)

        border = None if self.border is None else scaled(self.border, 1)
        return self._replace(weight=scaled(self.weight, self.groups), bias=shift, border=border)

    def preceded_by(self, affine: Affine, *, padded: bool) -> Weighted:
        """``affine``, then the map: W' = W s, b' = b + sum(W t).

        Args:
            affine: of this map's inputs.
            padded: whether the shift reaches some positions only, because zeros pad the input or
                because the convolution is transposed; it then becomes ``border``.
        """

        def scaled(scale: Tensor) -> Tensor:
            if self.transposed:
                return _by_row(self.weight, scale)
            return _by_column(self.weight, scale, self.groups)

        changed = self._replace(weight=scaled(affine.scale))
        reach = _summed_inputs(scaled(affine.shift), self.transposed, self.groups)
        if not reach.any():
            return changed
        if padded:
            return changed._replace(border=reach)
        total = reach.flatten(1).sum(1)  # of a layout (O, 1, *K): transposed ones are padded
        return changed._replace(bias=total if self.bias is None else self.bias + total)


def _by_row(weight: Tensor, scale: Tensor) -> Tensor:
    """Scale the first axis."""
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))


def _by_column(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Scale the second axis, whose rows lie group after group."""
    kernel = [1] * (weight.ndim - 2)
    grouped = weight.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, *kernel)
    return grouped.view_as(weight)


def _summed_inputs(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """The weights of one input that stands for all: (O, 1, *K), or transposed (1, O, *K)."""
    if not transposed:
        return weight.sum(1, keepdim=True)
    grouped = weight.view(groups, -1, *weight.shape[1:]).sum(1)
    return grouped.flatten(0, 1).unsqueeze(0)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, rounded once; what would be subnormal, and slow, becomes zero."""
    flushed = torch.where(value.abs() < torch.finfo(dtype).tiny, 0.0, value)
    return flushed.to(dtype)
