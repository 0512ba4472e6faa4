"""Each variant's own learning rate: equal trials for all, judged on validation data alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from truenorm.plan import TUNING_SEEDS_FROM, Variant
from truenorm.runner import Runner
from truenorm.trial import Row, Trial


def tuned(
    variants: Sequence[Variant],
    rates: Sequence[float],
    seeds: int,
    runner: Runner,
    ahead: Sequence[Trial],
) -> tuple[list[Row], dict[str, float]]:
    """Rows of the tuning runs, and each variant's learning rate: the recipe's without any."""
    own = {v.label: v.config.lr for v in variants}
    if not rates:
        return [], own
    tried = range(TUNING_SEEDS_FROM, TUNING_SEEDS_FROM + seeds)
    trials = [v.trial(s, rate, "tuning") for v in variants for rate in rates for s in tried]
    rows = runner.rows(trials, ahead)

    return rows, best_rates(own, rates, rows)


def best_rates(
    labels: Iterable[str], rates: Sequence[float], rows: Sequence[Row]
) -> dict[str, float]:
    """Of each variant the rate of least :func:`tuning_loss`; of equals the first."""

    def loss(label: str, rate: float) -> float:
        return tuning_loss([row for row in rows if (row.variant, row.lr) == (label, rate)])

    return {label: min(rates, key=functools.partial(loss, label)) for label in labels}


def tuning_loss(rows: Sequence[Row]) -> float:
    """Mean best validation loss over ``rows``, infinite if any diverged or failed."""
    losses = [
        math.inf if row.diverged or row.valid_loss is None else row.valid_loss for row in rows
    ]
    return sum(losses) / len(losses)
