"""What was folded and exported, as a person sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from truenorm.files import to_json
from truenorm.folding.export import Exported
from truenorm.folding.fold import Folded, FoldObserver
from truenorm.folding.whole import FoldProgress

_LOUD = 0.01  # of the original's own rounding: beyond it the error in its dtype says nothing


@contextlib.contextmanager
def following(*, as_json: bool) -> Iterator[FoldObserver]:
    """Show a fold while the body proves it: in a terminal a bar over all that is compared."""
    console = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("proving"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=as_json or not console.is_terminal or bool(os.environ.get("CI")),
    )
    task = bar.add_task("each pair", total=None)

    def observe(progress: FoldProgress) -> None:
        told = progress.label
        bar.update(task, completed=progress.done, total=progress.total, description=told)

    with bar:
        yield observe


def folded(found: Folded, out: Path | None, *, as_json: bool) -> None:
    """Print each pair with its error, what was left and why, and the error from end to end."""
    if as_json:
        print(to_json({**found.to_dict(), "out": None if out is None else str(out)}))
        return
    console = Console(highlight=False, soft_wrap=True)
    _pairs(console, found)
    exact = "" if found.exact is None else f", {found.exact:.1e} in float64"
    if found.pairs:
        console.print(
            f"largest error from end to end: {found.error:.1e} of the largest output{exact}; "
            f"proved on {', '.join(found.proved)}",
            markup=False,
        )
    _told(console, found)
    if out is not None:
        console.print(str(out), markup=False)


def exported(found: Exported, *, as_json: bool) -> None:
    """Print what was folded, and how far the file's outputs are from the model's."""
    if as_json:
        print(to_json(found.to_dict()))
        return
    console = Console(highlight=False, soft_wrap=True)
    if found.folded is not None:
        _pairs(console, found.folded)
    batch = "any batch size" if found.batch == "dynamic" else f"batches of {found.batch} only"
    console.print(
        f"{found.path}: {found.format}, {batch}; run and compared, largest error "
        f"{found.error:.1e} of the largest output",
        markup=False,
    )


def _told(console: Console, found: Folded) -> None:
    """What the proof does not cover."""
    if found.noise is not None and found.noise > _LOUD:
        console.print(
            f"rounding alone moves the original's outputs by {found.noise:.1e}: the error says "
            "nothing, and the proof is that in float64"
        )
    for name in found.changed:
        console.print(f"changed: the method {name} is another function", markup=False)
    for told in found.unproved:
        console.print(f"not proved: {told}", markup=False)


def _pairs(console: Console, found: Folded) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("norm", "becomes", "error"):
        table.add_column(name, justify="right" if name == "error" else "left", overflow="fold")
    for pair in found.pairs:
        whole = "a scale and shift" if pair.form == "scale and shift" else f"part of {pair.into}"
        table.add_row(pair.norm or "(model)", whole, f"{pair.error:.1e}")
    for left in found.left:
        table.add_row(left.norm or "(model)", f"left: {left.reason}", "")
    console.print(table)
    console.print(f"{len(found.pairs)} folded, {len(found.left)} left")
