"""What running statistics do worse than exact ones, in loss, accuracy and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from truenorm.doctor.check import (
    NotApplicable,
    Severity,
)
from truenorm.doctor.checks.halves import Study
from truenorm.doctor.facts import Evaluation

# A fifth of the loss, and never less than 0.05 nats: below it accuracy hardly moves.
GAP_SHARE, GAP_LEAST = 0.2, 0.05
GAP_SEVERE = 0.5  # nats; a right answer's probability falls by 40 %
ACCURACY_SEVERE = 0.05
# Where no loss tells, or it does not suffer: answers that differ by half of their size, and by
# twice what the statistics of two halves of the data make them differ by.
OUTPUT_GAP, OUTPUT_NOISE = 0.5, 2.0
# Odds by chance, over the examples, below which a harm is believed: of one example in 64 that
# suffers they are a sixth.
CHANCE = 0.005


class Harm(NamedTuple):
    """What shows the harm, how severe it is, and what was measured."""

    by_loss: bool
    severity: Severity
    evidence: dict[str, Any]


def in_order_of(study: Study, evaluation: Evaluation) -> Evaluation:
    """The evaluation of batches 0, 1, ... in the order of the halves."""
    order = [number for half in study.halves for number, _ in half.parts]
    reordered = Evaluation(right=evaluation.right, judged=evaluation.judged)
    reordered.answers = [evaluation.answers[number] for number in order]
    reordered.lost = [evaluation.lost[number] for number in order]
    reordered.hit = [evaluation.hit[number] for number in order]
    reordered.losses, reordered.weights = evaluation.losses, evaluation.weights
    if len(evaluation.losses) == len(order):
        reordered.losses = [evaluation.losses[number] for number in order]
        reordered.weights = [evaluation.weights[number] for number in order]
    return reordered


def gaps_of(running: Evaluation, exact: Evaluation, *, by_loss: bool) -> list[float]:
    """What each batch contributes to the harm; the same for all where that is not known."""
    batches = len(running.answers)
    gaps: list[float] = []
    if by_loss and len(running.losses) == len(exact.losses) == batches:
        gaps = [a - b for a, b in zip(running.losses, exact.losses, strict=True)]
    elif not by_loss:
        pairs = zip(running.answers, exact.answers, strict=True)
        gaps = [distance_of([a], [b]) or 0.0 for a, b in pairs]
    gaps = [math.inf if math.isnan(gap) else gap for gap in gaps]
    return gaps or [0.0] * batches


def harm_of(study: Study, running: Evaluation, exact: Evaluation) -> Harm | None:
    """What the running statistics do worse than exact ones; None if nothing."""
    now, best = running.loss, exact.loss
    known = now is not None and best is not None
    if best is not None and not math.isfinite(best):
        raise NotApplicable(f"the loss is {best} with exact statistics, too")
    if not known and all(answers is None for answers in running.answers):
        raise NotApplicable("the model's output holds no loss, and no tensor with answers")
    evidence = measured_of(running, exact)
    drop = 0.0
    if running.accuracy is not None and exact.accuracy is not None:
        drop = exact.accuracy - running.accuracy
        drop = 0.0 if _by_chance(exact.hit, running.hit) else drop
    if now is not None and best is not None and not _by_chance(running.lost, exact.lost):
        gap = now - best
        if not gap <= GAP_SHARE * abs(best) + GAP_LEAST:  # so that NaN is one
            severe = not gap <= GAP_SEVERE or drop > ACCURACY_SEVERE
            return Harm(True, "error" if severe else "warning", evidence)
    distance = distance_of(running.answers, exact.answers)
    if distance is None:
        if known:
            return None
        raise NotApplicable("answers of other shapes with other statistics, and no loss")
    if math.isnan(distance):
        raise NotApplicable("the model's answers are not finite")
    if not distance > OUTPUT_GAP:
        return None
    noise = distance_of(exact.answers, study.swapped().judged(study.norms).answers)
    if noise is None or not distance > OUTPUT_NOISE * noise:
        return None
    evidence["distance of answers over their size"] = distance
    if drop > ACCURACY_SEVERE:
        return Harm(False, "error", evidence)
    return Harm(False, "note" if known else "warning", evidence)


def measured_of(running: Evaluation, exact: Evaluation) -> dict[str, Any]:
    """Loss and accuracy with either statistics, where they are known."""
    values = {"loss": (running.loss, exact.loss), "accuracy": (running.accuracy, exact.accuracy)}
    return {
        f"{name} with {which} statistics": value
        for name, pair in values.items()
        if None not in pair
        for which, value in zip(("running", "exact"), pair, strict=True)
    }


def _by_chance(more: Sequence[Tensor | None], less: Sequence[Tensor | None]) -> bool:
    """Whether ``more`` is above ``less`` by no more than the choice of the examples may bring.

    A paired test of Student's over the examples; False where they are not known one by one.
    """
    pairs = [(a, b) for a, b in zip(more, less, strict=True) if a is not None and b is not None]
    if not pairs or len(pairs) < len(more):
        return False
    apart = torch.cat([a - b for a, b in pairs])
    if len(apart) < 2 or not bool(torch.isfinite(apart).all()):
        return False
    error = float(apart.std()) / math.sqrt(len(apart))
    times = float(apart.mean()) / error if error else math.copysign(math.inf, float(apart.mean()))
    return float(stats.t.sf(times, len(apart) - 1)) > CHANCE


def distance_of(answers: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float | None:
    """Root mean square difference over the size of ``exact``; None if none can be compared."""
    apart = size = 0.0
    compared = False
    for a, b in zip(answers, exact, strict=True):
        if a is not None and b is not None and a.shape == b.shape:
            compared = True
            apart += float((a.double() - b.double()).square().sum())
            size += float(b.double().square().sum())
    if not compared:
        return None
    return math.sqrt(apart / size) if size else 0.0 if not apart else math.inf
