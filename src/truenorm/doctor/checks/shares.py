"""Whose a gap is: what part of it each layer carries, alone and in turn."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from truenorm.doctor.checks.halves import Half, Study
from truenorm.doctor.checks.harm import distance_of, gaps_of
from truenorm.doctor.facts import Evaluation, NormFacts

# To share the gap out: layers that are looked at one by one, and those that the finding tells of.
MOST_SUSPECTS, MOST_NAMED = 8, 3
LEADS = 0.5  # of the gap, mended by one layer alone
FAIR = 0.5  # of the gap; batches that show less are not typical, and all are taken
LIKE_BEST = 0.8  # of the largest share; less is another


@dataclass
class Shares:
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


def shared_out(study: Study, running: Evaluation, exact: Evaluation, *, by_loss: bool) -> Shares:
    """Share the gap out to the layers whose statistics are off most."""
    trial = _Trial.of(_typical(study, running, exact, by_loss=by_loss), by_loss=by_loss)
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
    return Shares(alone, cumulative, measured)


def _typical(study: Study, running: Evaluation, exact: Evaluation, *, by_loss: bool) -> Study:
    """``study`` with one batch of each half: the one whose gap is nearest to the mean gap.

    Not the largest: that of a batch with few hard examples, which any change makes easier.
    """
    gaps, halves, begun = gaps_of(running, exact, by_loss=by_loss), [], 0
    mean = sum(gaps) / len(gaps)
    away = [0.0 if math.isinf(gap) else abs(gap - mean) for gap in gaps]
    for half in study.halves:
        here = away[begun : begun + len(half.parts)]
        begun += len(half.parts)
        halves.append(Half([half.parts[here.index(min(here))]], half.exact))
    return Study(study.facts, study.norms, (halves[0], halves[1]), study.running)


@dataclass
class _Trial:
    """The harm done by some statistics, between that of running and that of exact ones."""

    study: Study
    running: Evaluation
    exact: Evaluation
    by_loss: bool

    @classmethod
    def of(cls, study: Study, *, by_loss: bool) -> _Trial:
        return cls(study, study.judged(()), study.judged(study.norms), by_loss)

    def harm(self, mended: Collection[NormFacts]) -> float:
        return self._of(self.study.judged(mended))

    def _of(self, evaluation: Evaluation) -> float:
        distance = None if self.by_loss else distance_of(evaluation.answers, self.exact.answers)
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
