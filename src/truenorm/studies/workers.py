"""Trials on many processes: each loads torch once, runs on one thread, and maps the same data.

A worker reads a line of JSON for each trial and answers with a line for each row. Unlike
multiprocessing's it needs nothing of the caller's ``__main__``, so scripts and notebooks can
start studies alike; and it ends when its standard input does, so that none outlives a parent
that was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from truenorm.data.datasets import Dataset, Scaling, Uncut
from truenorm.data.preparation import columns_of
from truenorm.studies.bench import Bench
from truenorm.studies.trial import ATTEMPTS, Row, Trial, failed

# The caller's import path, so that a worker imports the very same packages.
_START = """
import json, pathlib, sys
sys.path[:] = json.loads(sys.argv[2])
from truenorm.studies.workers import serve
serve(pathlib.Path(sys.argv[1]))
"""
_PARTS = ("train", "test", "valid")


def default_processes() -> int:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# Data ----------------------------------------------------------------------------------------


def write_data(data: Uncut, path: Path) -> None:
    """Write ``data`` so that workers can map it."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"scaling": data.scaling.to_json() if data.scaling else None}
    for name in _PARTS:
        part: Dataset | None = getattr(data, name)
        if part is None:
            continue
        held = {"x": part.x, "y": part.y, "weight": part.weight}
        # Copied, because safetensors takes no two tensors of one memory, as slices are.
        tensors |= {f"{name}.{k}": v.contiguous().clone() for k, v in held.items() if v is not None}
        columns = None if part.columns is None else [asdict(c) for c in part.columns]
        about[name] = {"classes": part.classes, "name": part.name, "columns": columns}
    safetensors.torch.save_file(tensors, path, {"about": json.dumps(about, default=str)})


def map_data(path: Path) -> Uncut:
    """Undo :func:`write_data`; all processes share the pages of the file."""
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    parts = {
        name: Dataset(
            tensors[f"{name}.x"],
            tensors[f"{name}.y"],
            tuple(about[name]["classes"]),
            tensors.get(f"{name}.weight"),
            name=about[name]["name"],
            columns=columns_of(about[name]["columns"]),
        )
        for name in _PARTS
        if name in about
    }
    scaling = None if about["scaling"] is None else Scaling.from_json(about["scaling"])
    return Uncut(parts["train"], parts.get("test"), parts.get("valid"), scaling)


# The parent's side ---------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    """A process, what it is busy with, and where it complains."""

    process: subprocess.Popen[str]
    complaints: IO[bytes]
    busy: tuple[Trial, int] | None = None  # and which attempt this is

    @classmethod
    def start(cls, data: Path) -> _Worker:
        single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        complaints = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(data), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, **single},
        )
        return cls(process, complaints)

    def ask(self, trial: Trial, attempt: int) -> None:
        self.busy = (trial, attempt)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died; the end of its answers will tell
            self.process.stdin.write(json.dumps(trial.to_json()) + "\n")
            self.process.stdin.flush()

    def listen(self, answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        """Pass on every answer, and None at the end."""
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed by stop(), or half a line at the end
            for line in self.process.stdout:
                answers.put((self, json.loads(line)))
        answers.put((self, None))

    def stop(self) -> str:
        """Kill it, and return how it ended and the last it said."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self.complaints.seek(0)
        said = self.complaints.read().decode(errors="replace").strip().splitlines()
        self.complaints.close()
        return f"status {status}" + (f": {said[-1]}" if said else "")


@dataclass(eq=False)
class WorkerPool:
    """Worker processes over ``data``; a context manager that leaves none behind.

    ``count`` 0 is no process at all: trials are run in this one.
    """

    data: Uncut
    count: int
    workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> WorkerPool:
        self._bench = Bench(self.data)
        self._folder = tempfile.TemporaryDirectory(prefix="truenorm-", ignore_cleanup_errors=True)
        self._path = Path(self._folder.name) / "data.safetensors"
        self._answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]
        self._answers = queue.SimpleQueue()
        self._idle: list[_Worker] = []
        self._stillborn = 0  # workers in a row that died before they were ready
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()
        self._folder.cleanup()

    def run(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Row]]:
        """Run ``trials`` and yield each with its row, as they come.

        Raises:
            RuntimeError: workers do not start.
        """
        waiting = deque((trial, 1) for trial in trials)
        if self.count == 0:
            yield from ((trial, self._bench.perform(trial)) for trial, _ in waiting)
            return
        left = len(waiting)
        while left:
            self._employ(waiting, left)
            worker, answer = self._answers.get()
            if worker not in self.workers:
                continue
            if answer is None:
                lost = self._bury(worker, waiting)
                if lost is not None:
                    left -= 1
                    yield lost
                continue
            self._stillborn = 0
            self._idle.append(worker)
            if worker.busy is not None:
                trial, worker.busy = worker.busy[0], None
                left -= 1
                yield trial, Row.from_json(answer)

    def _employ(self, waiting: deque[tuple[Trial, int]], left: int) -> None:
        """Start the workers that are lacking, and give the idle ones something to do."""
        if not self._path.exists():
            write_data(self.data, self._path)
        while len(self.workers) < min(self.count, left):
            worker = _Worker.start(self._path)
            self.workers.append(worker)
            threading.Thread(target=worker.listen, args=(self._answers,), daemon=True).start()
        while waiting and self._idle:
            self._idle.pop().ask(*waiting.popleft())

    def _bury(self, worker: _Worker, waiting: deque[tuple[Trial, int]]) -> tuple[Trial, Row] | None:
        """Take a dead worker off the books; its run waits again, or is lost."""
        self.workers.remove(worker)
        how = worker.stop()
        if worker in self._idle:
            self._idle.remove(worker)
            return None
        if worker.busy is None:
            self._stillborn += 1
            if self._stillborn > 3 * self.count:
                raise RuntimeError(f"the study's worker processes do not start ({how})")
            return None
        trial, attempt = worker.busy
        if attempt < ATTEMPTS:
            waiting.appendleft((trial, attempt + 1))
            return None
        return trial, failed(trial, f"its worker process died {attempt} times ({how})")


# The worker's side ---------------------------------------------------------------------------


def serve(data: Path) -> None:
    """Answer every trial on stdin with a row on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    trials: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(trials, data.parent), daemon=True).start()
    torch.set_num_threads(1)
    bench = Bench(map_data(data))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    while True:
        row = bench.perform(Trial.from_json(json.loads(trials.get())))
        print(json.dumps(row.to_json()), file=answers, flush=True)


def _read(trials: queue.SimpleQueue[str], folder: Path) -> None:
    for line in sys.stdin:
        trials.put(line)
    # The parent was killed: nobody would read the row of the run at work, or clear up.
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
