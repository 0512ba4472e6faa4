"""A study's scores -> its pairs and verdicts, in words. The statistics are paired.py's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truenorm.studies.paired import (
    Comparison,
    Decision,
    Verdict,
    amount,
    compare_scores,
    hundredths,
    verdict,
)
from truenorm.studies.plan import Against
from truenorm.studies.sequential import Watched, monitor

Settings = Mapping[str, Sequence[str]]  # of each setting the variants, its reference first
ALPHA = 0.05
# What the statistics of a fixed number of seeds say, and what does not hold after looks.
_FIXED = ("low", "high", "p", "p_holm", "p_equivalent", "p_equivalent_holm", "seeds_needed")


@dataclass(frozen=True)
class JudgedPair:
    """Two variants of one setting: their statistics, what they decide, and a sentence of it.

    ``watched`` is there in a study that stops when it is decided; its interval and p-values
    are not, since those of a fixed number of seeds do not hold after several looks.
    """

    setting: str
    comparison: Comparison
    decision: Decision
    sentence: str
    watched: Watched | None = None

    @property
    def variant(self) -> str:
        """The label of the variant that is judged."""
        return self.comparison.a

    @property
    def reference(self) -> str:
        """The label of the one beside which it is judged."""
        return self.comparison.b

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean difference, where there is one that holds."""
        low, high = self.comparison.low, self.comparison.high
        return None if self.watched or low is None or high is None else (low, high)

    def to_json(self) -> dict[str, Any]:
        """What programs read, in one object."""
        figures = dataclasses.asdict(self.comparison)
        for name in ("a", "b", *(_FIXED if self.watched else ())):
            del figures[name]
        if self.watched:
            figures["hopeless"] = self.watched.hopeless
            figures["conditional_power"] = self.watched.conditional_power
        return {
            "setting": self.setting,
            "variant": self.variant,
            "reference": self.reference,
            **figures,
            "decision": self.decision,
            "sentence": self.sentence,
        }


def family_of(settings: Settings, against: Against) -> dict[tuple[str, str], str]:
    """The pairs to judge, (variant, reference) -> setting; against ``all``, every pair."""
    return {
        (b, a): setting
        for setting, labels in settings.items()
        for a, b in itertools.combinations(labels, 2)
        if against == "all" or a == labels[0]
    }


def judge_pairs(
    scores: Mapping[str, Any],
    family: Mapping[tuple[str, str], str],
    *,
    metric: str,
    margin: float | None,
) -> tuple[JudgedPair, ...]:
    """Verdicts of a fixed number of seeds, corrected as one family.

    Args:
        scores: of each variant the metric by seed, (S,), NaN where a run has none.
        family: as :func:`family_of` gives it.
        metric: one that ends in accuracy is the better the higher, and told in points.
        margin: differences within +- margin count as none; None if every difference counts.
    """
    if not family:
        return ()
    higher = metric.endswith("accuracy")
    found = compare_scores(
        scores, list(family), higher_is_better=higher, margin=margin, alpha=ALPHA
    )
    return tuple(
        _pair(family[c.a, c.b], c, verdict(_by_norm(c), unit=_unit(metric), factor=_factor(metric)))
        for c in found
    )


def watch_pairs(
    scores: Mapping[str, Any],
    family: Mapping[tuple[str, str], str],
    looks: Sequence[int],
    max_seeds: int,
    *,
    metric: str,
    margin: float | None,
) -> tuple[tuple[JudgedPair, ...], tuple[str, ...]]:
    """Verdicts after the last of ``looks``, and the variants that need more seeds.

    Arguments as for :func:`judge_pairs` and :func:`truenorm.studies.sequential.monitor`.
    """
    higher = metric.endswith("accuracy")
    seen = monitor(
        scores, looks, max_seeds, list(family), higher_is_better=higher, margin=margin, alpha=ALPHA
    )
    pairs = []
    for w in seen.pairs:
        cut = {name: scores[name][: w.n] for name in (w.a, w.b)}
        found = compare_scores(cut, [(w.a, w.b)], higher_is_better=higher, margin=margin)[0]
        text = _early_sentence(_by_norm(found), w, max_seeds, metric)
        said = Verdict(w.a, w.b, w.decision, text)
        pairs.append(_pair(family[w.a, w.b], found, said, w))
    return tuple(pairs), seen.running


def _pair(
    setting: str, found: Comparison, said: Verdict, watched: Watched | None = None
) -> JudgedPair:
    text = said.sentence.removesuffix(".")
    return JudgedPair(setting, found, said.decision, f"{setting}: {text}.", watched)


def _by_norm(found: Comparison) -> Comparison:
    """Named as in a sentence that has told the setting."""
    a, b = (label.split("/")[0] for label in (found.a, found.b))
    return dataclasses.replace(found, a=a, b=b)


def _early_sentence(found: Comparison, seen: Watched, max_seeds: int, metric: str) -> str:
    """A sentence of a pair that is looked at repeatedly."""
    unit, factor = _unit(metric), _factor(metric)
    after = f"{seen.n} of at most {max_seeds} seeds"
    if found.dropped:
        after += f", {found.dropped} dropped for failed runs"
    if found.difference is None:
        return f"cannot tell {found.a} from {found.b}: no seed has both scores ({after})."
    size = f"{hundredths(factor * found.difference)} {unit}"
    if seen.decision in ("better", "worse"):
        gain = f"{hundredths(factor * abs(found.difference))} {unit}"
        return (
            f"{found.a} is {seen.decision} than {found.b} by {gain} (told at {after}; "
            f"the {100 * ALPHA:g} % hold over all looks)."
        )
    if seen.decision == "equivalent":
        margin = with_unit(found.margin or 0, metric)
        return f"{found.a} and {found.b} are equivalent within {margin}: {size} (told at {after})."
    said = f"cannot tell {found.a} from {found.b}: {size} at {after}"
    if seen.hopeless and seen.conditional_power is not None:
        chance = 100 * seen.conditional_power
        return f"{said}; given up, all of them would tell with a chance of {chance:.1f} %."
    return f"{said}."


def with_unit(value: float, metric: str) -> str:
    """A round number of the metric's unit, like a margin: 0.005 of accuracy is 0.5 points."""
    return amount(_factor(metric) * value, f" {_unit(metric)}")


def _unit(metric: str) -> str:
    return "points" if metric.endswith("accuracy") else "nats"


def _factor(metric: str) -> float:
    return 100.0 if metric.endswith("accuracy") else 1.0
