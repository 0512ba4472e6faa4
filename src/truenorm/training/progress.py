"""A training shown as it runs, in a terminal or a notebook: a line an epoch over a bar."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from truenorm.training.history import Epoch, EpochProgress, Observer


@contextlib.contextmanager
def shown(console: Console, total: int | None) -> Iterator[Observer]:
    """Show a training while the body runs it: yields what observes progress.

    In a terminal, or a notebook with ipywidgets, a bar with rate and time left stands under the
    epochs' lines; elsewhere, and where CI is set, there are the lines alone.

    Args:
        console: where to.
        total: examples of all epochs, if that is known.
    """
    bar = Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not _lively(console),
    )
    task = bar.add_task("", total=total, epoch="", rate="")
    done = 0  # in the epochs before

    def observe(progress: EpochProgress) -> None:
        nonlocal done
        if progress.record is not None:
            console.print(line_of(progress.record, progress.epochs))
        speed = bar.tasks[task].speed
        bar.update(
            task,
            completed=done + progress.done,
            epoch=f"{progress.epoch}/{progress.epochs}",
            rate=f"{speed:,.0f} examples/s" if speed else "",
        )
        if progress.record is not None:
            done += progress.done

    with bar:
        yield observe


def _lively(console: Console) -> bool:
    if os.environ.get("CI"):
        return False
    if console.is_jupyter:  # where rich draws bars by widgets
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


def line_of(record: Epoch, epochs: int) -> str:
    """An epoch in a line; rich's markup."""
    mark = "  [green]* best[/green]" if record.best else ""
    width = len(str(epochs))
    accuracy = record.valid_accuracy
    told = "" if math.isnan(accuracy) else f"  val accuracy {accuracy:7.2%}"
    return (
        f"epoch {record.epoch:{width}}/{epochs}  train loss {record.train_loss:.4f}  "
        f"val loss {record.valid_loss:.4f}{told}  {record.seconds:6.1f} s{mark}"
    )
