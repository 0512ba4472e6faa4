"""Whether weights are still what an initialization drew: then nothing has been trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
# The largest of n uniform numbers is below 1 - 7 / n of their bound in one of a thousand draws.
UNIFORM_ENTRIES, UNIFORM_EDGE = 200, 7.0
# The deviation of n normal numbers is known to 1 / sqrt(2 n): at 2000 and 4 errors, to 6 %.
NORMAL_ENTRIES, NORMAL_ERRORS = 2000, 4.0
_USUAL = (0.02, 0.01, 0.001)  # deviations of heads and transformers
MOST_DRAWN = 0.5  # of the layers by which it can be told


def mostly_drawn(model: nn.Module) -> bool:
    """Whether most linear and convolution layers are as an initialization leaves them.

    That is: a bias that learns is one constant; or the weights fill the range of torch's default,
    Kaiming's or Xavier's uniform numbers to its edge and not beyond; or they have the deviation of
    the normal ones. A step of training moves all of that.
    """
    told = [_drawn(m) for m in model.modules() if isinstance(m, _LAYERS)]
    known = [drawn for drawn in told if drawn is not None]
    return sum(known) > MOST_DRAWN * len(known)


@torch.no_grad()
def _drawn(layer: nn.Module) -> bool | None:
    """Whether a layer is; None if it is too small to tell."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    if isinstance(bias, nn.Parameter) and bias.requires_grad and _constant(bias):
        return True
    if nn.parameter.is_lazy(weight) or weight.ndim < 2 or weight.numel() < UNIFORM_ENTRIES:
        return None
    fans, number = _fans(layer, weight), weight.numel()
    largest = float(weight.abs().max())
    bounds = [math.sqrt(k / fan) for fan in fans for k in (1, 3, 6)]
    if any(bound * (1 - UNIFORM_EDGE / number) <= largest <= bound * 1.0001 for bound in bounds):
        return True
    if number < NORMAL_ENTRIES:
        return False  # normal numbers, or trained ones
    spread, error = float(weight.double().std()), NORMAL_ERRORS / math.sqrt(2 * number)
    usual = [*_USUAL, *(math.sqrt(k / fan) for fan in fans for k in (1, 2))]
    return any(abs(spread / each - 1) <= error for each in usual)


def _constant(bias: Tensor) -> bool:
    return not nn.parameter.is_lazy(bias) and bias.numel() > 1 and bool((bias == bias[0]).all())


def _fans(layer: nn.Module, weight: Tensor) -> set[float]:
    """Inputs and outputs of a unit, their mean, and outputs of a group alone."""
    into, out = nn.init._calculate_fan_in_and_fan_out(weight)
    groups = getattr(layer, "groups", 1)
    return {float(fan) for fan in (into, out, (into + out) / 2, out / groups) if fan}
