"""The data in halves, and exact statistics of each, which the other is judged with.

Exact statistics look better than they are on the very data they were taken from.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truenorm.calling.call import Call, Prepared
from truenorm.calling.nested import examples_of, part_of, tensors_in
from truenorm.doctor.check import NotApplicable
from truenorm.doctor.checks.misfit import Misfit, Statistics, misfit_of
from truenorm.doctor.facts import Evaluation, Facts, NormFacts
from truenorm.layers import settling

# Values per channel in half of the data. A mean of 32 is off by 0.18 standard deviations, a
# standard deviation by an eighth.
LEAST_VALUES = 32
# What one forward may join; 128 MB in float32.
MOST_JOINED = 2**25


class Half(NamedTuple):
    """Numbered batches, and the exact statistics of the OTHER half, which they are judged with."""

    parts: list[tuple[int, Any]]
    exact: dict[NormFacts, Statistics]


@dataclass
class Study:
    """The two halves of the data, and the layers whose statistics can be exchanged."""

    facts: Facts
    norms: list[NormFacts]  # in the order of the forward
    halves: tuple[Half, Half]
    running: dict[NormFacts, Statistics]

    def judged(self, mended: Collection[NormFacts]) -> Evaluation:
        """The data with exact statistics in ``mended``, running ones in the others."""
        each = not mended or len(mended) == len(self.norms)  # the two that are compared
        whole = Evaluation()
        try:
            for half in self.halves:
                for norm in self.norms:
                    _put(norm, half.exact[norm] if norm in mended else self.running[norm])
                part = self.facts.evaluate(half.parts, each=each)
                whole.losses += part.losses
                whole.weights += part.weights
                whole.right += part.right
                whole.judged += part.judged
                whole.answers += part.answers
                whole.lost += part.lost
                whole.hit += part.hit
        finally:
            for norm in self.norms:
                _put(norm, self.running[norm])
        return whole

    def swapped(self) -> Study:
        """The same with each half judged with the statistics of its own."""
        one, other = self.halves
        halves = (Half(one.parts, other.exact), Half(other.parts, one.exact))
        return Study(self.facts, self.norms, halves, self.running)

    def variance_ratio(self, norm: NormFacts) -> float:
        """The median channel's exact variance over the running one; eps added to both."""
        return float(self._ratios(norm).median())

    def worst_ratio(self, norm: NormFacts) -> tuple[int, float]:
        """The channel whose variance is off most, and its ratio."""
        ratios = self._ratios(norm)
        channel = int(ratios.log().abs().argmax())
        return channel, float(ratios[channel])

    def _ratios(self, norm: NormFacts) -> Tensor:
        running = (self.running[norm][1].double() + norm.eps).clamp(min=1e-30)
        return (torch.stack(self._of(norm, 1)).mean(0) + norm.eps).clamp(min=1e-30) / running

    def shift(self, norm: NormFacts) -> float:
        """The worst channel's distance of means, in exact standard deviations."""
        return float(self._shifts(norm).max())

    def usual_shift(self, norm: NormFacts) -> float:
        """The distance of means, in exact standard deviations; root mean square of the channels."""
        return float(self._shifts(norm).square().mean().sqrt())

    def suspicion(self, norm: NormFacts) -> float:
        """How far its statistics are off, over all channels: shifts and logarithms of ratios."""
        shift = self._shifts(norm)
        return float((shift.square() + self._ratios(norm).log().square()).mean())

    def _shifts(self, norm: NormFacts) -> Tensor:
        mean, var = (torch.stack(self._of(norm, i)).mean(0) for i in (0, 1))
        return (mean - self.running[norm][0].double()).abs() / (var + norm.eps).sqrt()

    def misfit(self, norm: NormFacts) -> Misfit:
        """How far its statistics are off, beyond chance."""
        one, other = (half.exact[norm] for half in self.halves)
        examples = sum(examples_of(batch) for batch in self.facts.batches)
        return misfit_of(norm, self.running[norm], (one, other), examples)

    def _of(self, norm: NormFacts, which: int) -> list[Tensor]:
        return [half.exact[norm][which].double() for half in self.halves]


def norms_of(facts: Facts) -> list[NormFacts]:
    """The batch norms that recalibration would change, in the order of the forward."""
    norms = [n for n in facts.batch_norms if n.tracked is not None and n.seen]
    if not norms:
        raise NotApplicable("no batch norm with running statistics was called")
    if facts.untrained:
        raise NotApplicable("the model has not been trained: its statistics are the initial ones")
    tracked = [statistic for n in norms for statistic in (n.tracked or ())[:2]]
    if not all(bool(torch.isfinite(statistic).all()) for statistic in tracked):
        raise NotApplicable("statistics that are not finite hide the gap; see TN102")
    free = set(settling.chosen(facts.model))
    norms = [norm for norm in norms if norm.module in free]
    if not norms:
        raise NotApplicable("every batch norm with running statistics is frozen")
    assert facts.flow is not None
    order = {call.module: i for i, call in reversed(list(enumerate(facts.flow.calls)))}
    return sorted(norms, key=lambda norm: order.get(norm.name, len(order)))


def halved(facts: Facts) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
    """Numbered batches in two halves; a single batch is cut by its examples.

    By the parity of the bits of a batch's number (Thue and Morse): two kinds of batches in turn
    come into both halves alike.
    """
    if len(facts.batches) > 1:
        halves: tuple[list[tuple[int, Any]], list[tuple[int, Any]]] = ([], [])
        for number, batch in enumerate(facts.batches):
            halves[number.bit_count() % 2].append((number, batch))
        return halves
    (batch,) = facts.batches
    examples = examples_of(batch)
    if examples < 2:
        raise NotApplicable("one example; exact statistics need others to be judged on")
    parts = [part_of(batch, slice(i, None, 2), examples) for i in (0, 1)]
    try:
        facts.evaluate(list(enumerate(parts)))
    except Exception as error:  # a model may need the batch whole
        why = f"a single batch, and half of it cannot be given to the model: {error}"
        raise NotApplicable(why) from None
    return [(0, parts[0])], [(1, parts[1])]


def fed(
    facts: Facts, norms: list[NormFacts], cut: tuple[list[tuple[int, Any]], ...]
) -> tuple[list[NormFacts], int]:
    """The layers that get enough values in each half, and the number of the others."""
    single = len(facts.batches) == 1

    def values(norm: NormFacts) -> float:
        if single:
            return sum(float(s.moments.count.max()) for s in norm.seen) / 2
        numbers = [{number for number, _ in half} for half in cut]
        return min(
            sum(float(s.moments.count.max()) for s in norm.seen if s.batch in half)
            for half in numbers
        )

    counts = {norm: values(norm) for norm in norms}
    enough = [norm for norm in norms if counts[norm] >= LEAST_VALUES]
    if not enough:
        least = max(counts.values())
        raise NotApplicable(
            f"too few data: half of them give a channel {least:.0f} values, exact statistics need "
            f"{LEAST_VALUES}"
        )
    return enough, len(norms) - len(enough)


def study_of(
    facts: Facts, norms: list[NormFacts], cut: tuple[list[tuple[int, Any]], list[tuple[int, Any]]]
) -> Study:
    """Take the exact statistics of each half, and put the running ones back."""
    running = {norm: _statistics(norm) for norm in norms}
    fits = []
    for half in cut:
        try:
            settle(facts, norms, [batch for _, batch in half])
            fits.append({norm: _statistics(norm) for norm in norms})
        finally:
            for norm in norms:
                _put(norm, running[norm])
    return Study(facts, norms, (Half(cut[0], fits[1]), Half(cut[1], fits[0])), running)


def settle(facts: Facts, norms: list[NormFacts], batches: list[Any]) -> None:
    """Exact statistics of all layers: in one pass where the batches can be joined to one."""
    assert facts.call is not None
    layers: Any = [norm.module for norm in norms]
    calls = [facts.call.prepare(batch) for batch in batches]
    call = Call(facts.inner, device=facts.call.device, arguments=lambda b: (b.args, b.kwargs))
    # A norm without statistics mixes what is joined.
    apart = any(norm.tracked is None for norm in facts.batch_norms)
    joined = None if apart else _joined(calls)
    # Objects that calling does not look into.
    every = [SimpleNamespace(args=c.args, kwargs=c.kwargs) for c in calls]
    if joined is not None:
        running = [_statistics(norm) for norm in norms]
        one = SimpleNamespace(args=joined.args, kwargs=joined.kwargs)
        try:
            settling.settle(call, layers, [one])
        except Exception:  # of a model that takes batches of one size, or is out of memory
            for norm, statistics in zip(norms, running, strict=True):
                _put(norm, statistics)
        else:
            return
    settling.settle(call, layers, every)


def _joined(calls: list[Prepared]) -> Prepared | None:
    """All batches as one, if they are of tensors with an entry for each example, and not too large.

    Anything else, as a number or None, must be the same in all.
    """
    if len(calls) == 1:
        return calls[0]
    if sum(t.numel() for c in calls for t in tensors_in((c.args, c.kwargs))) > MOST_JOINED:
        return None
    first = calls[0]
    if any(len(c.args) != len(first.args) or c.kwargs.keys() != first.kwargs.keys() for c in calls):
        return None
    sizes = [examples_of((c.args, c.kwargs)) for c in calls]
    args = [_concatenated([c.args[i] for c in calls], sizes) for i in range(len(first.args))]
    kwargs = {k: _concatenated([c.kwargs[k] for c in calls], sizes) for k in first.kwargs}
    if any(value is _APART for value in (*args, *kwargs.values())):
        return None
    return Prepared(tuple(args), kwargs)


_APART = object()


def _concatenated(values: list[Any], sizes: list[int]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        plain = first is None or isinstance(first, (bool, int, float, str))
        return first if plain and all(value == first for value in values) else _APART
    alike = all(
        isinstance(v, Tensor)
        and v.ndim
        and len(v) == n
        and v.shape[1:] == first.shape[1:]
        and v.dtype == first.dtype
        for v, n in zip(values, sizes, strict=True)
    )
    return torch.cat(values) if alike else _APART


def _statistics(norm: NormFacts) -> Statistics:
    mean, var, _ = norm.tracked  # type: ignore[misc]
    return mean.detach().clone(), var.detach().clone()


def _put(norm: NormFacts, which: Statistics) -> None:
    mean, var, _ = norm.tracked  # type: ignore[misc]
    mean.data.copy_(which[0])
    var.data.copy_(which[1])
