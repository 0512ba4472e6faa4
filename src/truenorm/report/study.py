"""A study as a person sees it: progress, a table, verdicts; HTML, Markdown, CSV and JSON files."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from truenorm.files import to_json
from truenorm.report import pages
from truenorm.report import study_plots as plots
from truenorm.report.pages import page
from truenorm.studies.runner import StudyObserver, StudyProgress
from truenorm.studies.study import Study, Summary
from truenorm.studies.trial import Row
from truenorm.studies.verdicts import with_unit


@contextlib.contextmanager
def following(
    store: Path, *, quiet: bool, as_json: bool, console: Console | None = None
) -> Iterator[StudyObserver | None]:
    """Show a study while the body runs it: yields what to tell of progress.

    In a terminal a bar over all runs with time left; elsewhere, and where CI is set, a line a run.
    What else is printed meanwhile goes by ``console``, which keeps it above the bar.
    """
    if quiet:
        yield None
        return
    console = console or Console(stderr=as_json, highlight=False, soft_wrap=True)
    lively = console.is_terminal and not os.environ.get("CI")
    bar = Bar(
        TextColumn("run {task.fields[runs]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not lively,
    )
    task = bar.add_task("", total=None, runs="")
    done = [0, 0]

    def observe(progress: StudyProgress) -> None:
        done[:] = progress.runs, progress.total_runs
        runs = f"{progress.runs}/{progress.total_runs}"
        if progress.note:
            console.print(progress.note, markup=False)
            return
        if progress.row is not None and (not lively or progress.row.error):
            console.print(f"run {runs}  {_line(progress.row)}", markup=False)
        bar.update(task, completed=progress.steps, total=progress.total_steps, runs=runs)

    try:
        with bar:
            yield observe
    except KeyboardInterrupt:
        if done[1]:
            console.print(
                f"{done[0]} of {done[1]} runs are in {store}; the same command goes on.",
                markup=False,
            )
        raise


def _line(row: Row) -> str:
    start = (
        f"{'tuning ' if row.part == 'tuning' else ''}{row.variant} lr {row.lr:g} seed {row.seed}"
    )
    if row.error:
        return f"{start}: failed: {row.error}"
    figures = [
        "" if row.test_accuracy is None else f"test accuracy {row.test_accuracy:.2%}, ",
        "" if row.valid_loss is None else f"val loss {row.valid_loss:.4f}, ",
        f"{row.epochs} epochs, {row.seconds:.1f} s",
        ", diverged" if row.diverged else "",
    ]
    return f"{start}: {''.join(figures)}"


def result(study: Study, out: Path | None, *, as_json: bool) -> None:
    """Print a study's table and verdicts, or all of it as one JSON object."""
    if as_json:
        print(to_json(study.to_json()))
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, side in _COLUMNS:
        table.add_column(name, justify="left" if side == "left" else "right", no_wrap=True)
    for cells in _cells(study):
        table.add_row(*cells)
    if not console.is_terminal:
        console.width = 160  # whole lines, whatever reads them
    with console.capture() as caught:
        console.print(table)
    plain = Console(highlight=False, soft_wrap=True)
    for line in caught.get().splitlines():
        plain.print(line.rstrip(), markup=False)
    plain.print()
    for line in str(study).splitlines():
        plain.print(line, markup=False)
    for row in study.rows:
        if row.error:
            plain.print(f"failed: {row.variant} seed {row.seed}: {row.error}", markup=False)
    if out is not None:
        plain.print(str(out), markup=False)


_COLUMNS = (
    ("variant", "left"),
    ("n", "right"),
    ("mean", "right"),
    ("sd", "right"),
    ("iq mean", "right"),
    ("val loss", "right"),
    ("lr", "right"),
    ("epochs to goal", "right"),
    ("s to goal", "right"),
    ("diverged", "right"),
    ("failed", "right"),
    ("seconds", "right"),
)


def _cells(study: Study) -> list[list[str]]:
    return [_cells_of(s, study.metric.endswith("accuracy")) for s in study.summaries()]


def _cells_of(s: Summary, share: bool) -> list[str]:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %" if share else f"{value:.4f}"

    goal = "-" if s.epochs_to_goal is None else f"{s.epochs_to_goal:g} ({s.reached}/{s.n})"
    loss = "-" if s.valid_loss is None else f"{s.valid_loss:.4f}"
    return [
        *(s.variant, str(s.n), figure(s.mean), figure(s.sd), figure(s.iqm), loss, f"{s.lr:g}"),
        *(goal, _seconds(s.seconds_to_goal), str(s.diverged), str(s.failed), _seconds(s.seconds)),
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# Files ---------------------------------------------------------------------------------------


def kind_of(out: Path | None) -> str:
    """What the suffix of ``out`` asks for; raises InputError if nothing that can be written."""
    return pages.kind_of(out, _WRITERS)


def write(study: Study, out: Path) -> None:
    """Write a report as its suffix says: .html, .md, .csv (of all runs) or .json.

    Raises:
        InputError: another suffix, or ``out`` cannot be written.
    """
    pages.write(study, out, _WRITERS)


def html(study: Study) -> str:
    """One page that opens offline, in light and in dark."""
    return page(
        "study.html",
        study=study,
        title=_title(study),
        margin=None if study.margin is None else with_unit(study.margin, study.metric),
        note=_table_note(study),
        columns=_COLUMNS,
        table=_cells(study),
        accuracy_svg=plots.by_batch_size(study),
        differences_svg=plots.differences(study),
        rate_svgs=plots.rates(study),
        curve_svgs=plots.curves(study),
        command=command_of(study.provenance["command"]),
        failures=[row for row in study.rows + study.tuning if row.error],
        rows=study.rows,
    )


def markdown(study: Study) -> str:
    """Verdicts, table, provenance."""
    names = [name for name, _ in _COLUMNS]
    sides = [":--" if side == "left" else "--:" for _, side in _COLUMNS]
    lines = [f"# {_title(study)}", "", study.tally(), ""]
    lines += [f"- {text}" for text in study.sentences()]
    lines += ["", _table_note(study), ""]
    lines += ["| " + " | ".join(row) + " |" for row in (names, sides, *_cells(study))]
    lines += ["", "```console", f"$ {command_of(study.provenance['command'])}", "```", ""]
    about = {k: v for k, v in study.provenance.items() if k != "command"}
    lines += [f"- {key}: {value}" for key, value in about.items()]
    return "\n".join(lines) + "\n"


def table(study: Study) -> str:
    """A line of CSV for each run, tuning runs included; without the curves."""
    text = io.StringIO(newline="")
    names = [f.name for f in dataclasses.fields(Row) if f.name not in ("curve", "figures")]
    writer = csv.writer(text, lineterminator="\n")
    goal = ["epochs_to_goal", "seconds_to_goal"]
    writer.writerow([*names, "diverged", *goal])
    for row in study.rows + study.tuning:
        reached = (row.reaches(study.goal) if study.goal else None) or ("", "")
        writer.writerow([*(getattr(row, n) for n in names), row.diverged, *reached])
    return text.getvalue()


_WRITERS: dict[str, Callable[[Study], str]] = {
    ".html": html,
    ".md": markdown,
    ".csv": table,
    ".json": lambda study: to_json(study.to_json(), indent=2) + "\n",
}


def _table_note(study: Study) -> str:
    """What the table's columns mean."""
    goal = "" if study.goal is None else f", {100 * study.goal:.2f} % of validation accuracy,"
    return (
        f"Mean, sd and interquartile mean are of {study.metric.replace('_', ' ')}; val loss is the "
        f"mean best validation loss. Epochs and seconds to the goal{goal} are medians over the "
        "runs that reached it, counted in parentheses; seconds are of one thread."
    )


def _title(study: Study) -> str:
    norms = list(dict.fromkeys(v.spec.norm for v in study.variants))
    models = list(dict.fromkeys(v.spec.name for v in study.variants))
    return f"{', '.join(norms)} norm in {', '.join(models)} on {study.provenance['data']}"


def command_of(command: list[str]) -> str:
    """The command line that does it again."""
    program, *rest = command
    started = ["truenorm"] if program in ("truenorm", "__main__.py") else ["python", program]
    return shlex.join([*started, *rest])
