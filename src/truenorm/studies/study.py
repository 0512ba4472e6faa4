"""A finished study: its rows, and what follows from them; "cannot tell" is an answer."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from truenorm.studies.paired import Decision, interquartile_mean, mean_interval
from truenorm.studies.trial import Row
from truenorm.studies.tuning import tried
from truenorm.studies.variants import Variant
from truenorm.studies.verdicts import JudgedPair


@dataclass(frozen=True)
class Summary:
    """A variant over its judged seeds.

    ``mean`` to ``iqm`` are of the study's metric, ``low`` and ``high`` its mean's 95 % interval
    (:func:`truenorm.studies.paired.mean_interval`); ``seconds`` and ``valid_loss`` (of the best
    epochs) are means, the ways to the goal medians over the runs that reach it.
    """

    variant: str
    n: int
    mean: float | None
    sd: float | None
    iqm: float | None
    low: float | None
    high: float | None
    valid_loss: float | None
    lr: float
    diverged: int
    failed: int
    seconds: float | None
    reached: int
    epochs_to_goal: float | None
    seconds_to_goal: float | None


@dataclass(frozen=True)
class Study:
    """Rows of all runs, and what follows from them.

    Attributes:
        variants: in the order asked for; within a setting the reference is the first.
        rows: of the judged runs, by variant and then seed.
        tuning: of the runs that chose the learning rates.
        lrs: each variant's learning rate.
        metric: what is compared.
        margin: the difference below which two variants are equivalent, or None.
        goal: the validation accuracy to which epochs and seconds are counted.
        pairs: all pairs within each setting, corrected as one family.
        verdicts: those that were asked for, corrected as one family: each variant beside its
            setting's reference, or all pairs.
        provenance: command, versions, machine, data.
    """

    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    tuning: tuple[Row, ...]
    lrs: dict[str, float]
    metric: str
    margin: float | None
    goal: float | None
    pairs: tuple[JudgedPair, ...]
    verdicts: tuple[JudgedPair, ...]
    provenance: dict[str, Any]

    def of(self, label: str) -> list[Row]:
        """The judged rows of a variant, by seed."""
        return [row for row in self.rows if row.variant == label]

    @property
    def sequential(self) -> bool:
        """Whether its variants stopped when they were decided."""
        return any(pair.watched for pair in self.verdicts)

    def settings(self) -> dict[str, list[Variant]]:
        """The variants of each setting, the reference first."""
        return {
            setting: [v for v in self.variants if v.setting == setting]
            for setting in dict.fromkeys(v.setting for v in self.variants)
        }

    def differences(self, pair: JudgedPair) -> list[float]:
        """The metric's difference for each seed that both variants of ``pair`` have it for."""
        a, b = (
            {row.seed: getattr(row, self.metric) for row in self.of(label)}
            for label in (pair.variant, pair.reference)
        )
        both = [(a[seed], b[seed]) for seed in a if seed in b]
        return [x - y for x, y in both if x is not None and y is not None]

    def tried(self, label: str) -> list[tuple[float, float]]:
        """The learning rates tried for a variant, rising, each with its loss in validation."""
        return list(tried(label, self.tuning).items())

    def curve(self, label: str) -> list[float]:
        """Mean validation accuracy by epoch; a run that has ended counts on with its best."""
        runs = [row for row in self.of(label) if row.curve]
        longest = max((len(row.curve) for row in runs), default=0)
        ends = [row.valid_accuracy or 0.0 for row in runs]
        return [
            sum(
                row.curve[i][1] if i < len(row.curve) else end
                for row, end in zip(runs, ends, strict=True)
            )
            / len(runs)
            for i in range(longest)
        ]

    def summaries(self) -> list[Summary]:
        """A line for each variant."""
        return [self._summary(v.label) for v in self.variants]

    def _summary(self, label: str) -> Summary:
        rows = [row for row in self.of(label) if row.error is None]
        values = _values(rows, self.metric)
        values = values[~np.isnan(values)]
        low, high = mean_interval(values) if len(values) > 1 else (None, None)
        reached = [at for row in rows if self.goal and (at := row.reaches(self.goal))]
        return Summary(
            variant=label,
            n=len(values),
            mean=float(values.mean()) if len(values) else None,
            sd=float(values.std(ddof=1)) if len(values) > 1 else None,
            iqm=interquartile_mean(values),
            low=low,
            high=high,
            valid_loss=_mean([row.valid_loss for row in rows]),
            lr=self.lrs[label],
            diverged=sum(row.diverged for row in rows),
            failed=len(self.of(label)) - len(rows),
            seconds=_mean([row.seconds for row in rows]),
            reached=len(reached),
            epochs_to_goal=float(np.median([e for e, _ in reached])) if reached else None,
            seconds_to_goal=float(np.median([s for _, s in reached])) if reached else None,
        )

    def tally(self) -> str:
        """How many verdicts there are of each kind."""
        counts = collections.Counter(pair.decision for pair in self.verdicts)
        kinds: tuple[Decision, ...] = ("better", "worse", "equivalent", "cannot tell")
        counted = [f"{counts[kind]} {kind}" for kind in kinds if counts[kind]]
        count = f"{len(self.verdicts)} verdict{'s' * (len(self.verdicts) > 1)}"
        return f"{count}: {', '.join(counted)}." if counted else "No verdicts."

    def sentences(self) -> list[str]:
        """The verdicts in words, and what one should know of the tuning."""
        return [p.sentence for p in self.verdicts] + _at_the_edge(self.tuning, self.lrs)

    def to_json(self) -> dict[str, Any]:
        """What programs read."""
        return {
            "metric": self.metric,
            "margin": self.margin,
            "goal": self.goal,
            "summaries": [dataclasses.asdict(s) for s in self.summaries()],
            "rows": [{**row.to_json(), "diverged": row.diverged} for row in self.rows],
            "tuning": [{**row.to_json(), "diverged": row.diverged} for row in self.tuning],
            "pairs": [pair.to_json() for pair in self.pairs],
            "verdicts": [pair.to_json() for pair in self.verdicts],
            "sentences": self.sentences(),
            "provenance": self.provenance,
        }

    def __str__(self) -> str:
        return "\n".join([*self.sentences(), self.tally()])

    def _repr_html_(self) -> str:
        from truenorm.templates import table

        share = self.metric.endswith("accuracy")

        def figure(value: float | None) -> str:
            return "-" if value is None else f"{value:.2%}" if share else f"{value:.4f}"

        names = ("variant", "n", self.metric.replace("_", " "), "95 % interval", "lr", "seconds")
        rows = [
            (
                *(s.variant, s.n, figure(s.mean), f"{figure(s.low)} to {figure(s.high)}"),
                *(f"{s.lr:g}", "-" if s.seconds is None else f"{s.seconds:.2f}"),
            )
            for s in self.summaries()
        ]
        return table(names, rows, [*self.sentences(), self.tally()])


# The figures ---------------------------------------------------------------------------------


def _values(rows: Sequence[Row], metric: str) -> np.ndarray[Any, Any]:
    """The metric by seed; NaN where a run has none."""
    values = [getattr(row, metric) for row in rows]
    return np.array([math.nan if v is None else v for v in values], dtype=float)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _at_the_edge(tuning: Sequence[Row], lrs: dict[str, float]) -> list[str]:
    """What one should know of rates at an end of those that were tried."""
    rates = sorted({row.lr for row in tuning})
    notes = []
    for rate, end in ((rates[0], "least"), (rates[-1], "largest")) if len(rates) > 1 else ():
        labels = [label for label, lr in lrs.items() if lr == rate]
        if labels:
            notes.append(
                f"The learning rate chosen for {', '.join(labels)}, {rate:g}, is the {end} that "
                "was tried; a wider grid may do better."
            )
    return notes
