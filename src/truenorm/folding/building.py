"""A copy of the model with some of the plan carried out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from truenorm.folding.affine import Affine, rounded
from truenorm.folding.modules import RawInput, ScaleShift, Shifted
from truenorm.folding.plan import ChangeSet, Destination
from truenorm.folding.refold import refold
from truenorm.folding.subject import INPUT, Subject


def plan_of(subject: Subject, parts: Iterable[ChangeSet]) -> dict[str, Any]:
    """The structure of a folded model, in plain values."""
    norms: dict[str, list[Any]] = {}
    biases, shifted, raw = [], [], None
    scaling = subject.scaling
    folded = False
    for part in parts:
        for name, (_, form) in part.norms.items():
            if name == INPUT:
                folded = True
                continue
            norm = subject.norms[name]
            if norm.scales_input:
                norms[name] = ["cast"]
                continue
            kind = "scale and shift" if form == "scale and shift" else "gone"
            norms[name] = [kind, norm.after, norm.activation]
        for destination in part.destinations:
            made = destination.folded()
            if destination.weights.bias is None and made.bias is not None:
                biases.append(destination.weights.owner)
            if made.border is not None:
                shifted.append(destination.weights.owner)
    if scaling is not None:
        raw = [None, None] if folded else list(scaling.to_json().values())
    return {"norms": norms, "biases": biases, "shifted": shifted, "raw": raw}


def built(subject: Subject, parts: list[ChangeSet], dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model with ``parts`` folded; in ``dtype`` if one is given."""
    plan = plan_of(subject, parts)
    model = copy.deepcopy(subject.model)
    if dtype is not None:
        model = model.to(dtype)
    destinations = [destination for part in parts for destination in part.destinations]
    weights = {t.weights.weight: model.get_submodule(t.weights.owner) for t in destinations}
    model = refold(model, plan)
    inner = model.model if isinstance(model, RawInput) else model
    with torch.no_grad():
        for destination in destinations:
            _write(inner, destination, weights[destination.weights.weight])
        for part in parts:
            for name, affine in part.alone.items():
                fill(_scale_shift(inner.get_submodule(name)), affine)
    return model


def _write(model: nn.Module, destination: Destination, owner: nn.Module) -> None:
    made, weights = destination.folded(), destination.weights
    attribute = weights.weight.rpartition(".")[2]
    weight = getattr(owner, attribute)
    weight.data.copy_(rounded(made.weight, weight.dtype))
    if made.bias is not None:
        name = "bias" if weights.bias is None else weights.bias.rpartition(".")[2]
        bias = getattr(owner, name)
        bias.data.copy_(rounded(made.bias, bias.dtype))
    if made.border is not None:
        around = model.get_submodule(weights.owner)
        assert isinstance(around, Shifted)
        around.border.copy_(rounded(made.border, around.border.dtype))


def fill(there: ScaleShift, affine: Affine) -> None:
    """Write a map's numbers, rounded once."""
    there.scale.copy_(rounded(affine.scale, there.scale.dtype))
    there.shift.copy_(rounded(affine.shift, there.shift.dtype))


def _scale_shift(remnant: nn.Module) -> ScaleShift:
    return next(m for m in remnant.modules() if isinstance(m, ScaleShift))
