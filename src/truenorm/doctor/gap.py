"""The gap between running and exact statistics, measured in loss and shared out to layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from truenorm.calling import tensors_in
from truenorm.doctor.checks import Found, NotApplicable
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.recalibration import recalibrate

# A fifth of the loss, and never less than 0.05 nats: below it accuracy hardly moves.
GAP_SHARE, GAP_LEAST = 0.2, 0.05
GAP_SEVERE = 0.5  # nats; a right answer's probability falls by 40 %
ACCURACY_SEVERE = 0.05
# Where no loss tells, or it does not suffer: answers that differ by half of their size.
OUTPUT_GAP = 0.5


@dataclass
class _Statistics:
    """Running mean and variance of a layer, as held and as they should be."""

    norm: NormFacts
    held: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]

    def put(self, which: tuple[Tensor, Tensor]) -> None:
        mean, var, _ = self.norm.tracked  # type: ignore[misc]
        mean.data.copy_(which[0])
        var.data.copy_(which[1])

    @property
    def variance_ratio(self) -> float:
        """The median channel's exact variance over the one that is held."""
        return float((self.exact[1] / self.held[1].clamp(min=1e-12)).median())

    @property
    def shift(self) -> float:
        """The worst channel's distance of means, in exact standard deviations."""
        std = (self.exact[1] + self.norm.eps).sqrt()
        return float(((self.exact[0] - self.held[0]).abs() / std).max())


def train_eval_gap(facts: Facts) -> Iterator[Found]:
    """Running statistics that do not fit the data, and the layers that carry the harm."""
    norms = [n for n in facts.batch_norms if n.tracked is not None and n.seen]
    if not norms:
        raise NotApplicable("no batch norm with running statistics was called")
    if facts.untrained:
        raise NotApplicable("the model has not been trained: its statistics are the initial ones")
    held_now = [statistic for n in norms for statistic in (n.tracked or ())[:2]]
    if not all(bool(torch.isfinite(statistic).all()) for statistic in held_now):
        raise NotApplicable("statistics that are not finite hide the gap; see TN102")
    assert facts.flow is not None
    order = {call.module: i for i, call in reversed(list(enumerate(facts.flow.calls)))}
    norms.sort(key=lambda norm: order.get(norm.name, len(order)))
    layers = _exact(facts, norms)
    for layer in layers:
        layer.put(layer.exact)
    exact, answers = facts.outcome(), _answers(facts)
    for layer in layers:
        layer.put(layer.held)
    held = facts.outcome()
    best, now = exact.loss, held.loss
    by_loss = (
        best is not None
        and now is not None
        and not now - best <= GAP_SHARE * abs(best) + GAP_LEAST  # a loss may be negative
    )

    def harm() -> float:
        """Loss, or where it does not suffer the relative distance from the exact answers."""
        if by_loss:
            return facts.outcome().loss or 0.0
        return _distance(_answers(facts), answers)

    if by_loss:
        gap = (now or 0.0) - (best or 0.0)
    else:
        gap = now = _distance(_answers(facts), answers)
        if not gap > OUTPUT_GAP:
            return
    shares = _shares(layers, harm, gap)
    worst = max(shares, key=lambda row: row[1])[0]
    drop = (exact.accuracy or 0.0) - (held.accuracy or 0.0)
    severe = (by_loss and not gap <= GAP_SEVERE) or drop > ACCURACY_SEVERE
    evidence: dict[str, object] = {
        "loss with running statistics" if by_loss else "distance of answers over their size": now,
    }
    if by_loss:
        evidence["loss with exact statistics"] = best
    if exact.accuracy is not None:
        evidence["accuracy with running statistics"] = held.accuracy
        evidence["accuracy with exact statistics"] = exact.accuracy
    for layer, share in sorted(shares, key=lambda row: -row[1])[:3]:
        evidence[f"share of {layer.norm.name or '(model)'}"] = share
    evidence["exact over running variance"] = worst.variance_ratio
    evidence["shift of the mean in standard deviations"] = worst.shift
    share = next(s for layer, s in shares if layer is worst)
    where = worst.norm.name or "(model)"
    cause = f"{min(share, 1):.0%} of the gap sits in {where}, whose {_told(worst)}"
    yield Found(
        worst.norm.name,
        "error" if severe else "warning",
        cause,
        evidence,
        lambda: _recalibrate(facts),
    )


def _told(layer: _Statistics) -> str:
    ratio = layer.variance_ratio
    if ratio > 1.5:
        return f"running variance is {ratio:.1f}x too small"
    if ratio < 1 / 1.5:
        return f"running variance is {1 / ratio:.1f}x too large"
    return f"running mean is off by {layer.shift:.1f} standard deviations"


def _exact(facts: Facts, norms: list[NormFacts]) -> list[_Statistics]:
    before = {n.name: (n.tracked[0].clone(), n.tracked[1].clone()) for n in norms}  # type: ignore[index]
    _recalibrate(facts)
    layers = []
    for norm in norms:
        mean, var, _ = norm.tracked  # type: ignore[misc]
        layers.append(_Statistics(norm, before[norm.name], (mean.clone(), var.clone())))
    return layers


def _recalibrate(facts: Facts) -> None:
    """On all of the data: without targets nothing is held out."""
    assert facts.call is not None
    bare = [SimpleNamespace(call=facts.call.prepare(batch)) for batch in facts.batches]
    recalibrate(facts.model, bare, arguments=lambda batch: (batch.call.args, batch.call.kwargs))


def _answers(facts: Facts) -> list[Tensor]:
    assert facts.call is not None
    with torch.no_grad():
        return [next(tensors_in(facts.call(batch)[0])).double() for batch in facts.batches]


def _distance(answers: list[Tensor], exact: list[Tensor]) -> float:
    apart = sum(float((a - b).square().sum()) for a, b in zip(answers, exact, strict=True))
    size = sum(float(b.square().sum()) for b in exact)
    return float((apart / size) ** 0.5) if size else 0.0


def _shares(
    layers: list[_Statistics], harm: Callable[[], float], gap: float
) -> list[tuple[_Statistics, float]]:
    """What each layer's exact statistics take off the harm, put in one after another."""
    shares, before = [], harm()
    for layer in layers:
        layer.put(layer.exact)
        after = harm()
        shares.append((layer, (before - after) / gap))
        before = after
    for layer in layers:
        layer.put(layer.held)
    return shares
