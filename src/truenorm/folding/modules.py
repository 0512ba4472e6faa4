"""What stands in a folded model where norms stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from truenorm.layers.functional import ACTIVATIONS


class Gone(nn.Identity):
    """What stands where a norm has vanished: names and indices stay, and a call costs next to none.

    A module's call looks for hooks of ten kinds, which takes as long as a small layer. This one
    looks for its own alone.
    """

    def __call__(self, input: Tensor) -> Tensor:
        """``input``; by a module's way of calling where the module has hooks."""
        hooks = self._forward_hooks or self._forward_pre_hooks
        if hooks or self._backward_hooks or self._backward_pre_hooks:
            hooked: Tensor = super().__call__(input)
            return hooked
        return input


class ScaleShift(nn.Module):
    """y = scale * x + shift for each channel of x (N, C, *S): what a lone norm is in inference.

    Args:
        like: a tensor with a value for each channel, of the type and device for the new ones.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.ones_like(like))
        self.register_buffer("shift", torch.zeros_like(like))
        self._none: Tensor
        self._one: Tensor
        self.register_buffer("_none", torch.zeros_like(like), persistent=False)
        self.register_buffer("_one", torch.ones_like(like), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``x``."""
        if x.ndim > 2 and not torch.compiler.is_compiling():
            # The kernel of batch norm in evaluation knows the layouts better than broadcasting.
            affine, moments = (self.scale, self.shift), (self._none, self._one)
            return torch.batch_norm(x, *affine, *moments, False, 0.0, 0.0, x.is_cuda)
        view = (-1, *(1,) * (x.ndim - 2))
        return torch.addcmul(self.shift.view(view), x, self.scale.view(view)).to(x.dtype)


class Cast(nn.Module):
    """What remains of an input scaling: the change of type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in the type of the weights."""
        return x.to(self.dtype)


class RawInput(nn.Module):
    """A model that takes unscaled inputs, of any real type.

    Args:
        model: takes ``(x - shift) * scale``.
        shift: broadcasts over an example; None for zero, or if the model's weights have it.
        scale: likewise; None for one.
    """

    def __init__(self, model: nn.Module, shift: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.shift: Tensor | None
        self.scale: Tensor | None
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self._dtype = parameter_dtype(model)  # parameters() takes longer than a small model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._dtype = parameter_dtype(self.model)
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Scale ``x``, in the type of the model's first parameter, and call the model on it."""
        x = x.to(self._dtype)
        if self.shift is not None:
            x = x - self.shift
        if self.scale is not None:
            x = x * self.scale
        return self.model(x, *args, **kwargs)


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The type of the first parameter, of any kind: that of the inputs the model expects."""
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)


def dtype_of(*models: nn.Module) -> torch.dtype:
    """The type of the first real parameter or buffer of the first model that has one."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


class Shifted(nn.Module):
    """A convolution of shifted inputs, where the zeros that pad were not shifted.

    The shift's share of the output is the same for all examples: one convolution of ones, padded
    like the input, by the weights of a single input channel.

    Args:
        conv: torch's convolution or transposed convolution, padded by zeros.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv: Any = conv
        weight: Any = self.conv.weight
        outputs, kernel = self.conv.out_channels, weight.shape[2:]
        shape = (1, outputs, *kernel) if self.conv.transposed else (outputs, 1, *kernel)
        self.border: Tensor
        self.register_buffer("border", weight.new_zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``, and add what the shift contributes."""
        out: Tensor = self.conv(x)
        return out + share_of_shift(self.conv, x.new_ones(1, 1, *x.shape[2:]), self.border)


def share_of_shift(conv: Any, ones: Tensor, border: Tensor) -> Tensor:
    """What a shift of its input contributes to a convolution's output.

    Args:
        conv: torch's convolution or transposed convolution.
        ones: (1, 1, *S), in place of an example.
        border: weights of one input channel that stands for all, (O, 1, *K) or (1, O, *K).

    Returns:
        (1, O, *S').
    """
    kind = f"conv{'_transpose' if conv.transposed else ''}{ones.ndim - 2}d"
    more = (conv.output_padding, 1, conv.dilation) if conv.transposed else (conv.dilation, 1)
    call: Any = getattr(torch.nn.functional, kind)
    share: Tensor = call(ones, border, None, conv.stride, conv.padding, *more)
    return share


class Function(nn.Module):
    """A function of one tensor by its name in torch.nn.functional or torch.

    Args:
        name: as "relu".
        args: what follows the tensor.
        kwargs: likewise, by name.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.args, self.kwargs = name, args, kwargs
        self._call: Any = getattr(torch.nn.functional, name, None) or getattr(torch, name)

    def forward(self, x: Tensor) -> Tensor:
        """Call it on ``x``."""
        out: Tensor = self._call(x, *self.args, **self.kwargs)
        return out

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return self.name


class Remainder(nn.Module):
    """What a norm's subclass does after normalizing: activation, dropout, residual sum.

    Args:
        steps: modules of one tensor, in order.
        activation: of TrueNorm's layers, after the residual.
    """

    def __init__(self, steps: list[nn.Module], activation: str | None = None) -> None:
        super().__init__()
        self.steps, self.activation = nn.Sequential(*steps), activation

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Go on from the normalized ``input``."""
        if residual is not None:
            input = input + residual
        out: Tensor = self.steps(input)
        return out if self.activation is None else ACTIVATIONS[self.activation](out)
