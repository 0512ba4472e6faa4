"""The gap between running and exact statistics, measured in loss and shared out to layers.

Exact statistics look better than they are on the very data they were taken from. So the data are
cut in halves, and each half is judged with the statistics of the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from truenorm.calling.call import Call, Prepared
from truenorm.calling.nested import examples_of, part_of, tensors_in
from truenorm.doctor.check import (
    SEVERITIES,
    Check,
    Found,
    NotApplicable,
    Severity,
    dropouts_before,
    flow_of,
)
from truenorm.doctor.checks.batches import calls_differ
from truenorm.doctor.checks.misfit import Misfit, Statistics, misfit_of
from truenorm.doctor.checks.records import pooled_moments
from truenorm.doctor.checks.remedies import Remedy
from truenorm.doctor.facts import Evaluation, Facts, NormFacts
from truenorm.doctor.ledger.book import Book
from truenorm.layers import recalibration, settling
from truenorm.layers.functional import Moments

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
# What the cause tells of: the variance from half as much again, else the mean, or one channel.
NAMED_RATIO, NAMED_SHIFT = 1.5, 0.5
# Values per channel in half of the data. A mean of 32 is off by 0.18 standard deviations, a
# standard deviation by an eighth.
LEAST_VALUES = 32
# What one forward may join; 128 MB in float32.
MOST_JOINED = 2**25
# To share the gap out: layers that are looked at one by one, and those that the finding tells of.
MOST_SUSPECTS, MOST_NAMED = 8, 3
LEADS = 0.5  # of the gap, mended by one layer alone
FAIR = 0.5  # of the gap; batches that show less are not typical, and all are taken
LIKE_BEST = 0.8  # of the largest share; less is another
LEAST_SHARE = 0.005  # what is told as 0 %, or is below, is no share


class _Half(NamedTuple):
    """Numbered batches, and the exact statistics of the OTHER half, which they are judged with."""

    parts: list[tuple[int, Any]]
    exact: dict[NormFacts, Statistics]


@dataclass
class _Study:
    """The two halves of the data, and the layers whose statistics can be exchanged."""

    facts: Facts
    norms: list[NormFacts]  # in the order of the forward
    halves: tuple[_Half, _Half]
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

    def swapped(self) -> _Study:
        """The same with each half judged with the statistics of its own."""
        one, other = self.halves
        halves = (_Half(one.parts, other.exact), _Half(other.parts, one.exact))
        return _Study(self.facts, self.norms, halves, self.running)

    def typical(self, running: Evaluation, exact: Evaluation, *, by_loss: bool) -> _Study:
        """The same with one batch of each half: the one whose gap is nearest to the mean gap.

        Not the largest: that of a batch with few hard examples, which any change makes easier.
        """
        gaps, halves, begun = _gaps(running, exact, by_loss=by_loss), [], 0
        mean = sum(gaps) / len(gaps)
        away = [0.0 if math.isinf(gap) else abs(gap - mean) for gap in gaps]
        for half in self.halves:
            here = away[begun : begun + len(half.parts)]
            begun += len(half.parts)
            halves.append(_Half([half.parts[here.index(min(here))]], half.exact))
        return _Study(self.facts, self.norms, (halves[0], halves[1]), self.running)

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
        std = (torch.stack(self._of(norm, 1)).mean(0) + norm.eps).sqrt()
        mean = torch.stack(self._of(norm, 0)).mean(0)
        return float(((mean - self.running[norm][0].double()).abs() / std).max())

    def suspicion(self, norm: NormFacts) -> float:
        """How far its statistics are off, over all channels: shifts and logarithms of ratios."""
        mean, var = (torch.stack(self._of(norm, i)).mean(0) for i in (0, 1))
        shift = (mean - self.running[norm][0].double()) / (var + norm.eps).sqrt()
        return float((shift.square() + self._ratios(norm).log().square()).mean())

    def misfit(self, norm: NormFacts) -> Misfit:
        """How far its statistics are off, beyond chance."""
        one, other = (half.exact[norm] for half in self.halves)
        examples = sum(examples_of(batch) for batch in self.facts.batches)
        return misfit_of(norm, self.running[norm], (one, other), examples)

    def _of(self, norm: NormFacts, which: int) -> list[Tensor]:
        return [half.exact[norm][which].double() for half in self.halves]


@dataclass
class _Shares:
    """What part of the gap layers carry: mended alone, and one after another in their order."""

    alone: dict[NormFacts, float]  # those that are off most first
    cumulative: dict[NormFacts, float]
    measured: str

    def lead(self) -> tuple[NormFacts, float, bool]:
        """The layer to name, its share, and whether it carries most of the gap by itself.

        Of layers that mend about as much, that whose statistics are off most.
        """
        best = max(self.alone.values())
        if best >= LEADS:
            lead = next(norm for norm, share in self.alone.items() if share >= LIKE_BEST * best)
            return lead, self.alone[lead], True
        worst = max(self.cumulative, key=lambda norm: self.cumulative[norm])
        return worst, self.cumulative[worst], False


def train_eval_gap(facts: Facts) -> Iterator[Found]:
    """Running statistics that do not fit the data, and the layers that carry the harm."""
    norms = _norms(facts)
    cut = _cut(facts)
    norms, few = _fed(facts, norms, cut)
    study = _study(facts, norms, cut)
    running = study.judged(()) if len(facts.batches) < 2 else _in_order_of(study, facts.evaluated)
    exact = study.judged(norms)
    misfits, remedy, lead = _misfits(study), _remedy(facts, running, exact), None
    try:
        harm = _harm(study, running, exact)
    except NotApplicable:  # a misfit is one without a measure of harm, too
        if not misfits:
            raise
        harm = None
    if harm is not None:
        shares = _shared(study, running, exact, by_loss=harm.by_loss)
        lead = shares.lead()[0]
        found = _of_harm(study, harm, shares, misfits.get(lead))
        left = {"layers left out for too few values": few} if few else {}
        yield replace(found, evidence=found.evidence | left, fix=remedy.fix, advice=remedy.advice)
    for norm, misfit in misfits.items():
        if norm is not lead:
            yield _of_misfit(study, norm, misfit, _measured_of(running, exact), remedy)


def _misfits(study: _Study) -> dict[NormFacts, Misfit]:
    """The layers whose statistics are off by themselves, in the order of the forward.

    Dropout in training makes variances larger than these data have; TN403 tells of that.
    """
    facts = study.facts
    flow, modules = flow_of(facts), dict(facts.model.named_modules())
    found = {}
    for norm in study.norms:
        misfit = study.misfit(norm)
        calls = [call.input for call in flow.calls_of(norm.name) if call.input is not None]
        dropped = any(dropouts_before(flow, number, modules) for number in calls)
        if misfit.severity == "error" or (misfit.severity and not dropped):
            found[norm] = misfit
    return found


def _remedy(facts: Facts, running: Evaluation, exact: Evaluation) -> Remedy:
    """Recalibration, or what it has to be told where it would put the old statistics back."""
    now, best = running.loss, exact.loss
    if now is not None and best is not None and best > now:
        return Remedy(
            None,
            f"On these data the loss is {now:.4g}, and {best:.4g} with exact statistics: "
            "truenorm.recalibrate(model, data) may put the old ones back, for it keeps no worse; "
            "with keep_worse=True it takes the exact ones.",
        )
    return Remedy(lambda: _recalibrate(facts))


def _of_harm(study: _Study, harm: _Harm, shares: _Shares, misfit: Misfit | None) -> Found:
    """What the statistics do worse, and the layer that carries it."""
    lead, share, alone = shares.lead()
    where = lead.name or "(model)"
    sits = f"{min(max(share, 0), 1):.0%} of the gap sits in {where}"
    if not alone:
        most = f"the most of it, {share:.0%}, sits in {where}"
        if share < LEAST_SHARE:
            most = f"of the layers looked at, that which is off most is {where}"
        sits = f"no layer carries the gap alone; {most}"
    evidence = harm.evidence | _evidence_of(study, shares) | _evidence_of_misfit(study, lead)
    evidence["measured on"] = shares.measured
    severities = {harm.severity, *([] if misfit is None else [misfit.severity])}
    severity = next(s for s in SEVERITIES if s in severities)
    cause = f"{sits}, whose {_fault_of(study, lead)}"
    return Found(lead.name, severity, cause, evidence)


def _of_misfit(
    study: _Study,
    norm: NormFacts,
    misfit: Misfit,
    measured: dict[str, Any],
    remedy: Remedy,
) -> Found:
    """Statistics that are off by so much that they are wrong, whatever they do here."""
    evidence = measured | _evidence_of_misfit(study, norm) | {"misfit": misfit.size}
    cause = f"its {_fault_of(study, norm)}: they are not the statistics of what it gets"
    assert misfit.severity is not None
    return Found(norm.name, misfit.severity, cause, evidence, *remedy)


def _evidence_of_misfit(study: _Study, norm: NormFacts) -> dict[str, Any]:
    return {
        "exact over running variance": study.variance_ratio(norm),
        "shift of the mean in standard deviations": study.shift(norm),
    }


def evaluated_on_others(book: Book, facts: Facts) -> Iterator[Found]:
    """What a model was evaluated on is not what its statistics were made of.

    Only the first norm of a forward is judged: what the others get depends on it.
    """
    found = []
    for layer in book.called:
        rested = [r for r in layer.records if r.tracked is not None and r.mean is not None]
        last = [r for r in rested if r.step == rested[-1].step]
        if not last or last[0].tracked is None:
            continue
        mean, var = last[0].tracked.double().cpu()
        inputs = pooled_moments(last, one=False)
        differ, shift, ratio = calls_differ([inputs, Moments(mean[None], var[None], inputs.count)])
        if differ:
            cause = "the data it was evaluated on have other moments than those it was trained on"
            evidence = {"shift in standard deviations": shift, "variances": ratio}
            found.append(Found(layer.name, "warning", cause, evidence))
    if not found:
        raise NotApplicable("needs data")  # a part of the answer is no pass
    yield from found


TN103 = Check(
    "TN103",
    "Running statistics do not fit the data",
    look=train_eval_gap,
    watched=evaluated_on_others,
    looks_at="data",
    evaluates=True,
    advice="Run truenorm.recalibrate(model, data).",
)


# -- what can be looked at ------------------------------------------------------------------------


def _norms(facts: Facts) -> list[NormFacts]:
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


def _cut(facts: Facts) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
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


def _fed(
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


# -- exact statistics -----------------------------------------------------------------------------


def _study(
    facts: Facts, norms: list[NormFacts], cut: tuple[list[tuple[int, Any]], list[tuple[int, Any]]]
) -> _Study:
    running = {norm: _statistics(norm) for norm in norms}
    fits = []
    for half in cut:
        try:
            _settle(facts, norms, [batch for _, batch in half])
            fits.append({norm: _statistics(norm) for norm in norms})
        finally:
            for norm in norms:
                _put(norm, running[norm])
    return _Study(facts, norms, (_Half(cut[0], fits[1]), _Half(cut[1], fits[0])), running)


def _settle(facts: Facts, norms: list[NormFacts], batches: list[Any]) -> None:
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


def _recalibrate(facts: Facts) -> None:
    """On all of the data: without targets nothing is held out."""
    assert facts.call is not None
    bare = [SimpleNamespace(call=facts.call.prepare(batch)) for batch in facts.batches]
    recalibration.recalibrate(
        facts.model, bare, arguments=lambda batch: (batch.call.args, batch.call.kwargs)
    )


# -- the harm -------------------------------------------------------------------------------------


class _Harm(NamedTuple):
    by_loss: bool
    severity: Severity
    evidence: dict[str, Any]


def _in_order_of(study: _Study, evaluation: Evaluation) -> Evaluation:
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


def _gaps(running: Evaluation, exact: Evaluation, *, by_loss: bool) -> list[float]:
    """What each batch contributes to the harm; the same for all where that is not known."""
    batches = len(running.answers)
    gaps: list[float] = []
    if by_loss and len(running.losses) == len(exact.losses) == batches:
        gaps = [a - b for a, b in zip(running.losses, exact.losses, strict=True)]
    elif not by_loss:
        pairs = zip(running.answers, exact.answers, strict=True)
        gaps = [_distance([a], [b]) or 0.0 for a, b in pairs]
    gaps = [math.inf if math.isnan(gap) else gap for gap in gaps]
    return gaps or [0.0] * batches


def _harm(study: _Study, running: Evaluation, exact: Evaluation) -> _Harm | None:
    """What the running statistics do worse than exact ones; None if nothing."""
    now, best = running.loss, exact.loss
    known = now is not None and best is not None
    if best is not None and not math.isfinite(best):
        raise NotApplicable(f"the loss is {best} with exact statistics, too")
    if not known and all(answers is None for answers in running.answers):
        raise NotApplicable("the model's output holds no loss, and no tensor with answers")
    evidence = _measured_of(running, exact)
    drop = 0.0
    if running.accuracy is not None and exact.accuracy is not None:
        drop = exact.accuracy - running.accuracy
        drop = 0.0 if _by_chance(exact.hit, running.hit) else drop
    if now is not None and best is not None and not _by_chance(running.lost, exact.lost):
        gap = now - best
        if not gap <= GAP_SHARE * abs(best) + GAP_LEAST:  # so that NaN is one
            severe = not gap <= GAP_SEVERE or drop > ACCURACY_SEVERE
            return _Harm(True, "error" if severe else "warning", evidence)
    distance = _distance(running.answers, exact.answers)
    if distance is None:
        if known:
            return None
        raise NotApplicable("answers of other shapes with other statistics, and no loss")
    if math.isnan(distance):
        raise NotApplicable("the model's answers are not finite")
    if not distance > OUTPUT_GAP:
        return None
    noise = _distance(exact.answers, study.swapped().judged(study.norms).answers)
    if noise is None or not distance > OUTPUT_NOISE * noise:
        return None
    evidence["distance of answers over their size"] = distance
    if drop > ACCURACY_SEVERE:
        return _Harm(False, "error", evidence)
    return _Harm(False, "note" if known else "warning", evidence)


def _measured_of(running: Evaluation, exact: Evaluation) -> dict[str, Any]:
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


def _distance(answers: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float | None:
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


# -- whose it is ----------------------------------------------------------------------------------


def _shared(study: _Study, running: Evaluation, exact: Evaluation, *, by_loss: bool) -> _Shares:
    """Share the gap out to the layers whose statistics are off most."""
    trial = _Trial.of(study.typical(running, exact, by_loss=by_loss), by_loss=by_loss)
    most, judged, total = MOST_SUSPECTS, 2, sum(len(half.parts) for half in study.halves)
    if trial.gap < FAIR * _Trial(study, running, exact, by_loss).gap:
        trial, most, judged = _Trial(study, running, exact, by_loss), MOST_NAMED, total
    suspects = sorted(study.norms, key=study.suspicion, reverse=True)[:most]
    alone = {n: trial.part(trial.now, trial.harm({n})) for n in suspects}
    ranked = sorted(suspects, key=lambda norm: alone[norm], reverse=True)
    if alone[ranked[0]] >= LEADS:  # then three layers are enough
        ranked = ranked[:MOST_NAMED]
    cumulative, mended, before = {}, set[NormFacts](), trial.now
    for norm in (n for n in study.norms if n in ranked):
        mended.add(norm)
        after = trial.least if len(mended) == len(study.norms) else trial.harm(mended)
        cumulative[norm] = trial.part(before, after)
        before = after
    measured = f"{judged} of {total} batches"
    if len(study.facts.batches) == 1:
        measured = "halves of one batch"
    if len(suspects) < len(study.norms):
        layers = f"{len(suspects)} of {len(study.norms)} layers"
        measured += f", {layers}, whose statistics are off most"
    return _Shares(alone, cumulative, measured)


@dataclass
class _Trial:
    """The harm done by some statistics, between that of running and that of exact ones."""

    study: _Study
    running: Evaluation
    exact: Evaluation
    by_loss: bool

    @classmethod
    def of(cls, study: _Study, *, by_loss: bool) -> _Trial:
        return cls(study, study.judged(()), study.judged(study.norms), by_loss)

    def harm(self, mended: Collection[NormFacts]) -> float:
        return self._of(self.study.judged(mended))

    def _of(self, evaluation: Evaluation) -> float:
        distance = None if self.by_loss else _distance(evaluation.answers, self.exact.answers)
        harm = evaluation.loss if self.by_loss else distance
        return math.inf if harm is None or not math.isfinite(harm) else harm

    @property
    def now(self) -> float:
        return self._of(self.running)

    @property
    def least(self) -> float:
        return self._of(self.exact)

    @property
    def gap(self) -> float:
        return self.now - self.least

    def part(self, before: float, after: float) -> float:
        """What part of the gap a change from ``before`` to ``after`` takes off."""
        if math.isinf(before):  # a loss that is not finite: all of it, or nothing
            return 0.0 if math.isinf(after) else 1.0
        if math.isinf(after):
            return -1.0
        return (before - after) / self.gap if self.gap > 0 and math.isfinite(self.gap) else 0.0


def _evidence_of(study: _Study, shares: _Shares) -> dict[str, Any]:
    """The three largest shares, alone, and cumulative in the order of the forward."""
    evidence: dict[str, Any] = {}
    largest = sorted(shares.cumulative, key=lambda n: -max(shares.alone[n], shares.cumulative[n]))
    for norm in largest[:MOST_NAMED]:
        evidence[f"share of {norm.name or '(model)'} alone"] = shares.alone[norm]
        evidence[f"share of {norm.name or '(model)'} in turn"] = shares.cumulative[norm]
    return evidence


def _fault_of(study: _Study, norm: NormFacts) -> str:
    ratio, shift = study.variance_ratio(norm), study.shift(norm)
    if max(ratio, 1 / ratio) > NAMED_RATIO:
        return f"running variance is {_times(ratio)}"
    channel, ratio = study.worst_ratio(norm)
    if shift < NAMED_SHIFT and max(ratio, 1 / ratio) > NAMED_RATIO:
        return f"running variance is {_times(ratio)} in channel {channel}"
    return f"running mean is off by {shift:.1f} standard deviations"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x too small" if ratio > 1 else f"{1 / ratio:.1f}x too large"
