"""Batch norm with a residual and an activation behind it, in one sweep forward and two backward.

Between forward and backward stand the input alone, and the output where the activation's gradient
follows from it and a residual went in; neither the normalized values nor what went into the
activation are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes by place
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor],
        training: bool,
        momentum: float,
        eps: float,
        act: str,
        mask: Tensor | None,
        found: list[bool],
    ) -> Tensor:
        number = _NUMBERS[act]
        y: Tensor
        y, moments, told = torch.ops.truenorm.batch_norm_act(
            x, residual, weight, bias, *running, training, momentum, eps, number, mask
        )
        found.append(told.numel() == 0)
        by_output = residual is not None and act in _BY_OUTPUT
        added = residual is not None and act != "none" and not by_output
        ctx.save_for_backward(
            x, residual if added else None, y if by_output else None, weight, bias, moments
        )
        ctx.added = residual is not None
        ctx.options = training, eps, act, mask
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, output, weight, bias, moments = ctx.saved_tensors
        training, eps, act, mask = ctx.options
        of_x, of_residual, of_weight, of_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # the gradient will be differentiated
            grads = _differentiable(ctx, grad)
        else:
            wanted = [of_x, of_weight, of_bias, of_residual]
            grads = torch.ops.truenorm.batch_norm_act_backward(
                grad, x, residual, output, weight, bias, moments, training, eps,
                _NUMBERS[act], wanted, mask,
            )  # fmt: skip
        dx, dweight, dbias, dresidual = grads
        return (
            dx if of_x else None,
            dresidual if of_residual else None,
            dweight if of_weight else None,
            dbias if of_bias else None,
            *(None,) * 7,
        )


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual, in torch's differentiable operations."""
    x, residual, output, weight, bias, moments = ctx.saved_tensors
    training, eps, act, mask = ctx.options
    with torch.enable_grad():
        mean, var = (None, None) if training else moments.to(_statistics_dtype(x))
        values, added = x, residual
        if mask is not None:  # a NaN that nobody sees would come back with a gradient of 0
            mask = mask.unsqueeze(1)
            values, grad = torch.where(mask, x, 0), torch.where(mask, grad, 0)
            added = None if residual is None else torch.where(mask, residual, 0)
        if mask is None or not training:
            out = F.batch_norm(values, mean, var, weight, bias, training, 0.0, eps)
        else:
            out = _masked(values, mask, weight, bias, eps)
        of_residual = None
        if output is not None:  # of an activation whose slope is constant in pieces
            grad = grad * _slope(act, output)
        if output is not None or act == "none":
            of_residual = grad if ctx.added else None
        else:
            out = OPERATIONS[act](out if added is None else out + added)
        of = [t for t in (x, weight, bias, residual) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, of, grad, create_graph=True))
    grads = [
        next(found) if t is not None and t.requires_grad else None
        for t in (x, weight, bias, residual)
    ]
    return *grads[:3], grads[3] if of_residual is None else of_residual


def _masked(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by the moments of what ``mask``, (N, 1, *S), shows."""
    axes = [0, *range(2, x.ndim)]
    count = mask.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum(axes, keepdim=True) / count

    centred = x.to(_statistics_dtype(x))
    centred = centred - mean(centred)
    out = centred * torch.rsqrt(mean(centred.square()) + eps)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    out = out if weight is None else out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(x.dtype)


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
) -> tuple[Tensor, bool]:
    """act(batch norm of x + residual), differentiable twice; needs live kernels.

    Args:
        x: (N, C, *S) on a CPU, of any layout and floating dtype, with a value a channel at least.
        affine: weight and bias, (C,), or None for 1 and 0.
        running: mean and variance, (C,); moved, but by a batch that is not finite.
        eps: added to the variance.
        momentum: weight of the new value; None to normalize by ``running``.
        act: one of :data:`ACTIVATIONS`.
        residual: of x's shape, dtype and device.
        mask: bool (N, *S), contiguous, True for values that count, of which there must be one;
            the others are not looked at, and are zero in the output.

    Returns:
        The output, of shape and dtype of ``x``, and whether the batch was finite.
    """
    training = momentum is not None
    # Past autograd's count of versions, as in ops.batch_norm.
    statistics = running[0].data, running[1].data
    y: Tensor
    if not torch.is_grad_enabled():  # a node of Python's costs more than a small layer
        y, _, told = torch.ops.truenorm.batch_norm_act(
            x, residual, *affine, *statistics, training, momentum or 0.0, eps, _NUMBERS[act], mask
        )
        return y, told.numel() == 0
    found: list[bool] = []
    y = _BatchNormAct.apply(  # type: ignore[no-untyped-call]
        x, residual, *affine, statistics, training, momentum or 0.0, eps, act, mask, found
    )
    return y, found[0]
