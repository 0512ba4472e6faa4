"""What a trained model does on data: loss, accuracy, confusion, worst errors, norms seen at work.

Everything runs in eval mode, so running statistics are used and none is written; the mode
of every module is given back.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.calling.borrowing import evaluating
from truenorm.data.batches import in_order
from truenorm.data.datasets import Dataset, Scaling
from truenorm.errors import InputError


class Scores(NamedTuple):
    """Mean cross entropy (nats) and accuracy (0 to 1) over examples, by their weights."""

    loss: float
    accuracy: float


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast on ``device``, or nothing."""
    if not enabled:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def logits_of(
    model: nn.Module, data: Dataset, scaling: Scaling, device: torch.device, *, amp: bool = False
) -> Tensor:
    """The model's logits (N, K) on the CPU, in at least float32, for all examples in order."""
    with evaluating(model), autocast(device, amp):
        return torch.cat([wide(model(b.x)).cpu() for b in in_order(data, scaling, device)])


def wide(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, in which a loss is exact enough; others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def score(logits: Tensor, data: Dataset) -> Scores:
    """Scores of ``logits`` (N, K). Every example counts by its weight, whatever its batch.

    Raises:
        InputError: the logits do not have one column per class.
    """
    if logits.ndim != 2 or logits.shape[1] < len(data.classes):
        raise InputError(
            f"the model must give (N, {len(data.classes)}) logits, one per class, got shape "
            f"{tuple(logits.shape)}."
        )
    right = (logits.argmax(1) == data.y).double()
    if data.weight is None:
        return Scores(F.cross_entropy(logits, data.y).item(), right.mean().item())
    losses = F.cross_entropy(logits, data.y, reduction="none").double()
    share = data.weight.double() / data.weight.double().sum()
    return Scores((losses * share).sum().item(), (right * share).sum().item())
