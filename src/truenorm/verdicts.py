"""Paired differences -> verdicts and the sentences that say them. Pure functions of scores."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Decision = Literal["better", "worse", "equivalent", "cannot tell"]


@dataclass(frozen=True)
class Pair:
    """A paired comparison of two variants over the seeds that both have a figure for.

    Attributes:
        variant, reference: labels; the difference is the first minus the second.
        n: seeds.
        difference, low, high: mean of the metric's differences and its 95 % interval.
        p: two-sided; in a study's verdicts corrected by Holm over all of them.
        decision: of the variant, beside its reference.
        more_seeds: for "cannot tell", how many more would probably (80 %) do, if the observed
            difference is the true one; None where none can be named.
    """

    variant: str
    reference: str
    setting: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    decision: Decision
    more_seeds: int | None = None


def judge(
    scores: dict[str, np.ndarray[Any, Any]],
    settings: Mapping[str, Sequence[str]],
    *,
    margin: float | None,
    higher_is_better: bool,
) -> tuple[list[Pair], list[Pair]]:
    """All pairs within each setting, and the verdicts: each variant beside its setting's first.

    Args:
        scores: of each variant the metric by seed, (S,), NaN where a run has none.
        settings: the variants of each, the reference first.
        margin: differences within +- margin count as none; None if every difference counts.
        higher_is_better: whether a positive difference is a gain.

    Returns:
        The pairs, each judged by itself, and the verdicts, with Holm's correction over all.
    """
    pairs = [
        _pair(scores, b, a, setting)
        for setting, labels in settings.items()
        for a, b in itertools.combinations(labels, 2)
    ]
    verdicts = _holm([p for p in pairs if p.reference == settings[p.setting][0]])
    return (
        [_decided(pair, margin, higher_is_better) for pair in pairs],
        [_decided(pair, margin, higher_is_better) for pair in verdicts],
    )


def _pair(
    scores: dict[str, np.ndarray[Any, Any]], variant: str, reference: str, setting: str
) -> Pair:
    """The mean difference with Student's interval and p."""
    from scipy import stats

    d = scores[variant] - scores[reference]
    d = d[~np.isnan(d)]
    n, mean = len(d), float(d.mean()) if len(d) else None
    if n < 2 or mean is None:
        return Pair(variant, reference, setting, n, mean, None, None, None, "cannot tell")
    error = float(d.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    if error:
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    else:  # equal differences have no t; the sign-flip test still has a p
        p = 2.0 ** (1 - n) if mean else 1.0
    return Pair(variant, reference, setting, n, mean, mean - half, mean + half, p, "cannot tell")


def _holm(pairs: list[Pair]) -> list[Pair]:
    order = sorted((p.p, i) for i, p in enumerate(pairs) if p.p is not None)
    corrected, floor = list(pairs), 0.0
    for rank, (p, i) in enumerate(order):
        floor = max(floor, min(1.0, p * (len(order) - rank)))
        corrected[i] = dataclasses.replace(pairs[i], p=floor)
    return corrected


def _decided(pair: Pair, margin: float | None, higher_is_better: bool) -> Pair:
    if pair.p is None or pair.difference is None or pair.low is None or pair.high is None:
        return pair
    if margin is not None and -margin < pair.low and pair.high < margin:
        return dataclasses.replace(pair, decision="equivalent")
    if pair.p <= 0.05:
        gains = (pair.difference > 0) == higher_is_better
        return dataclasses.replace(pair, decision="better" if gains else "worse")
    return dataclasses.replace(pair, more_seeds=_more_seeds(pair))


def _more_seeds(pair: Pair) -> int | None:
    """Seeds lacking to 80 % power at 5 %, by the normal approximation."""
    from scipy import stats

    assert pair.difference is not None
    assert pair.high is not None
    if not pair.difference:
        return None
    sd = (pair.high - pair.difference) / float(stats.t.ppf(0.975, pair.n - 1)) * math.sqrt(pair.n)
    needed = math.ceil(((1.96 + 0.8416) * sd / pair.difference) ** 2) + 2
    return max(1, needed - pair.n) if needed < 10_000 else None


def sentence(pair: Pair, metric: str, margin: float | None) -> str:
    """A verdict in words."""
    norm, reference = (label.split("/")[0] for label in (pair.variant, pair.reference))
    unit, factor = ("points", 100.0) if metric.endswith("accuracy") else ("nats", 1.0)
    said = {
        "better": f"{norm} is better than {reference}",
        "worse": f"{norm} is worse than {reference}",
        "equivalent": f"{norm} and {reference} are equivalent (margin {factor * (margin or 0):g} "
        f"{unit})",
        "cannot tell": f"cannot tell {norm} from {reference}",
    }[pair.decision]
    if pair.difference is None or pair.low is None or pair.high is None or pair.p is None:
        seeds = "1 seed has" if pair.n == 1 else f"{pair.n} seeds have"
        return f"{pair.setting}: {said}: only {seeds} both figures."
    figures = (
        f"{factor * pair.difference:+.2f} {unit} of {metric.replace('_', ' ')} "
        f"(95 % interval {factor * pair.low:+.2f} to {factor * pair.high:+.2f}, "
        f"p {pair.p:.2g}, {pair.n} seeds)"
    )
    return f"{pair.setting}: {said}: {figures}.{_outlook(pair)}"


def _outlook(pair: Pair) -> str:
    if pair.decision != "cannot tell":
        return ""
    if pair.more_seeds is None:
        return " No reasonable number of seeds would tell, if this difference is the true one."
    return f" About {pair.more_seeds:,} more seeds would, if this difference is the true one."
