"""compare(): variants x seeds -> rows -> paired verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truenorm.data import sources
from truenorm.data.datasets import Splits, Uncut
from truenorm.data.reading import Reading
from truenorm.errors import InputError
from truenorm.factories import is_factory
from truenorm.models import ModelSpec, build, identified
from truenorm.provenance import environment
from truenorm.studies.plan import StudyPlan
from truenorm.studies.question import Question
from truenorm.studies.runner import Runner, StudyObserver, runner_of
from truenorm.studies.study import Study
from truenorm.studies.trial import Row
from truenorm.studies.tuning import tuned
from truenorm.studies.variants import Variant, variants_of
from truenorm.studies.verdicts import JudgedPair
from truenorm.training.config import TrainConfig
from truenorm.training.devices import device_of
from truenorm.training.fit import check_head


def compare(
    data: Any,
    plan: StudyPlan | None = None,
    *,
    processes: int | None = None,
    engine: str = "local",
    store: Path | str | None = None,
    retry: bool = False,
    observe: StudyObserver | None = None,
    reading: Reading | None = None,
    **fields: Any,
) -> Study:
    """Train every variant with every seed, and say which norm serves the task, if one can tell.

    ``compare("digits", norms=("none", "batch"), seeds=8)`` makes its plan from the keywords.

    Args:
        data: a data source, as :func:`truenorm.load` takes it, or Splits, which are then the
            same for all seeds.
        plan: what is trained and judged; by default the plan's own defaults.
        processes: by default one for each core; 0 runs all here. Rows do not depend on it.
        engine: "local", or "ray" for a Ray cluster (extra ``cluster``); rows are the same.
        store: an SQLite file where rows are kept as they come and found again; None for
            memory. What it holds already is not run again.
        retry: run again what failed.
        observe: told of progress.
        reading: how the data are read.
        fields: those of :class:`truenorm.studies.plan.StudyPlan`, in place of the plan's own.

    Raises:
        InputError: data, models, config or store will not do.
        KeyboardInterrupt: Ctrl-C; finished rows are in the store, and no process is left.
    """
    plan = _planned(plan, fields)
    _refuse_main(plan, processes, engine)
    uncut, splits = _data(data, plan, reading)
    question = _question(plan, splits)
    seeds = plan.judged_seeds(question.least_seeds())
    work = runner_of(
        uncut, len(splits.train), store, processes, engine=engine, retry=retry, observe=observe
    )
    with work as runner:
        _expect(plan, question, seeds, runner)
        tuning, lrs = _rates(plan, question, seeds, runner)
        rows, verdicts = _rows(plan, question, seeds, lrs, runner)
    about = {
        "data": data if isinstance(data, str) else splits.train.name,
        "fingerprint": runner.fingerprint,
        "store": None if store is None else str(store),
        "engine": engine,
        "processes": runner.pool.count,
        "seeds": sorted({row.seed for row in rows}),
        **_about(plan),
    }
    return question.answer(
        rows,
        verdicts,
        tuning=tuning,
        lrs=lrs,
        goal=plan.goal,
        provenance={**environment(), **about},
    )


# Before anything is run ----------------------------------------------------------------------


def _planned(plan: StudyPlan | None, fields: dict[str, Any]) -> StudyPlan:
    """The plan with ``fields``; those of a model or of training are told where they go."""
    known = {f.name for f in dataclasses.fields(StudyPlan)}
    inner = {f.name for kind in (ModelSpec, TrainConfig) for f in dataclasses.fields(kind)}
    for name in sorted(fields.keys() - known):
        where = (
            f"changes={{{name!r}: ...}}" if name in inner else f"one of {', '.join(sorted(known))}"
        )
        raise InputError(f"compare takes no {name}, got {fields[name]!r}; give {where}.")
    return StudyPlan(**fields) if plan is None else dataclasses.replace(plan, **fields)


def _refuse_main(plan: StudyPlan, processes: int | None, engine: str) -> None:
    """A factory of the script or notebook itself is not there in other processes."""
    own = [m for m in plan.varied()["name"] if m.startswith("__main__:")]
    if own and (processes != 0 or engine != "local"):
        raise InputError(
            f"{own[0]}: worker processes cannot import what a script or notebook defines; put it "
            "in a module of its own, or pass processes=0."
        )


def _data(data: Any, plan: StudyPlan, reading: Reading | None) -> tuple[Uncut, Splits]:
    """The data, and how the first seed cuts them."""
    if isinstance(data, Splits):
        return Uncut(data.train, data.test, data.valid, data.scaling), data
    uncut = sources.uncut(data, target=plan.target, reading=reading)
    return uncut, uncut.cut(plan.first_seed())


def _question(plan: StudyPlan, splits: Splits) -> Question:
    """What the plan asks of these data; refuses models that cannot be built on them."""
    if plan.metric.startswith("test") and splits.test is None:
        raise InputError(f"{splits.train.name}: has no test part; use the metric valid_accuracy.")
    variants = [_built(v, splits) for v in variants_of(plan, len(splits.train))]
    question = Question(tuple(variants), plan.metric, plan.margin, plan.against)
    if plan.until is not None and not question.family():
        raise InputError(f"until needs two norms at least, got {', '.join(plan.norms)}.")
    return question


def _built(variant: Variant, splits: Splits) -> Variant:
    """``variant``, once it was built; one of a factory's with the digest of what that builds."""
    shape, classes = splits.input_shape, len(splits.classes)
    device_of(variant.config.device)
    model = build(variant.spec, shape, classes, seed=0)
    variant.config.check_shape(shape)  # after the model, whose recipe may move images
    if not is_factory(variant.spec.name):
        return variant
    check_head(model, splits, f"{variant.spec.name}, norm {variant.spec.norm},")
    return dataclasses.replace(variant, spec=identified(variant.spec, shape, classes))


def _about(plan: StudyPlan) -> dict[str, Any]:
    """What the provenance says of the plan."""
    about: dict[str, Any] = {"recipe": plan.recipe}
    if plan.rates():
        about |= {"tuner": plan.tuner, "trials": plan.tries(), "tuning_seeds": plan.tuning_seeds}
    if plan.until is not None:
        about |= {"until": plan.until, "max_seeds": plan.max_seeds, "looks": plan.looks()}
    return about


# The runs ------------------------------------------------------------------------------------


def _expect(plan: StudyPlan, question: Question, seeds: Sequence[int], runner: Runner) -> None:
    """Say how many runs there will be, and whether they are too few to tell anything."""
    tuning = plan.tuning_seeds * plan.tries()
    runner.expect(len(question.variants) * (tuning + len(seeds)))
    if question.family() and len(seeds) < question.least_seeds():
        runner.note(question.too_few(len(seeds)))


def _rates(
    plan: StudyPlan, question: Question, seeds: Sequence[int], runner: Runner
) -> tuple[list[Row], dict[str, float]]:
    """Rows of the tuning runs, and each variant's learning rate."""
    variants = question.variants
    if isinstance(plan.lr, float | int):
        return [], {v.label: float(plan.lr) for v in variants}
    ahead = [v.trial(s, v.config.lr) for v in variants for s in seeds]
    return tuned(
        variants,
        plan.rates(),
        plan.tuning_seeds,
        runner.rows,
        ahead,
        tuner=plan.tuner,
        trials=plan.tries(),
    )


def _rows(
    plan: StudyPlan,
    question: Question,
    seeds: Sequence[int],
    lrs: dict[str, float],
    runner: Runner,
) -> tuple[list[Row], tuple[JudgedPair, ...]]:
    """The judged rows, by variant and then seed, and the verdicts asked for."""
    looks = plan.looks()
    if looks is not None:
        return _until_decided(question, looks, lrs, runner)
    rows = runner.rows(v.trial(s, lrs[v.label]) for v in question.variants for s in seeds)
    return rows, question.judge(rows)


def _until_decided(
    question: Question, looks: Sequence[int], lrs: dict[str, float], runner: Runner
) -> tuple[list[Row], tuple[JudgedPair, ...]]:
    """Rows and verdicts of a study whose variants stop when all that is asked of them is told."""
    rows: list[Row] = []
    verdicts: tuple[JudgedPair, ...] = ()
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
