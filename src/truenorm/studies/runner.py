"""Trials -> rows: from the store where they are, else from processes and into the store."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from truenorm.data.datasets import Uncut
from truenorm.errors import InputError, choose
from truenorm.kernels.ops import kernels
from truenorm.studies.cluster import RayPool
from truenorm.studies.store import Store
from truenorm.studies.trial import Row, Trial
from truenorm.studies.workers import WorkerPool, default_processes

ENGINES = ("local", "ray")


class StudyProgress(NamedTuple):
    """What an observer is told: runs and optimizer steps, done and in all, and the newest row.

    ``row`` is None for the rows that the store held already, told of together, and where there
    is a ``note``: something to know before the end.
    """

    runs: int
    total_runs: int
    steps: int
    total_steps: int
    row: Row | None
    note: str = ""


StudyObserver = Callable[[StudyProgress], None]


@contextlib.contextmanager
def runner_of(
    uncut: Uncut,
    examples: int,
    store: Path | str | None,
    processes: int | None,
    *,
    engine: str = "local",
    retry: bool = False,
    observe: StudyObserver | None = None,
) -> Iterator[Runner]:
    """What runs trials over ``uncut`` and keeps their rows, until the body ends."""
    kernels()  # what no run could use is refused once, not by every run
    pool = _pool(engine, uncut, processes)
    with Store(None if store is None else Path(store)) as opened, pool:
        yield Runner(opened, pool, uncut.fingerprint(), examples, retry, observe)


@dataclass
class Runner:
    """Gets rows: from the store where they are, else from the pool and into the store."""

    store: Store
    pool: WorkerPool | RayPool
    fingerprint: str
    examples: int
    retry: bool
    observe: StudyObserver | None

    def expect(self, runs: int) -> None:
        """Say how many runs there will be."""
        self.total_runs, self.runs, self.steps = runs, 0, 0

    def expect_more(self, runs: int) -> None:
        """Say how many runs there will be at most beside those that are done."""
        self.total_runs = self.runs + runs

    def note(self, text: str) -> None:
        """Tell the observer something to know before the end."""
        if self.observe is not None:
            self.observe(
                StudyProgress(self.runs, self.total_runs, self.steps, self.steps, None, text)
            )

    def rows(self, trials: Iterable[Trial], ahead: Sequence[Trial] = ()) -> list[Row]:
        """The rows of ``trials``, in their order; ``ahead`` are about as long as what follows."""
        asked = {trial.key(self.fingerprint): trial for trial in trials}
        found = self.store.rows(asked)
        if self.retry:
            found = {key: row for key, row in found.items() if row.error is None}
        missing = {trial: key for key, trial in asked.items() if key not in found}
        left = sum(map(self._steps, [*missing, *ahead]))
        self.runs += len(found)
        self._tell(left, None)
        # A seed's variants together, so that a worker cuts the data once; long runs first.
        order = sorted(missing, key=lambda t: (t.config.seed, -self._steps(t)))
        for trial, row in self.pool.run(order):
            self.store.add(missing[trial], trial, row)
            found[missing[trial]] = row
            self.runs += 1
            self.steps += self._steps(trial)
            left -= self._steps(trial)
            self._tell(left, row)
        return [
            dataclasses.replace(found[key], variant=trial.variant) for key, trial in asked.items()
        ]

    def _steps(self, trial: Trial) -> int:
        examples = trial.examples or self.examples
        return trial.config.epochs * math.ceil(examples / trial.config.batch_size)

    def _tell(self, left: int, row: Row | None) -> None:
        if self.observe is not None:
            self.observe(
                StudyProgress(self.runs, self.total_runs, self.steps, self.steps + left, row)
            )


def _pool(engine: str, uncut: Uncut, processes: int | None) -> WorkerPool | RayPool:
    """What runs the trials; of a cluster None processes are as many as it has cores."""
    if processes is not None and processes < 0:
        raise InputError(f"processes must be at least 0, got {processes!r}.")
    choose("engine", engine, ENGINES)
    if engine == "ray":
        return RayPool(uncut, processes)
    return WorkerPool(uncut, default_processes() if processes is None else processes)
