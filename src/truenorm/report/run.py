"""What truenorm train prints: progress and a line an epoch, and the result; text or JSON.

With --json, stdout carries one JSON object and nothing else; all that is for people goes to
stderr.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from truenorm.data.preparation import Preparation
from truenorm.files import to_json
from truenorm.training.history import Observer
from truenorm.training.job import Job
from truenorm.training.progress import shown


@contextlib.contextmanager
def following(job: Job, *, quiet: bool, as_json: bool) -> Iterator[Observer | None]:
    """Show a job while the body runs it: yields what observes progress.

    In a terminal a bar with rate and time left stands under the epochs' lines; elsewhere, and
    where CI is set, there are the lines alone.
    """
    with _answered(job):
        if quiet:
            yield None
            return
        console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        _introduce(console, job)
        total = job.request.train.epochs * len(job.splits.train)
        with shown(console, total) as observe:
            yield observe


@contextlib.contextmanager
def _answered(job: Job) -> Iterator[None]:
    """Say at once what Ctrl-C does, for on a busy machine the rest takes seconds."""
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main_thread:
        yield  # another program's own answer, or none wanted
        return

    def answer(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the bar's line
        text = (
            f"{clear}stopping: the best epoch so far is tested and saved; Ctrl-C again leaves at "
            f"once. Continue with: truenorm train --resume {job.run.folder}\n"
        )
        # Not by print: what was interrupted may be writing to the same buffer.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), text.encode(sys.stderr.encoding, "backslashreplace"))
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _introduce(console: Console, job: Job) -> None:
    splits, spec = job.splits, job.request.spec
    config = job.request.train
    sizes = [len(splits.train), len(splits.valid), 0 if splits.test is None else len(splits.test)]
    shape = " x ".join(map(str, splits.input_shape))
    smoothing = config.label_smoothing
    smoothed = f", label smoothing {smoothing:g} (in the train loss)" if smoothing else ""
    weighed = f", class weights {config.class_weight} (in the train and val loss)"
    assert spec is not None
    norm = "its own norms" if spec.norm == "own" else f"norm {spec.norm}"
    for note in splits.notes:
        console.print(note, markup=False)
    if splits.preparation is not None and not splits.preparation.plain:
        console.print(_columns_table(splits.preparation))
    console.print(
        f"{splits.train.name}: {sizes[0]:,} training, {sizes[1]:,} validation and {sizes[2]:,} "
        f"test examples of {shape}, {len(splits.classes)} classes"
    )
    console.print(
        f"{spec.name}, {norm}; {job.request.recipe} recipe: {config.optimizer} "
        f"{config.lr:g} {config.schedule}, batch {config.batch_size}, at most {config.epochs} "
        f"epochs, patience {config.patience}, seed {config.seed}{smoothed}"
        f"{weighed if config.class_weight != 'none' else ''}"
    )
    if job.longer_than is not None:
        console.print(
            f"goes on: {config.epochs} epochs in place of {job.longer_than}; the rate follows "
            f"schedule {config.schedule} over {config.epochs}, and patience counts anew"
        )


def _columns_table(preparation: Preparation) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "kind", "what became of it"):
        table.add_column(heading, overflow="fold")
    for row in preparation.table():
        table.add_row(*map(escape, row))
    return table


NEAR_CHANCE = 0.05  # of balanced accuracy
_STOPPED = {
    "early": "stopped early",
    "finished": "all epochs done",
    "interrupted": "interrupted",
    "nan": "stopped by a loss that is not finite",
}


def result(values: dict[str, Any], *, as_json: bool) -> None:
    """Print the result of a train command, and, on stderr, what there is to mend."""
    if as_json:
        print(to_json(values))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for line in _result_lines(values):
            console.print(line, markup=False)
    if values["fault"]:
        print(f"truenorm: {values['fault']}", file=sys.stderr)


def _result_lines(values: dict[str, Any]) -> Iterator[str]:
    ended = f"{_STOPPED[values['stopped']]} after epoch {values['epochs']}"
    if not values["restored"]:
        yield f"{ended}; no epoch ended with a finite validation loss, so there is nothing to keep"
        yield from _how_to_continue(values)
        return
    yield (
        f"{ended} ({values['fit_seconds']:.1f} s); restored epoch {values['best_epoch']}: "
        f"val loss {values['val_loss']:.4f}, val accuracy {values['val_accuracy']:.2%}"
    )
    if values["test_accuracy"] is not None:
        yield (
            f"test accuracy {values['test_accuracy']:.2%} on {values['test_examples']:,} held-out "
            "examples"
        )
    yield from _beside_accuracy(values)
    yield f"{values['run']}/report.html"
    yield from _how_to_continue(values)


def _beside_accuracy(values: dict[str, Any]) -> Iterator[str]:
    """What accuracy hides; a run of before does not say."""
    if values.get("majority_share") is None:
        return
    share, tested = values["majority_share"], values["test_accuracy"]
    accuracy = values["val_accuracy"] if tested is None else tested
    yield (
        f"balanced accuracy {values['balanced_accuracy']:.2%}, mean F1 {values['macro_f1']:.3f}; "
        f"always answering {values['majority']} would be right for {share:.2%}"
    )
    chance = 1 / len(values["f1"])  # the balanced accuracy of always answering alike
    if accuracy <= share and values["balanced_accuracy"] <= chance + NEAR_CHANCE:
        yield "the model is no better than that: nothing that tells the classes apart was learned"


def _how_to_continue(values: dict[str, Any]) -> Iterator[str]:
    if values["stopped"] == "interrupted":
        yield f"continue with: truenorm train --resume {values['run']}"
