"""What a trained model is worth, beyond one score: confusions, mistakes, its norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from truenorm.calling.borrowing import evaluating
from truenorm.data.batches import in_order
from truenorm.data.datasets import Dataset, Scaling, Splits
from truenorm.layers.norms import NORMS
from truenorm.training.evaluate import Scores, logits_of, score
from truenorm.training.metrics import ClassScores


def confusion(logits: Tensor, data: Dataset) -> Tensor:
    """(K, K) counts: row the true class, column the predicted one."""
    classes = len(data.classes)
    cells = data.y * classes + logits.argmax(1)
    return torch.bincount(cells, minlength=classes**2)[: classes**2].view(classes, classes)


class Mistake(NamedTuple):
    """One misclassified example."""

    number: int  # its place in the data
    name: str  # its file, its id, or its row in the source
    true: int
    predicted: int
    confidence: float  # probability given to the wrong class


def worst(logits: Tensor, data: Dataset, most: int = 24) -> list[Mistake]:
    """The misclassified examples whose true class got the least probability, worst first."""
    probabilities = logits.softmax(1)
    predicted = logits.argmax(1)
    of_true = probabilities.gather(1, data.y[:, None]).squeeze(1)
    wrong = (predicted != data.y).nonzero().squeeze(1)
    order = wrong[of_true[wrong].argsort()][:most]
    return [
        Mistake(
            i,
            data.name_of(i),
            int(data.y[i]),
            int(predicted[i]),
            float(probabilities[i, int(predicted[i])]),
        )
        for i in order.tolist()
    ]


class Histogram(NamedTuple):
    """Counts in equal bins between ``low`` and ``high``."""

    counts: list[int]
    low: float
    high: float


@dataclass(frozen=True)
class NormView:
    """One normalization at work on a batch in eval mode, and what it has learned.

    Attributes:
        name: its dotted name in the model.
        kind: its class.
        before, after: distributions of its input and output values.
        running_mean, running_var: (C,) running statistics, where it keeps them.
        weight, bias: (C,) gamma and beta, where it has them.
    """

    name: str
    kind: str
    before: Histogram
    after: Histogram
    running_mean: list[float] | None
    running_var: list[float] | None
    weight: list[float] | None
    bias: list[float] | None


@torch.no_grad()
def view_norms(
    model: nn.Module, data: Dataset, scaling: Scaling, device: torch.device
) -> list[NormView]:
    """Look at every normalization while the first 1,024 examples pass through."""
    seen: dict[str, tuple[Histogram, Histogram]] = {}
    handles = []
    norms = {n: m for n, m in model.named_modules() if isinstance(m, NORMS)}
    for name, module in norms.items():

        def look(_: nn.Module, x: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            seen[name] = (_histogram(x[0]), _histogram(y))

        handles.append(module.register_forward_hook(look))
    try:
        with evaluating(model):
            model(next(in_order(data, scaling, device)).x)
    finally:
        for handle in handles:
            handle.remove()
    learned = ("running_mean", "running_var", "weight", "bias")
    return [
        NormView(
            name,
            type(module).__name__.lstrip("_"),
            *seen[name],
            *(_values(getattr(module, field, None)) for field in learned),
        )
        for name, module in norms.items()
        if name in seen
    ]


@dataclass(frozen=True)
class Judgement:
    """What a trained model does on held-out data.

    Attributes:
        part: which part of the data was judged: "test", or "validation" if there is no test.
        data: its examples.
        scores: loss and accuracy.
        confusion: (K, K) counts, row true, column predicted.
        by_class: what the confusion says of each class.
        mistakes: the worst misclassified examples.
        norms: every normalization at work.
    """

    part: str
    data: Dataset
    scores: Scores
    confusion: Tensor
    by_class: ClassScores
    mistakes: list[Mistake]
    norms: list[NormView]


def judge(model: nn.Module, splits: Splits) -> Judgement:
    """Judge ``model``, where it lies, on the test part, in float32."""
    part, data = ("validation", splits.valid) if splits.test is None else ("test", splits.test)
    device = next(model.parameters()).device
    logits = logits_of(model, data, splits.scaling, device)
    confused = confusion(logits, data)
    return Judgement(
        part,
        data,
        score(logits, data),
        confused,
        ClassScores.from_confusion(confused),
        worst(logits, data),
        view_norms(model, data, splits.scaling, device),
    )


def _histogram(x: Tensor, bins: int = 60) -> Histogram:
    flat = x.detach().float().flatten().cpu()
    flat = flat[torch.isfinite(flat)]
    if not len(flat):
        return Histogram([0] * bins, 0.0, 1.0)
    low, high = flat.min().item(), flat.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Histogram([int(c) for c in torch.histc(flat, bins, low, high)], low, high)


def _values(tensor: Tensor | None) -> list[float] | None:
    return None if tensor is None else [float(v) for v in tensor.detach().flatten().cpu()]
