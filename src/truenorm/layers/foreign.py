"""Norms of other packages, known by what they hold and not by their class.

torchvision, detectron2, timm and transformers each have a frozen batch norm of their own, and timm
has batch and group norms with the dropout and the activation inside. No package is imported to
tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

AFTER = ("drop", "act", "activation")  # children that come after normalizing, in their order
_HELD = ("weight", "bias", "running_mean", "running_var")


def frozen_statistics(module: nn.Module) -> bool:
    """Whether ``module`` is a frozen batch norm of another package.

    It is no batch norm of torch's, has no parameter of its own, and its buffers weight, bias,
    running_mean and running_var (C,) are vectors of one length: so in torchvision, detectron2,
    timm and transformers.
    """
    if isinstance(module, _BatchNorm) or any(True for _ in module.parameters(recurse=False)):
        return False
    own = dict(module.named_buffers(recurse=False))
    shapes = {own[name].shape if name in own else torch.Size() for name in _HELD}
    return len(shapes) == 1 and len(shapes.pop()) == 1


def fused(module: nn.Module) -> tuple[str, ...]:
    """Names of the children that a norm applies after normalizing, in their order.

    () for what is neither a batch norm, nor a group norm, nor a frozen norm, and for a norm that
    has other children, too: what such a one does is not known. timm's ``BatchNormAct2d`` has
    ("drop", "act").
    """
    if not (isinstance(module, (_BatchNorm, nn.GroupNorm)) or frozen_statistics(module)):
        return ()
    children = dict(module._modules.items())
    if any(name not in AFTER for name in children):
        return ()
    return tuple(name for name in AFTER if children.get(name) is not None)


def epsilon(module: nn.Module) -> float:
    """What a norm, whoever made it, adds to the variance.

    Read past the class, whose attribute may refuse; measured where it is a number in the forward
    of a frozen norm, as in transformers.
    """
    own = vars(module)
    if "eps" not in own and frozen_statistics(module):
        return _measured(module)
    if "eps" not in own:
        return float(module.eps)  # type: ignore[arg-type]  # an attribute of its class
    eps: float = own["eps"]
    return eps


def _measured(module: nn.Module) -> float:
    """The eps of a frozen norm: with mean 0 and variance 0, y = 1 / sqrt(eps) for x = 1."""
    zeros, ones = (made(1, dtype=torch.float64, device="cpu") for made in (torch.zeros, torch.ones))
    bare = stand_in(module, dict(zip(_HELD, (ones, zeros, zeros, zeros), strict=True)), {})
    y = bare.forward(torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu"))
    return float(f"{1 / y.item() ** 2:.12g}")  # 1e-05, not 1.0000000000000003e-05


def stand_in(module: nn.Module, buffers: dict[str, Tensor], children: dict[str, Any]) -> nn.Module:
    """A shallow copy of ``module`` with other buffers and children, and none of its hooks.

    Children that are not given do nothing. ``module`` and its tensors are not touched.
    """
    bare = type(module).__new__(type(module))
    own = {
        "_buffers": {**module._buffers, **buffers},
        "_modules": {name: children.get(name, nn.Identity()) for name in module._modules},
    }
    vars(bare).update({**vars(module), **own})
    return bare
