"""Each variant's own learning rate: equal trials for all, judged on validation data alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from truenorm.studies.plan import TUNING_SEEDS_FROM, optuna_package
from truenorm.studies.trial import Row, Trial
from truenorm.studies.variants import Variant

# Trials that optuna is asked for at a time, of each variant. It is a constant, and not the number
# of processes, on which rows must not depend; the first round is drawn at random.
ROUND = 5

Run = Callable[[Sequence[Trial], Sequence[Trial]], list[Row]]  # of trials, and those to follow


def tuned(
    variants: Sequence[Variant],
    rates: Sequence[float],
    seeds: int,
    run: Run,
    ahead: Sequence[Trial],
    *,
    tuner: str = "grid",
    trials: int = 0,
) -> tuple[list[Row], dict[str, float]]:
    """Rows of the tuning runs, and each variant's learning rate: the recipe's without any.

    Args:
        variants: each has the same number of runs.
        rates: those of the grid, rising; optuna searches between the first and the last.
        seeds: how many runs each learning rate has.
        run: gets the rows of trials.
        ahead: the study's trials after these.
        tuner: "grid" or "optuna".
        trials: how many learning rates optuna tries for each variant.
    """
    if not rates:
        return [], {v.label: v.config.lr for v in variants}
    if tuner == "grid":
        rows = run(_tries(dict.fromkeys(variants, rates), seeds), ahead)
    else:
        rows = _searched(variants, (rates[0], rates[-1]), seeds, run, ahead=ahead, trials=trials)
    return rows, best_rates([v.label for v in variants], rows)


def best_rates(labels: Iterable[str], rows: Sequence[Row]) -> dict[str, float]:
    """Of each variant the rate of least :func:`tuning_loss`; of equals the least."""
    losses = {label: tried(label, rows) for label in labels}
    return {label: min(own, key=lambda rate: own[rate]) for label, own in losses.items()}


def tried(label: str, rows: Sequence[Row]) -> dict[float, float]:
    """The learning rates tried for a variant, rising, each with its :func:`tuning_loss`."""
    own = [row for row in rows if row.variant == label]
    rates = sorted({row.lr for row in own})
    return {rate: tuning_loss([row for row in own if row.lr == rate]) for rate in rates}


def tuning_loss(rows: Sequence[Row]) -> float:
    """Mean best validation loss over ``rows``, infinite if any diverged or failed."""
    losses = [
        math.inf if row.diverged or row.valid_loss is None else row.valid_loss for row in rows
    ]
    return sum(losses) / len(losses)


def _tries(rates: Mapping[Variant, Sequence[float]], seeds: int) -> list[Trial]:
    """The runs of each variant with each of its rates, on seeds that are not judged."""
    own = range(TUNING_SEEDS_FROM, TUNING_SEEDS_FROM + seeds)
    return [v.trial(s, rate, "tuning") for v, tried in rates.items() for rate in tried for s in own]


# Optuna --------------------------------------------------------------------------------------


def _searched(
    variants: Sequence[Variant],
    ends: tuple[float, float],
    seeds: int,
    run: Run,
    *,
    ahead: Sequence[Trial],
    trials: int,
) -> list[Row]:
    """Rows of a search for each variant by the tree-structured Parzen estimator (Bergstra et al.).

    All searches have one seed, so that their first rounds try the same rates. Rounds are of a
    fixed size and told in the order in which they were asked: the rates depend neither on the
    order in which runs end nor on where they run, and a second time all are in the store.
    """
    rows: list[Row] = []
    with _silent(optuna_package()) as optuna:
        searches = {v: _search(optuna) for v in variants}
        for begun in range(0, trials, ROUND):
            size = min(ROUND, trials - begun)
            asked = {v: [search.ask() for _ in range(size)] for v, search in searches.items()}
            rates = {
                v: [t.suggest_float("lr", *ends, log=True) for t in a] for v, a in asked.items()
            }
            later = [v.trial(0, v.config.lr) for v in variants] * ((trials - begun - size) * seeds)
            found = run(_tries(rates, seeds), [*later, *ahead])
            for v, search in searches.items():
                losses = tried(v.label, found)
                for trial, rate in zip(asked[v], rates[v], strict=True):
                    search.tell(trial, losses[rate])
            rows += found
    return sorted(rows, key=lambda row: [v.label for v in variants].index(row.variant))


def _search(optuna: ModuleType) -> Any:
    sampler = optuna.samplers.TPESampler(n_startup_trials=ROUND, seed=0)
    return optuna.create_study(sampler=sampler, direction="minimize")


@contextlib.contextmanager
def _silent(optuna: ModuleType) -> Iterator[ModuleType]:
    """Optuna logs every study that it creates; the caller's setting returns afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)
