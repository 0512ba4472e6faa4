"""What mends a layer: tried on a copy before it is offered, so that no advice leads nowhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.doctor.facts import Facts, NormFacts
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.conversion import Target, convert, converted
from truenorm.layers.settling import why_kept


class Remedy(NamedTuple):
    """What can be done about a finding; both None: what the check itself advises.

    Attributes:
        fix: does it; None if it would do nothing.
        advice: what to do where the check's own advice does not serve.
    """

    fix: Callable[[], Any] | None
    advice: str | None = None


def converting(layer: nn.Module, to: Target, otherwise: str) -> Remedy:
    """``truenorm.convert(layer, to=to)``, if that does not leave the layer as it is.

    Args:
        layer: the norm to mend.
        to: target of the conversion.
        otherwise: the advice where conversion leaves the layer.
    """
    why = _why_left(layer, to)
    if why is None:
        return Remedy(lambda: convert(layer, to=to))
    return Remedy(None, f"truenorm.convert leaves this layer: {why}. {otherwise}")


def _why_left(layer: nn.Module, to: Target) -> str | None:
    """Why a copy of ``layer`` is left by the conversion; None if it is not, or cannot be copied."""
    bare = type(layer).__new__(type(layer))
    hooks = {k for k, v in vars(layer).items() if "_hooks" in k and isinstance(v, dict)}
    # Without them: they may belong to objects of any size.
    vars(bare).update({k: type(v)() if k in hooks else v for k, v in vars(layer).items()})
    try:
        trial = copy.deepcopy(bare)
    except Exception:  # of what a user put into it
        return None
    rows = [row for row in converted(trial, to=to).rows if not row.layer]
    if not rows:
        return "it is no norm of torch's"
    return None if rows[0].changed else rows[0].note


def unfreezing(facts: Facts, norm: NormFacts) -> str | None:
    """What recalibration wants first of a layer that it would leave; None where it takes it."""
    module = norm.module
    if norm.foreign:
        return (
            "Load its statistics again: it is frozen by its class, and truenorm.recalibrate takes "
            "batch norms alone."
        )
    if norm.tracked is None or not isinstance(module, _BatchNorm):
        return None
    learns = any(p.requires_grad for p in facts.model.parameters())
    why = why_kept(module, training=facts.model.training, learns=learns)
    if not why:
        return None
    first = "call its requires_grad_(True) first" if norm.learned[0] is not None else "train() it"
    if isinstance(module, BatchNorm) and module.options.frozen:
        first = f"truenorm.convert(model, to='unfrozen', where={norm.name!r}) first"
    return f"truenorm.recalibrate leaves this layer, which {why}: {first}, and freeze it again."
