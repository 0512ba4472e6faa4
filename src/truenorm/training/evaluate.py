"""What a trained model does on data: loss, accuracy, confusion, worst errors, norms seen at work.

Everything runs in eval mode, so running statistics are used and none is written; the mode
of every module is given back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.calling.borrowing import evaluating
from truenorm.calling.call import IGNORED, Loss, accuracy_of, classifies, entry, output_of
from truenorm.calling.nested import tensors_in
from truenorm.data.batches import in_order
from truenorm.data.datasets import Dataset, Scaling
from truenorm.errors import InputError
from truenorm.training.class_weight import weighted


class Scores(NamedTuple):
    """Mean loss (cross entropy in nats, or another) and accuracy (0 to 1), by example weights.

    The accuracy is NaN where outputs and targets are those of no classification.
    """

    loss: float
    accuracy: float


class AnyBatch(Protocol):
    """A batch of any kind: it runs a model, and has targets, weights or None, and a size."""

    @property
    def y(self) -> Any: ...
    @property
    def weight(self) -> Tensor | None: ...
    @property
    def examples(self) -> int: ...
    def run(self, model: nn.Module) -> Any: ...


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
        outputs = (logits_in(model(b.x)) for b in in_order(data, scaling, device))
        return torch.cat([wide(logits).cpu() for logits in outputs])


def logits_in(output: Any) -> Tensor:
    """The logits in what a model returned.

    A tensor is itself; a dict, ModelOutput or other object has them as ``logits`` or ``out``, or
    as its only tensor; of a tuple or list they are the first tensor.

    Raises:
        InputError: there is none such; the text says what was returned.
    """
    if isinstance(output, Tensor):
        return output
    found = output_of(output)
    if found is None:
        tensors = list(tensors_in(output))
        found = tensors[0] if len(tensors) == 1 else None
    if found is None:
        raise InputError(
            f"the model returned {_described(output)}, in which no logits can be told; return a "
            "tensor, or name it 'logits', or give a loss= that takes what is returned."
        )
    return found


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"{kind} with {', '.join(map(repr, output)) or 'nothing'}"
    return kind


def own_loss(output: Any, batch: AnyBatch, loss: Loss | None) -> Tensor | None:
    """The batch's mean loss by the user's function, or else the one that the output holds.

    None if there is neither, so that cross entropy is to be taken.

    Raises:
        InputError: ``loss`` returned no tensor, or a mean where examples have weights.
    """
    value = entry(output, "loss") if loss is None else loss(output, batch.y)
    if value is None and loss is None:
        return None
    if not isinstance(value, Tensor):
        raise InputError(
            "loss= must return a tensor, the mean loss or one for each example, got "
            f"{type(value).__name__}."
        )
    if batch.weight is None:
        return value.mean()
    if not value.ndim or len(value) != len(batch.weight):
        raise InputError(
            "examples have weights, so loss= must return one loss for each, got shape "
            f"{tuple(value.shape)}; use reduction='none'."
        )
    each = value.flatten(1).mean(1) if value.ndim > 1 else value
    # A batch may hold only examples of weight zero; it then has no loss.
    return (each * batch.weight).sum() / batch.weight.sum().clamp_min(1e-12)


def class_logits(output: Any, batch: AnyBatch) -> Tensor:
    """Logits (N, K, *S) in at least float32, for which the batch's targets are class numbers.

    Raises:
        InputError: outputs and targets are those of no classification, so cross entropy is
            undefined.
    """
    logits = wide(logits_in(output))
    if not classifies(logits, batch.y):
        raise InputError(
            f"the model gives {_kind(logits)} for targets {_kind(batch.y)}; cross entropy needs "
            "logits (N, K) and class numbers (N,), int64. Give batches (x, y), or dicts with "
            "'labels', or another loss, like loss=torch.nn.BCEWithLogitsLoss()."
        )
    counted = batch.y[batch.y != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[1]:
        low, high = int(counted.min()), int(counted.max())
        raise InputError(
            f"targets must be class numbers from 0 to {logits.shape[1] - 1}, as many as the model "
            f"has logits, got {low} to {high}."
        )
    return logits


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "that are missing" if value is None else type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


@torch.no_grad()
def scored(
    model: nn.Module,
    batches: Iterable[AnyBatch],
    device: torch.device,
    *,
    loss: Loss | None = None,
    amp: bool = False,
) -> Scores:
    """Scores of ``model`` on ``batches``, one after another, by any loss.

    Raises:
        InputError: there is no batch, or the loss cannot be taken of what the model returns.
    """
    total = losses = accuracies = 0.0
    with evaluating(model), autocast(device, amp):
        for batch in batches:
            output = batch.run(model)
            value, out = own_loss(output, batch, loss), output_of(output)
            if value is None:
                out = class_logits(output, batch)
                value = _cross_entropy(out, batch)
            share = share_of(batch)
            total += share
            losses += share * float(value)
            accuracies += share * _accuracy(out, batch)
    if not total:
        raise InputError("there is no example to judge the model by; give data that are not empty.")
    return Scores(losses / total, accuracies / total)


def share_of(batch: AnyBatch) -> float:
    """The batch's weight in a mean over batches."""
    return batch.examples if batch.weight is None else float(batch.weight.sum())


def _cross_entropy(logits: Tensor, batch: AnyBatch) -> Tensor:
    if batch.weight is None:
        return F.cross_entropy(logits, batch.y.long())
    losses = F.cross_entropy(logits, batch.y.long(), reduction="none")
    return (losses * batch.weight).sum() / batch.weight.sum().clamp_min(1e-12)


def _accuracy(out: Tensor | None, batch: AnyBatch) -> float:
    if batch.weight is None or not classifies(out, batch.y):
        found = accuracy_of(out, batch.y)
        return math.nan if found is None else found
    assert out is not None, "what classifies is there"
    right = (out.argmax(1) == batch.y).double()
    return float((right * batch.weight).sum() / batch.weight.sum().clamp_min(1e-12))


def wide(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, in which a loss is exact enough; others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_classes(logits: Tensor, data: Dataset) -> None:
    """Refuse ``logits`` that are not (N, K) with a column for each class of ``data``.

    Raises:
        InputError: they are not.
    """
    if logits.ndim != 2 or logits.shape[1] < len(data.classes):
        raise InputError(
            f"the model must give (N, {len(data.classes)}) logits, one per class, got shape "
            f"{tuple(logits.shape)}."
        )


def score(logits: Tensor, data: Dataset, class_weights: Tensor | None = None) -> Scores:
    """Scores of ``logits`` (N, K). Every example counts by its weight, whatever its batch.

    With ``class_weights`` (K,) it counts in the loss by its class's weight, too.

    Raises:
        InputError: the logits do not have one column per class.
    """
    check_classes(logits, data)
    right = (logits.argmax(1) == data.y).double()
    weights = weighted(data, class_weights).weight
    if weights is None:
        return Scores(F.cross_entropy(logits, data.y).item(), right.mean().item())
    losses = F.cross_entropy(logits, data.y, reduction="none").double()
    return Scores(_mean(losses, weights), _mean(right, data.weight))


def _mean(values: Tensor, weights: Tensor | None) -> float:
    if weights is None:
        return values.mean().item()
    wide = weights.double()
    return (values * wide).sum().item() / wide.sum().item()
