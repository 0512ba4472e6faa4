"""compare(): variants x seeds -> rows -> paired verdicts; "cannot tell" is an answer."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truenorm.data import sources
from truenorm.data.datasets import Splits
from truenorm.errors import InputError, choose
from truenorm.models import build
from truenorm.studies.paired import Decision, interquartile_mean, interval, least_seeds
from truenorm.studies.plan import (
    GRID,
    Variant,
    looks_of,
    rates_of,
    seeds_of,
    variants_of,
)
from truenorm.studies.runner import Observer, Runner, runner_of
from truenorm.studies.trial import Row
from truenorm.studies.tuning import trials_of, tried, tuned
from truenorm.studies.verdicts import AGAINST, ALPHA, Against, Pair, family_of, judge, watch
from truenorm.training.fit import device_of
from truenorm.training.run import environment

METRICS = ("test_accuracy", "test_loss", "valid_accuracy", "valid_loss")
SEEDS = 8  # by default, where so many can tell something


@dataclass(frozen=True)
class Summary:
    """A variant over its judged seeds.

    ``mean`` to ``iqm`` are of the study's metric, ``low`` and ``high`` its mean's 95 % interval
    (:func:`truenorm.studies.paired.interval`); ``seconds`` and ``valid_loss`` (of the best epochs)
    are means, the ways to the goal medians over the runs that reach it.
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
    pairs: tuple[Pair, ...]
    verdicts: tuple[Pair, ...]
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

    def differences(self, pair: Pair) -> list[float]:
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
        low, high = interval(values) if len(values) > 1 else (None, None)
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
        told = [f"{counts[kind]} {kind}" for kind in kinds if counts[kind]]
        count = f"{len(self.verdicts)} verdict{'s' * (len(self.verdicts) > 1)}"
        return f"{count}: {', '.join(told)}." if told else "No verdicts."

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
            all looks (:func:`truenorm.studies.paired.monitor`).
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


def _data(data: Any, target: str | None, seed: int) -> tuple[sources.Uncut, Splits]:
    if isinstance(data, Splits):
        return sources.Uncut(data.train, data.test, data.valid, data.scaling), data
    uncut = sources.uncut(data, target=target)
    return uncut, uncut.cut(seed)


# The figures ---------------------------------------------------------------------------------


def _values(rows: Sequence[Row], metric: str) -> np.ndarray[Any, Any]:
    """The metric by seed; NaN where a run has none."""
    held = [getattr(row, metric) for row in rows]
    return np.array([math.nan if v is None else v for v in held], dtype=float)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _goal(variants: Sequence[Variant], rows: Sequence[Row]) -> float | None:
    means = []
    for variant in variants:
        own = [row for row in rows if row.variant == variant.label]
        reached = [row.valid_accuracy for row in own if row.valid_accuracy is not None]
        if reached:
            means.append(sum(reached) / len(reached))
    return 0.99 * max(means) if means else None


def _at_the_edge(tuning: Sequence[Row], lrs: dict[str, float]) -> list[str]:
    """What one should know of rates at an end of those that were tried."""
    tried = sorted({row.lr for row in tuning})
    told = []
    for rate, end in ((tried[0], "least"), (tried[-1], "largest")) if len(tried) > 1 else ():
        labels = [label for label, lr in lrs.items() if lr == rate]
        if labels:
            told.append(
                f"The learning rate chosen for {', '.join(labels)}, {rate:g}, is the {end} that "
                "was tried; a wider grid may do better."
            )
    return told
