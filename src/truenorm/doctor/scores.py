"""What a model makes of each example by itself: its loss, and whether it is right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from truenorm.calling import call as calling
from truenorm.calling.nested import part_of

MOST_ASKED = 64  # examples of a batch, for each of which a loss that was given is asked
_SAME = 1e-3  # how far the mean over examples may be from the loss of the batch, relative


def losses_of(output: Any, target: Any, examples: int, loss: calling.Loss | None) -> Tensor | None:
    """The loss of each example, (N,) in float64; None where the batch's is no mean of such."""
    whole = calling.loss_of(output, target, loss)
    if whole is None or (loss is None and calling.loss_of(output, None) is not None):
        return None
    each = _asked(output, target, examples, loss) if loss is not None else _known(output, target)
    if each is None or not abs(float(each.mean()) - whole) <= _SAME * (abs(whole) + _SAME):
        return None
    return each


def rights_of(output: Any, target: Any) -> Tensor | None:
    """The share of each example's targets that have the largest logit, (N,); None if unknown."""
    out = calling.output_of(output)
    if out is None or not calling.classifies(out, target):
        return None
    right: Tensor = (out.argmax(1) == target).double().reshape(len(out), -1)
    return right.mean(1).cpu()


def _known(output: Any, target: Any) -> Tensor | None:
    """Of cross entropy or mean squares, as :func:`truenorm.calling.call.loss_of` takes them."""
    out = calling.output_of(output)
    assert out is not None
    if calling.classifies(out, target):
        each = F.cross_entropy(out.detach().float(), target.long(), reduction="none")
    else:
        each = (out.detach().double() - target).square()
    found: Tensor = each.double().reshape(len(each), -1).mean(1)
    return found.cpu()


def _asked(output: Any, target: Any, examples: int, loss: calling.Loss) -> Tensor | None:
    if not 1 < examples <= MOST_ASKED:
        return None
    try:
        parts = (
            (part_of(output, slice(i, i + 1), examples), part_of(target, slice(i, i + 1), examples))
            for i in range(examples)
        )
        values = [calling.loss_of(*part, loss) for part in parts]
    except Exception:  # a loss may need the batch whole
        return None
    return None if None in values else torch.tensor(values, dtype=torch.float64)
