"""The structure of a folded model: which modules stand where norms stood.

Plain values describe it, so that it can be stored, and given to a freshly built model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.folding.modules import (
    Cast,
    Function,
    Gone,
    RawInput,
    Remainder,
    ScaleShift,
    Shifted,
    dtype_of,
)


def refold(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built ``model`` the structure of a folded one, whose state dict then fits.

    Args:
        model: as it was before folding; changed in place.
        plan: ``Folded.plan``.
    """
    for name in plan["biases"]:
        owner = model.get_submodule(name)
        weight = owner.weight
        assert isinstance(weight, nn.Parameter)
        transposed = getattr(owner, "transposed", False)
        outputs = owner.out_channels if transposed else weight.shape[0]
        bias = weight.new_zeros(outputs)  # type: ignore[arg-type]
        owner.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    dtype = dtype_of(model)
    for name, (kind, *more) in plan["norms"].items():
        there = Cast(dtype) if kind == "cast" else remnant(model.get_submodule(name), kind, *more)
        model = put(model, name, there)
    for name in plan["shifted"]:
        model = put(model, name, Shifted(model.get_submodule(name)))
    if plan["raw"] is None:
        return model
    shift, scale = plan["raw"]
    return in_mode_of(model, RawInput(model, _tensor(shift), _tensor(scale)))


def remnant(module: nn.Module, kind: str, steps: list[Any], activation: str | None) -> nn.Module:
    """What stands in a norm's place: nothing, or a scale and shift, and what it did after.

    ``activation`` is None for none; for TrueNorm's layers "" says that they add a residual.
    """
    made: list[nn.Module] = []
    if kind == "scale and shift":
        made.append(ScaleShift(module.running_mean))  # type: ignore[arg-type]
    for what, first, *more in steps:
        made.append(module.get_submodule(first) if what == "child" else Function(first, *more))
    if activation is not None:
        return Remainder(made, activation or None)
    if not made:
        return Gone()
    return made[0] if len(made) == 1 else nn.Sequential(*made)


def in_mode_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with those of its modules that are not of ``old`` in the mode of ``old``."""
    kept = set(old.modules())
    for module in new.modules():
        if module not in kept:
            module.training = old.training
    return new


def put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of a module, in all its places; return the model."""
    old = model.get_submodule(name)
    new = in_mode_of(old, new)
    if old is model:
        return new
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[key] = new
    return model


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values)
