"""compare(): variants x seeds -> rows -> paired verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truenorm.data import sources
from truenorm.data.datasets import Splits, Uncut
from truenorm.errors import InputError, choose
from truenorm.models import build
from truenorm.provenance import environment
from truenorm.studies.paired import least_seeds
from truenorm.studies.plan import GRID, Variant, looks_of, rates_of, seeds_of, variants_of
from truenorm.studies.runner import Observer, Runner, runner_of
from truenorm.studies.study import Study
from truenorm.studies.trial import Row
from truenorm.studies.tuning import trials_of, tuned
from truenorm.studies.verdicts import AGAINST, ALPHA, Against, Pair, family_of, judge, watch
from truenorm.training.devices import device_of

METRICS = ("test_accuracy", "test_loss", "valid_accuracy", "valid_loss")
SEEDS = 8  # by default, where so many can tell something


def compare(
    data: Any,
    *,
    norms: Sequence[str] = ("none", "batch", "group", "layer"),
    batch_sizes: Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    until: str | None = None,
    max_seeds: int = 64,
    against: str = "first",
    model: str | Sequence[str] = "mlp",
    lr: float | str = "recipe",
    metric: str = "test_accuracy",
    margin: float | None = None,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    target: str | None = None,
    grid: Sequence[float] = GRID,
    tuner: str = "grid",
    trials: int | None = None,
    tuning_seeds: int = 2,
    goal: float | None = None,
    processes: int | None = None,
    engine: str = "local",
    store: Path | str | None = None,
    retry: bool = False,
    observe: Observer | None = None,
) -> Study:
    """Train every variant with every seed, and say which norm serves the task, if one can tell.

    A variant is a norm with a batch size, and with one value of each of ``changes``. All
    variants of a seed have the same split, the same initial weights where shapes allow, and
    the same order of the data, so their differences are paired.

    Args:
        data: a data source, as :func:`truenorm.load` takes it, or Splits, which are then the
            same for all seeds.
        norms: the first is the reference of each batch size.
        batch_sizes: by default the recipe's own.
        seeds: how many (from 0), or which; by default 8, or one more than the fewest that can
            tell anything with so many verdicts. With ``until``, how many before the first look.
        until: "decided": look at the verdicts every few seeds, and give no more seeds to
            variants of which all verdicts are told or hopeless. The rate of errors holds over
            all looks (:func:`truenorm.studies.sequential.monitor`).
        max_seeds: where that ends at the latest.
        against: what is judged: each variant beside the "first" norm of its setting, or "all"
            pairs. The p-values are corrected over all verdicts.
        model: one architecture, or several.
        lr: "recipe"; a number for all variants; or "tune": for each variant the rate of
            ``grid`` with the least mean validation loss over ``tuning_seeds`` seeds of their
            own. A rate with which any of them diverges or fails is out.
        tuner: "grid", or "optuna" (extra ``tune``), which tries rates between the grid's ends.
        trials: how many rates optuna tries for each variant; by default as many as the grid has.
        metric: one of test_accuracy, test_loss, valid_accuracy, valid_loss.
        margin: differences of the metric within +- margin count as none.
        changes: fields of ModelSpec and TrainConfig; a list or tuple is one variant for each
            value (of ``widths``, a list of tuples).
        target: the label's column, for tables.
        goal: validation accuracy to which epochs and seconds are counted; by default 99 % of
            the best variant's mean.
        processes: by default one for each core; 0 runs all here. Rows do not depend on it.
        engine: "local", or "ray" for a Ray cluster (extra ``cluster``); rows are the same.
        store: an SQLite file where rows are kept as they come and found again; None for
            memory. What it holds already is not run again.
        retry: run again what failed.
        observe: told of progress.

    Raises:
        InputError: data, models, config or store will not do.
        KeyboardInterrupt: Ctrl-C; finished rows are in the store, and no process is left.
    """
    choose("metric", metric, METRICS)
    if margin is not None and not margin > 0:
        raise InputError(f"margin must be above 0, got {margin!r}.")
    choose("against", against, AGAINST)
    rates, judged = rates_of(lr, grid, tuning_seeds), None if seeds is None else seeds_of(seeds)
    tries = trials_of(tuner, trials, rates)
    looks = None if until is None else looks_of(until, seeds, max_seeds)
    uncut, splits = _data(data, target, judged[0] if judged else 0)
    if metric.startswith("test") and splits.test is None:
        raise InputError(f"{splits.train.name}: has no test part; use the metric valid_accuracy.")
    models = (model,) if isinstance(model, str) else tuple(model)
    varied = {"name": models, "batch_size": tuple(batch_sizes or (None,)), **(changes or {})}
    variants = variants_of(len(splits.train), tuple(norms), varied, recipe)
    for variant in variants:  # refuse before anything is run
        build(variant.spec, splits.input_shape, len(splits.classes), seed=0)
        device_of(variant.config.device)
    question = _Question(tuple(variants), metric, margin, against)  # type: ignore[arg-type]
    if looks is not None:
        if not question.family():
            raise InputError(f"until needs two norms at least, got {', '.join(norms)}.")
        judged = tuple(range(looks[-1]))
    elif judged is None:
        judged = tuple(range(max(SEEDS, question.least_seeds() + 1)))
    work = runner_of(
        uncut, len(splits.train), store, processes, engine=engine, retry=retry, observe=observe
    )
    with work as runner:
        runner.expect(len(variants) * (tuning_seeds * tries + len(judged)))
        if question.family() and len(judged) < question.least_seeds():
            runner.note(question.too_few(len(judged)))
        ahead = [v.trial(s, v.config.lr) for v in variants for s in judged]
        tuning, lrs = tuned(
            variants, rates, tuning_seeds, runner.rows, ahead, tuner=tuner, trials=tries
        )
        if isinstance(lr, float | int):
            lrs = {v.label: float(lr) for v in variants}
        if looks is None:
            rows = runner.rows(v.trial(s, lrs[v.label]) for v in variants for s in judged)
            verdicts = question.judge(rows)
        else:
            rows, verdicts = _until_decided(question, looks, lrs, runner)
    about: dict[str, Any] = {
        "data": data if isinstance(data, str) else splits.train.name,
        "fingerprint": runner.fingerprint,
        "store": None if store is None else str(store),
        "engine": engine,
        "processes": runner.pool.count,
        "seeds": sorted({row.seed for row in rows}),
        "recipe": recipe,
    }
    if rates:
        about |= {"tuner": tuner, "trials": tries, "tuning_seeds": tuning_seeds}
    if looks is not None:
        about |= {"until": until, "max_seeds": max_seeds, "looks": looks}
    return question.answer(
        rows, verdicts, tuning=tuning, lrs=lrs, goal=goal, provenance={**environment(), **about}
    )


@dataclass(frozen=True)
class _Question:
    """What is asked of the rows."""

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

    def judge(self, rows: Sequence[Row], against: Against | None = None) -> tuple[Pair, ...]:
        """Verdicts of rows of which there are as many as was decided beforehand."""
        family = self.family(against)
        return judge(self.scores(rows), family, metric=self.metric, margin=self.margin)

    def watch(
        self, rows: Sequence[Row], looks: Sequence[int], max_seeds: int
    ) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
        """Verdicts after the last of several looks, and the variants that need more seeds."""
        told = {"metric": self.metric, "margin": self.margin}
        return watch(self.scores(rows), self.family(), looks, max_seeds, **told)  # type: ignore[arg-type]

    def answer(
        self,
        rows: Sequence[Row],
        verdicts: Sequence[Pair],
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


def _until_decided(
    question: _Question, looks: Sequence[int], lrs: dict[str, float], runner: Runner
) -> tuple[list[Row], tuple[Pair, ...]]:
    """Rows and verdicts of a study whose variants stop when all that is asked of them is told."""
    rows: list[Row] = []
    verdicts: tuple[Pair, ...] = ()
    running: Sequence[str] = [v.label for v in question.variants]
    begun = 0
    for k, at in enumerate(looks):
        own = [v for v in question.variants if v.label in running]
        trials = [[v.trial(s, lrs[v.label]) for v in own] for s in range(begun, looks[-1])]
        ahead = [trial for of_seed in trials[at - begun :] for trial in of_seed]
        runner.expect_more(sum(map(len, trials)))
        rows += runner.rows([t for of_seed in trials[: at - begun] for t in of_seed], ahead)
        begun = at
        verdicts, running = question.watch(rows, looks[: k + 1], looks[-1])
        if not running:
            break
    order = {v.label: i for i, v in enumerate(question.variants)}
    return sorted(rows, key=lambda row: (order[row.variant], row.seed)), verdicts


def _data(data: Any, target: str | None, seed: int) -> tuple[Uncut, Splits]:
    if isinstance(data, Splits):
        return Uncut(data.train, data.test, data.valid, data.scaling), data
    uncut = sources.uncut(data, target=target)
    return uncut, uncut.cut(seed)


def _goal(variants: Sequence[Variant], rows: Sequence[Row]) -> float | None:
    means = []
    for variant in variants:
        own = [row for row in rows if row.variant == variant.label]
        reached = [row.valid_accuracy for row in own if row.valid_accuracy is not None]
        if reached:
            means.append(sum(reached) / len(reached))
    return 0.99 * max(means) if means else None
