"""Each variant's own learning rate: equal trials for all, judged on validation data alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from truenorm.errors import InputError, choose
from truenorm.studies.plan import TUNING_SEEDS_FROM, Variant
from truenorm.studies.trial import Row, Trial

TUNERS = ("grid", "optuna")
# Trials that optuna is asked for at a time, of each variant. It is a constant, and not the number
# of processes, on which rows must not depend; the first round is drawn at random.
ROUND = 5

Run = Callable[[Sequence[Trial], Sequence[Trial]], list[Row]]  # of trials, and those to follow


def trials_of(tuner: str, trials: int | None, rates: Sequence[float]) -> int:
    """How many learning rates each variant is tried with; by default as many as the grid has.

    Raises:
        InputError: an unknown tuner, or one that cannot work on this.
    """
    choose("tuner", tuner, TUNERS)
    if tuner == "grid":
        if trials is not None:
            raise InputError(
                f"trials are the tuner optuna's, got {trials!r} with the tuner grid, which tries "
                "all of grid; choose optuna or leave them out."
            )
        return len(rates)
    if len(rates) < 2:
        raise InputError(
            f"tuner 'optuna' needs lr 'tune' and a grid of two rates or more, got {len(rates)} to "
            "tune: it searches between the least and the largest; name both."
        )
    if trials is not None and trials < 1:
        raise InputError(
            f"trials must be at least 1, got {trials!r}; as many as the grid has are usual."
        )
    _optuna()
    return len(rates) if trials is None else trials


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
    tried = range(TUNING_SEEDS_FROM, TUNING_SEEDS_FROM + seeds)
    return [v.trial(s, rate, "tuning") for v, own in rates.items() for rate in own for s in tried]


# Optuna --------------------------------------------------------------------------------------


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "tuner 'optuna' needs the package optuna: pip install 'truenorm[tune]'."
        ) from error
    return optuna


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
    with _silent(_optuna()) as optuna:
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
