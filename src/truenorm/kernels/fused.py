"""Batch norm with a residual and an activation behind it, in one sweep forward and two backward.

Between forward and backward stand the input alone, and the output where the activation's gradient
follows from it and a residual went in; neither the normalized values nor what went into the
activation are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
"""The activations, in the order of the kernels' own list, in which "none" comes first."""

ACTIVATIONS = ("none", *OPERATIONS)

SMALL = 1 << 14
"""Values up to which two nodes of torch's own cost less than one of Python's."""

_BY_OUTPUT = ("relu", "leaky_relu", "relu6")
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


class Arguments(NamedTuple):
    """What a call of the operators is given beside tensors that have gradients.

    Attributes:
        training: normalize by the batch's own moments.
        momentum: weight of the new value in the running statistics; at 0 they stay.
        eps: added to the variance.
        act: the activation's number.
        mask: (N, *S) or None.
        groups: examples of each group that is normalized by itself; empty for one of all.
        limits: of r and d in batch renormalization; (1, 0) for none.
    """

    training: bool
    momentum: float
    eps: float
    act: int
    mask: Tensor | None
    groups: tuple[int, ...]
    limits: tuple[float, float]


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes by place
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor],
        told: Arguments,
        found: list[Tensor],
    ) -> Tensor:
        y, moments, skipped = _forward(x, residual, (weight, bias), running, told)
        found += moments, skipped
        act = ACTIVATIONS[told.act]
        by_output = residual is not None and act in _BY_OUTPUT
        added = residual is not None and act != "none" and not by_output
        ctx.save_for_backward(
            x, residual if added else None, y if by_output else None, weight, bias, moments
        )
        ctx.added = residual is not None
        ctx.told = told
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, output, weight, bias, moments = ctx.saved_tensors
        told: Arguments = ctx.told
        of_x, of_residual, of_weight, of_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # the gradient will be differentiated
            grads = _differentiable(ctx, grad, (x, residual, output, weight, bias, moments))
        else:
            wanted = [of_x, of_weight, of_bias, of_residual]
            grads = torch.ops.truenorm.batch_norm_act_backward(
                grad, x, residual, output, weight, bias, moments, told.training, told.eps,
                told.act, wanted, told.mask, told.groups,
            )  # fmt: skip
        dx, dweight, dbias, dresidual = grads
        return (
            dx if of_x else None,
            dresidual if of_residual else None,
            dweight if of_weight else None,
            dbias if of_bias else None,
            *(None,) * 3,
        )


def _forward(
    x: Tensor,
    residual: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor, Tensor],
    told: Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, (2 or 4, G, C) of moments, and what has a value if the batch was not finite."""
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.truenorm.batch_norm_act(
        x, residual, *affine, *running, *told[:6], *told.limits
    )
    return out


def _differentiable(ctx: Any, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual, in torch's differentiable operations."""
    moments, told = saved[5], ctx.told  # unpacked once, as a checkpoint allows
    act, mask = ACTIVATIONS[told.act], told.mask
    with torch.enable_grad():
        # Views: what one of them was computed from another is no part of these gradients.
        x, residual, output, weight, bias = (t if t is None else t.view_as(t) for t in saved[:5])
        values, added = x, residual
        if mask is not None:  # a NaN that nobody sees would come back with a gradient of 0
            mask = mask.unsqueeze(1)
            values, grad = torch.where(mask, x, 0), torch.where(mask, grad, 0)
            added = None if residual is None else torch.where(mask, residual, 0)
        sizes = list(told.groups) or [x.shape[0]]
        masks = [None] * len(sizes) if mask is None else torch.split(mask, sizes)
        parts = zip(torch.split(values, sizes), masks, moments.unbind(1), strict=True)
        outs = [_again(part, seen, found, (weight, bias), told) for part, seen, found in parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        of_residual = None
        if output is not None:  # of an activation whose slope is constant in pieces
            grad = grad * _slope(act, output)
        if output is not None or act == "none":
            of_residual = grad if ctx.added else None
        else:
            out = OPERATIONS[act](out if added is None else out + added)
        of = [t for t in (x, weight, bias, residual) if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(out, of, grad, create_graph=True))
    grads = [
        next(gradients) if t is not None and t.requires_grad else None
        for t in (x, weight, bias, residual)
    ]
    return *grads[:3], grads[3] if of_residual is None else of_residual


def _again(
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    told: Arguments,
) -> Tensor:
    """One group's batch norm, by ``moments`` (2 or 4, C) where they are given."""
    dtype = _statistics_dtype(x)
    mean, var, *correction = moments.to(dtype)
    weight, bias = (t if t is None else t.to(dtype) for t in affine)
    affine = weight, bias
    if not told.training:
        return F.batch_norm(x, mean, var, *affine, False, 0.0, told.eps)
    if mask is None and not correction:
        return F.batch_norm(x, None, None, *affine, True, 0.0, told.eps)
    if mask is None:
        out = F.batch_norm(x.to(dtype), None, None, None, None, True, 0.0, told.eps)
    else:
        out = _masked(x.to(dtype), mask, told.eps)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    for scale, offset in ((correction or (None, None)), affine):
        out = out if scale is None else out * scale.view(shape)
        out = out if offset is None else out + offset.view(shape)
    return out.to(x.dtype)


def _masked(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Batch norm, without the affine map, by the moments of what ``mask``, (N, 1, *S), shows."""
    axes = [0, *range(2, x.ndim)]
    count = mask.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum(axes, keepdim=True) / count

    centred = x - mean(x)
    return centred * torch.rsqrt(mean(centred.square()) + eps)


class _Moments(torch.autograd.Function):
    """With n values of mean m, d mean / dx = 1 / n and d var / dx = 2 (x - m) / n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        mean, var = torch.ops.truenorm.moments(x, mask)
        ctx.save_for_backward(x, mean)
        ctx.mask, ctx.count = mask, max(count, 1)
        return mean, var

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> tuple[Tensor, None, None]:
        (x, mean), mask = ctx.saved_tensors, ctx.mask
        scale, offset = 2 * of_var / ctx.count, of_mean / ctx.count
        if not torch.is_grad_enabled():
            still = mean[0], torch.ones_like(mean[0])
            dx: Tensor = torch.ops.truenorm.batch_norm_act(
                x, None, scale[0], offset[0], *still, False, 0.0, 0.0, 0, mask
            )[0]
            return dx, None, None
        # The gradient will be differentiated.
        axes, shape = [0, *range(2, x.ndim)], (1, -1, *(1,) * (x.ndim - 2))
        shown = torch.ones_like(x) if mask is None else mask.unsqueeze(1).expand_as(x)
        values = torch.where(shown.bool(), x.double(), 0)
        centred = values - values.sum(axes, keepdim=True) / ctx.count
        dx = torch.where(shown.bool(), centred * scale.view(shape) + offset.view(shape), 0)
        return dx.to(x.dtype), None, None


def moments(x: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (1, C) of float64, differentiable twice; needs live kernels.

    Args:
        x: (N, C, *S) on a CPU, of any layout and floating dtype.
        mask: bool (N, *S), contiguous, True for the values that count; of none both are 0.
        count: how many of each channel there are.
    """
    found: tuple[Tensor, Tensor] = _Moments.apply(x, mask, count)  # type: ignore[no-untyped-call]
    return found


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slope(act: str, output: Tensor) -> Tensor:
    if act == "leaky_relu":
        return torch.where(output > 0, 1.0, 0.01).to(output.dtype)
    inside = output > 0 if act == "relu" else (output > 0) & (output < 6)
    return inside.to(output.dtype)


def _watched() -> bool:
    """Whether a mode watches torch's functions; that of a default device does not."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def serves() -> bool:
    """Whether a node of Python's can stand here, and values be read.

    Not under forward-mode gradients, a transform of torch.func or tracing of jit's, nor where
    somebody watches torch's functions, of which these are none.
    """
    return not (torch._C._len_torch_function_stack() and _watched()) and (
        forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def batch_norm_act(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor, Tensor],
    eps: float,
    *,
    momentum: float | None,
    act: str = "none",
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    groups: Sequence[int] = (),
    limits: tuple[float, float] = (1.0, 0.0),
) -> tuple[Tensor, Tensor, bool]:
    """act(batch norm of x + residual), differentiable twice; needs live kernels.

    Args:
        x: (N, C, *S) on a CPU, of any layout and floating dtype, with a value a channel at least.
        affine: weight and bias, (C,), or None for 1 and 0.
        running: mean and variance, (C,); moved, but by a batch that is not finite.
        eps: added to the variance.
        momentum: weight of the new value, with 0 of which they stay; None to normalize by
            ``running``.
        act: one of :data:`ACTIVATIONS`.
        residual: of x's shape, dtype and device.
        mask: bool (N, *S), contiguous, True for values that count, of which there must be one in
            each group; the others are not looked at, and are zero in the output.
        groups: examples of each group that is normalized by itself, in order; none for one of all.
        limits: of r and d in batch renormalization, rmax >= 1 and dmax >= 0, by ``running`` as it
            is before it moves; (1, 0) is batch norm.

    Returns:
        The output, of shape and dtype of ``x``; mean and biased variance of the G groups, and r and
        d where the limits allow any, (2 or 4, G, C) of float64; and whether the batch was finite.
    """
    told = Arguments(
        momentum is not None, momentum or 0.0, eps, _NUMBERS[act], mask, tuple(groups), limits
    )
    # Past autograd's count of versions, as in ops.batch_norm.
    statistics = running[0].data, running[1].data
    if not torch.is_grad_enabled():  # a node of Python's costs more than a small layer
        y, moments, skipped = _forward(x, residual, affine, statistics, told)
        return y, moments, skipped.numel() == 0
    found: list[Tensor] = []
    y = _BatchNormAct.apply(  # type: ignore[no-untyped-call]
        x, residual, *affine, statistics, told, found
    )
    moments, skipped = found
    return y, moments, skipped.numel() == 0
