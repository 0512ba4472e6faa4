"""truenorm compare and truenorm claims."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from truenorm.cli.options import (
    DONE,
    Json,
    StudySettings,
    check_file,
    integers,
    listed,
    numbers,
    rate,
    widths_of,
)


def compare(
    *,
    data: str = "mnist",
    target: str | None = None,
    model: str = "mlp",
    norm: str = "none,batch,group,layer",
    batch_size: str | None = None,
    norm_position: str = "before",
    widths: str | None = None,
    dropout: str = "0",
    seeds: int | None = None,
    until: Literal["decided"] | None = None,
    max_seeds: int = 64,
    against: Literal["first", "all"] = "first",
    lr: str = "recipe",
    grid: str = "0.001,0.003,0.01,0.03,0.1",
    tuner: Literal["grid", "optuna"] = "grid",
    trials: int | None = None,
    tuning_seeds: int = 2,
    metric: str = "test_accuracy",
    margin: float | None = None,
    goal: float | None = None,
    recipe: str = "default",
    processes: int | None = None,
    engine: str = "local",
    store: Path = Path("study.sqlite"),
    retry: Annotated[bool, Parameter(negative="")] = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    settings: Annotated[StudySettings, Parameter(name="*", group="Training")] = StudySettings(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Compare norms over batch sizes with paired seeds. "Cannot tell" is an answer.

    Finished runs are kept in the store: the same command goes on after a stop, and one with
    more seeds or variants runs only what is missing.

    Parameters
    ----------
    data
        A data source as for train.
    target
        The label's column of a .csv or .parquet file.
    model
        mlp, convnet, resnet or transformer; several are compared norm by norm in each.
    norm
        Norms to compare; the first is the reference.
    batch_size
        Batch sizes, like 4,16,64; by default the recipe's own.
    norm_position
        before, after, or before,after.
    widths
        Hidden units or channels, like 256,128.
    dropout
        Probabilities, like 0,0.2.
    seeds
        Runs of each variant; by default 8, or as many as it takes to tell anything. With --until,
        those before the first look.
    until
        decided: look at the verdicts as runs come in, and stop each variant when all that is asked
        of it is told, or hopeless. The rate of errors holds over all looks.
    max_seeds
        The most runs of a variant with --until.
    against
        first: judge each norm beside the first one; all: judge every pair.
    lr
        recipe; tune, on validation data, with as many trials for each variant; or a number.
    grid
        The learning rates that tune tries.
    tuner
        grid, or optuna, which tries rates between the grid's ends and needs the extra tune.
    trials
        How many rates optuna tries for each variant; by default as many as the grid has.
    tuning_seeds
        Seeds for each of them; they are not judged.
    metric
        test_accuracy, test_loss, valid_accuracy or valid_loss.
    margin
        Differences up to this count as none, like 0.005 for half a point of accuracy.
    goal
        Validation accuracy to which epochs and seconds are counted; by default 0.99 of the best
        variant's.
    processes
        Worker processes, each on one thread; by default one for each core.
    engine
        local, or ray: a Ray cluster, which needs the extra cluster.
    store
        The SQLite file of finished runs.
    retry
        Run again what failed.
    out
        A report: .html, .md, .csv (of all runs) or .json.
    quiet
        Print nothing but the result.
    """
    check_file(out)
    from truenorm.report import study as report

    report.kind_of(out)
    from truenorm.studies.compare import compare as compare_variants

    given = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    changes = {
        "norm_position": listed(norm_position),
        "widths": widths_of(widths),
        "dropout": numbers("dropout", dropout),
        **given,
    }
    with report.following(store, quiet=quiet, as_json=json) as observe:
        study = compare_variants(
            data,
            norms=listed(norm),
            batch_sizes=None if batch_size is None else integers("batch_size", batch_size),
            seeds=seeds,
            until=until,
            max_seeds=max_seeds,
            against=against,
            model=listed(model),
            lr=rate(lr),
            metric=metric,
            margin=margin,
            recipe=recipe,
            changes=changes,
            target=target,
            grid=numbers("grid", grid),
            tuner=tuner,
            trials=trials,
            tuning_seeds=tuning_seeds,
            goal=goal,
            processes=processes,
            engine=engine,
            store=store,
            retry=retry,
            observe=observe,
        )
    if out is not None:
        report.write(study, out)
    report.result(study, out, as_json=json)
    return DONE


def claims(
    *names: str,
    quick: Annotated[bool, Parameter(negative="")] = False,
    list: Annotated[bool, Parameter(negative="")] = False,
    data: str = "mnist",
    target: str | None = None,
    seeds: int | None = None,
    processes: int | None = None,
    store: Path = Path("claims.sqlite"),
    retry: Annotated[bool, Parameter(negative="")] = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Put the claims made for batch norm to the test: supported, refuted, or cannot tell.

    Parameters
    ----------
    names
        Claims, as --list names them; by default all.
    quick
        Fewer seeds, examples and settings; what was given up is printed.
    list
        Print all claims and end.
    data
        A data source as for train; the claims on convolutions need images.
    target
        The label's column of a .csv or .parquet file.
    seeds
        Runs of each variant, in place of each claim's own number.
    processes
        Worker processes, each on one thread; by default one for each core.
    store
        The SQLite file of finished runs; the same command goes on after a stop.
    retry
        Run again what failed.
    out
        A report: .html, .md or .json.
    quiet
        Print nothing but the findings.
    """
    from truenorm.report import claims as report

    if list:
        report.listed(as_json=json)
        return DONE
    check_file(out)
    report.kind_of(out)
    from truenorm.studies.claims.testing import claims as put_to_test

    with report.following(store, quiet=quiet, as_json=json) as observe:
        found = put_to_test(
            names,
            data=data,
            target=target,
            quick=quick,
            seeds=seeds,
            processes=processes,
            store=store,
            retry=retry,
            observe=observe,
            found=None if json else report.finding,
        )
    if out is not None:
        report.write(found, out)
    if json:
        from truenorm.files import to_json

        print(to_json(found.to_json()))
        return DONE
    report.left_out(found)
    if out is not None:
        print(out)
    return DONE
