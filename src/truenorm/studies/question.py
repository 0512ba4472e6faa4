"""What a study asks of its rows: which pairs of variants to judge, by which metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from truenorm.studies.paired import least_seeds
from truenorm.studies.plan import Against
from truenorm.studies.study import Study
from truenorm.studies.trial import Row
from truenorm.studies.variants import Variant
from truenorm.studies.verdicts import ALPHA, JudgedPair, family_of, judge_pairs, watch_pairs


@dataclass(frozen=True)
class Question:
    """Which pairs of ``variants`` are judged, by which metric."""

    variants: tuple[Variant, ...]
    metric: str
    margin: float | None
    against: Against

    def family(self, against: Against | None = None) -> dict[tuple[str, str], str]:
        """The pairs to judge, with their settings."""
        settings: dict[str, list[str]] = {}
        for v in self.variants:
            settings.setdefault(v.setting, []).append(v.label)
        return family_of(settings, against or self.against)

    def least_seeds(self) -> int:
        """Fewer can tell nothing, whatever the rows."""
        return least_seeds(max(1, len(self.family())), ALPHA)

    def too_few(self, seeds: int) -> str:
        """A note that says so."""
        return (
            f"{seeds} seeds cannot tell anything among {len(self.family())} verdicts at "
            f"{100 * ALPHA:g} %: at least {self.least_seeds()} are needed."
        )

    def scores(self, rows: Sequence[Row]) -> dict[str, np.ndarray[Any, Any]]:
        """Of each variant the metric by seed, over the seeds that any has; NaN if it lacks."""
        places = {seed: i for i, seed in enumerate(sorted({row.seed for row in rows}))}
        found = {v.label: np.full(len(places), math.nan) for v in self.variants}
        for row in rows:
            value = getattr(row, self.metric)
            if value is not None:
                found[row.variant][places[row.seed]] = value
        return found

    def judge(self, rows: Sequence[Row], against: Against | None = None) -> tuple[JudgedPair, ...]:
        """Verdicts of rows of which there are as many as was decided beforehand."""
        family = self.family(against)
        return judge_pairs(self.scores(rows), family, metric=self.metric, margin=self.margin)

    def watch(
        self, rows: Sequence[Row], looks: Sequence[int], max_seeds: int
    ) -> tuple[tuple[JudgedPair, ...], tuple[str, ...]]:
        """Verdicts after the last of several looks, and the variants that need more seeds."""
        return watch_pairs(
            self.scores(rows),
            self.family(),
            looks,
            max_seeds,
            metric=self.metric,
            margin=self.margin,
        )

    def answer(
        self,
        rows: Sequence[Row],
        verdicts: Sequence[JudgedPair],
        *,
        tuning: Sequence[Row],
        lrs: dict[str, float],
        goal: float | None,
        provenance: dict[str, Any],
    ) -> Study:
        """What follows from finished rows."""
        return Study(
            self.variants,
            tuple(rows),
            tuple(tuning),
            lrs,
            self.metric,
            self.margin,
            _goal(self.variants, rows) if goal is None else goal,
            self.judge(rows, "all"),
            tuple(verdicts),
            provenance,
        )


def _goal(variants: Sequence[Variant], rows: Sequence[Row]) -> float | None:
    means = []
    for variant in variants:
        own = [row for row in rows if row.variant == variant.label]
        reached = [row.valid_accuracy for row in own if row.valid_accuracy is not None]
        if reached:
            means.append(sum(reached) / len(reached))
    return 0.99 * max(means) if means else None
