"""truenorm compare and truenorm claims."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from truenorm.cli.options import (
    DONE,
    Json,
    Label,
    ReadingOptions,
    StudySettings,
    check_file,
    integers,
    listed,
    numbers,
    options_class,
    rate,
    reading_of,
    widths_of,
)
from truenorm.studies.plan import StudyPlan

_FLAGS: dict[str, str | list[str]] = {  # of what is not named as its field
    "norms": "--norm",
    "batch_sizes": "--batch-size",
    "target": ["--target", "--label"],
}
# The fields that a text stands for on the command line, and what reads it.
_READ: dict[str, Callable[[str], Any]] = {
    "model": listed,
    "norms": listed,
    "batch_sizes": functools.partial(integers, "batch_size"),
    "lr": rate,
    "grid": functools.partial(numbers, "grid"),
}


def _plan_options() -> type[Any]:
    """StudyPlan with texts where a field takes several values; without ``changes``."""
    hints = {**typing.get_type_hints(StudyPlan), "seeds": int | None}
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(StudyPlan):
        if f.name == "changes":
            continue
        kind, default = hints[f.name], f.default
        if f.name in _READ:
            kind = str if default is not None else str | None
            default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        option = Parameter(name=_FLAGS.get(f.name), help=f.metadata["help"])
        fields.append((f.name, Annotated[kind, option], dataclasses.field(default=default)))
    return options_class("PlanOptions", __name__, fields)


PlanOptions = _plan_options()


def _plan(options: Any, changes: dict[str, Any]) -> StudyPlan:
    """The plan that the command line's ``options`` ask for."""
    fields = dataclasses.asdict(options)
    for name, read in _READ.items():
        if fields[name] is not None:
            fields[name] = read(fields[name])
    return StudyPlan(**fields, changes=changes)


def compare(
    *,
    data: str = "mnist",
    reading: Annotated[ReadingOptions, Parameter(name="*", group="Reading")] = ReadingOptions(),  # type: ignore[valid-type]  # noqa: B008
    plan: Annotated[PlanOptions, Parameter(name="*", group="Study")] = PlanOptions(),  # type: ignore[valid-type]  # noqa: B008
    norm_position: Annotated[str, Parameter(group="Study")] = "before",
    widths: Annotated[str | None, Parameter(group="Study")] = None,
    dropout: Annotated[str, Parameter(group="Study")] = "0",
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
    norm_position
        before, after, or before,after.
    widths
        Hidden units or channels, like 256,128.
    dropout
        Probabilities, like 0,0.2.
    processes
        Worker processes, each on one thread; by default one for each core, and 0 runs all in this
        one.
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

    changes = {
        "norm_position": listed(norm_position),
        "widths": widths_of(widths),
        "dropout": numbers("dropout", dropout),
        **{k: v for k, v in dataclasses.asdict(settings).items() if v is not None},
    }
    with report.following(store, quiet=quiet, as_json=json) as observe:
        study = compare_variants(
            data,
            _plan(plan, changes),
            processes=processes,
            engine=engine,
            store=store,
            retry=retry,
            observe=observe,
            reading=reading_of(reading),
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
    target: Label = None,
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
        Worker processes, each on one thread; by default one for each core, and 0 runs all in this
        one.
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

    with report.following(store, quiet=quiet, as_json=json) as tell:
        found = put_to_test(
            names,
            data=data,
            target=target,
            quick=quick,
            seeds=seeds,
            processes=processes,
            store=store,
            retry=retry,
            observe=tell.observe,
            found=tell.found,
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
