"""What a study is asked: one frozen dataclass, checked before anything starts.

Imports no torch, so that ``truenorm --help`` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

from truenorm.errors import InputError, choose
from truenorm.factories import name_of
from truenorm.training.config import TrainConfig, option

Against = Literal["first", "all"]
Tuner = Literal["grid", "optuna"]
Until = Literal["decided"]
METRICS = ("test_accuracy", "test_loss", "valid_accuracy", "valid_loss")
SEEDS = 8  # by default, where so many can tell something
MOST_SEEDS = 1000  # of a study until decided
TUNING_SEEDS_FROM = 1_000_000  # so far from the judged seeds that the two never meet


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Which variants are trained, with which seeds and rates, and what is judged.

    A variant is a norm with a batch size, and with one value of each of ``changes``. All
    variants of a seed have the same split, the same initial weights where shapes allow, and the
    same order of the data, so their differences are paired.

    ``seeds`` is how many (from 0), or which; by default 8, or one more than the fewest that can
    tell anything with so many verdicts. The p-values are corrected over all verdicts; those of a
    study ``until`` decided hold over all looks (:func:`truenorm.studies.sequential.monitor`).
    Its looks are every few seeds, the last at ``max_seeds``.

    With ``lr`` "tune" each variant has the rate of ``grid`` with the least mean validation loss
    over ``tuning_seeds`` seeds; one with which any of them diverges or fails is out.

    Raises:
        InputError: a value lies outside its range, or does not go with another.
    """

    target: str | None = option(None, "The label's column of a .csv or .parquet file.")
    model: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] = option(
        "mlp",
        "mlp, convnet, resnet or transformer, or package.module:factory, a function of your own "
        "that builds a model with batch norms; several are compared norm by norm in each.",
    )
    norms: Sequence[str] = option(
        ("none", "batch", "group", "layer"),
        "Norms to compare, of none, batch, layer, group, instance, rms, renorm and ghost; the "
        "first is the reference.",
    )
    batch_sizes: Sequence[int] | None = option(
        None, "Batch sizes, like 4,16,64; by default the recipe's own."
    )
    seeds: int | Sequence[int] | None = option(
        None,
        "Runs of each variant; by default 8, or as many as it takes to tell anything. "
        "With --until, those before the first look.",
    )
    until: Until | None = option(
        None,
        "decided: look at the verdicts as runs come in, and stop each variant when all that is "
        "asked of it is told, or hopeless. The rate of errors holds over all looks.",
    )
    max_seeds: int = option(64, "The most runs of a variant with --until.")
    against: Against = option(
        "first", "first: judge each norm beside the first one; all: judge every pair."
    )
    lr: float | str = option(
        "recipe",
        "recipe; tune, on validation data, with as many trials for each variant; or a number.",
    )
    grid: Sequence[float] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1), "The learning rates that tune tries."
    )
    tuner: Tuner = option(
        "grid",
        "grid, or optuna, which tries rates between the grid's ends and needs the extra tune.",
    )
    trials: int | None = option(
        None, "How many rates optuna tries for each variant; by default as many as the grid has."
    )
    tuning_seeds: int = option(2, "Seeds for each of them; they are not judged.")
    metric: str = option("test_accuracy", "test_accuracy, test_loss, valid_accuracy or valid_loss.")
    margin: float | None = option(
        None, "Differences up to this count as none, like 0.005 for half a point of accuracy."
    )
    goal: float | None = option(
        None,
        "Validation accuracy to which epochs and seconds are counted; by default 0.99 of the "
        "best variant's.",
    )
    recipe: str = option("default", "default, or classic: the textbook protocol.")
    changes: Mapping[str, Any] | None = option(
        None,
        "Fields of ModelSpec and TrainConfig; a list or tuple is one variant for each value "
        "(of widths, a list of tuples).",
    )

    def __post_init__(self) -> None:
        several = isinstance(self.model, list | tuple)
        named = [m if isinstance(m, str) else name_of(m) for m in self._models()]
        object.__setattr__(self, "model", tuple(named) if several else named[0])
        choose("metric", self.metric, METRICS)
        if self.margin is not None and not self.margin > 0:
            raise InputError(f"margin must be above 0, got {self.margin!r}.")
        choose("against", self.against, get_args(Against))
        rates = self.rates()
        if self.seeds is not None:
            seeds_of(self.seeds)
        trials_of(self.tuner, self.trials, rates)
        self.looks()

    def rates(self) -> tuple[float, ...]:
        """The learning rates to try for each variant, rising; none where nothing is tuned."""
        return rates_of(self.lr, self.grid, self.tuning_seeds)

    def tries(self) -> int:
        """How many learning rates each variant is tried with."""
        return trials_of(self.tuner, self.trials, self.rates())

    def looks(self) -> tuple[int, ...] | None:
        """Numbers of seeds at which a study until decided is looked at; None for any other."""
        return None if self.until is None else looks_of(self.until, self.seeds, self.max_seeds)

    def judged_seeds(self, least: int) -> tuple[int, ...]:
        """The seeds to judge by, or of which some are, where ``least`` can tell something."""
        looks = self.looks()
        if looks is not None:
            return tuple(range(looks[-1]))
        return tuple(range(max(SEEDS, least + 1))) if self.seeds is None else seeds_of(self.seeds)

    def first_seed(self) -> int:
        """The seed whose split shows what the data are."""
        return 0 if self.seeds is None else seeds_of(self.seeds)[0]

    def _models(self) -> tuple[Any, ...]:
        several = isinstance(self.model, list | tuple)
        return tuple(self.model) if several else (self.model,)  # type: ignore[arg-type]

    def varied(self) -> dict[str, Any]:
        """The fields of ModelSpec and TrainConfig in which settings differ, with their values."""
        models = self._models()
        sizes = tuple(self.batch_sizes or (None,))
        return {"name": models, "batch_size": sizes, **(self.changes or {})}


def seeds_of(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The judged seeds: so many from 0, or those given.

    Raises:
        InputError: there is none, one is there twice, or is one of tuning's.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds must be at least one, and all different, got {seeds!r}.")
    if not all(0 <= s < TUNING_SEEDS_FROM for s in chosen):
        raise InputError(
            f"seeds must lie in [0, {TUNING_SEEDS_FROM}), beyond which tuning has its own; "
            f"got {seeds!r}."
        )
    return chosen


def looks_of(until: str, first: int | Sequence[int] | None, max_seeds: int) -> tuple[int, ...]:
    """Numbers of seeds at which a study that ends when it is decided is looked at.

    Every sixteenth of the most seeds, so at most 16 times; from ``first`` on.

    Raises:
        InputError: values that cannot be.
    """
    choose("until", until, get_args(Until))
    if not 2 <= max_seeds <= MOST_SEEDS:
        raise InputError(f"max_seeds must lie in [2, {MOST_SEEDS}], got {max_seeds!r}.")
    step = math.ceil(max_seeds / 16)
    if first is None:
        first = max(2, step)
    if not isinstance(first, int) or not 2 <= first <= max_seeds:
        raise InputError(
            f"seeds must be a number from 2 to max_seeds ({max_seeds}) in a study until decided, "
            f"got {first!r}."
        )
    return (*range(first, max_seeds, step), max_seeds)


def rates_of(lr: float | str, grid: Sequence[float], tuning_seeds: int) -> tuple[float, ...]:
    """The learning rates to try for each variant, rising; none where nothing is tuned.

    Raises:
        InputError: ``lr`` or one of ``grid`` is no rate, or there is nothing to tune by.
    """
    if isinstance(lr, str) and lr not in ("recipe", "tune"):
        raise InputError(f"lr must be recipe, tune or a number, got {lr!r}.")
    rates = tuple(grid) if lr == "tune" else () if isinstance(lr, str) else (lr,)
    for rate in rates:
        TrainConfig(lr=rate)  # refuses what is no rate
    if lr != "tune":
        return ()
    if not rates or tuning_seeds < 1:
        raise InputError("tuning needs at least one learning rate and one tuning seed.")
    return tuple(sorted(set(rates)))


def trials_of(tuner: str, trials: int | None, rates: Sequence[float]) -> int:
    """How many learning rates each variant is tried with; by default as many as the grid has.

    Raises:
        InputError: an unknown tuner, or one that cannot work on this.
    """
    choose("tuner", tuner, get_args(Tuner))
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
    optuna_package()
    return len(rates) if trials is None else trials


def optuna_package() -> ModuleType:
    """The package optuna.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "tuner 'optuna' needs the package optuna: pip install 'truenorm[tune]'."
        ) from error
    return optuna
