"""Cases that need several processes: each is run by ranks of its own, over gloo, on this machine.

``gloo.py FOLDER`` runs every case of ``ranked()`` and leaves FOLDER/NUMBER-RANK.txt: what the case
raised on that rank, or nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from conformance.cases import Case, Wanting

PATIENCE = 20  # seconds, after which a rank that waits for another gives up


@dataclass(frozen=True)
class Ranked:
    """A function that each of ``world`` ranks runs; it raises where something is wrong."""

    suite: str
    subject: str
    check: str
    world: int
    work: Callable[[], None]

    def case(self, found: Callable[[], list[str]]) -> Case:
        def run() -> None:
            wrong = [f"rank {rank}: {text}" for rank, text in enumerate(found()) if text]
            if wrong:
                raise Wanting("; ".join(wrong))

        return Case(self.suite, self.subject, self.check, f"{self.world} ranks", run)


def ranked() -> list[Ranked]:
    """All of them."""
    from conformance import apex, detectron2, flax, torch_ranks

    return [it for suite in (torch_ranks, apex, detectron2, flax) for it in suite.ranked()]


def cases(suites: tuple[str, ...] = ()) -> Iterator[Case]:
    """A case for each of ``suites`` (all, without any); the first that is run starts the ranks."""
    listed = [it for it in ranked() if not suites or it.suite in suites]
    results: dict[int, list[str]] = {}

    def found(number: int) -> list[str]:
        if not results:
            results.update(enumerate(_run(listed, suites)))
        return results[number]

    for number, it in enumerate(listed):
        yield it.case(partial(found, number))


def _run(listed: list[Ranked], suites: tuple[str, ...]) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, *suites]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return [
            [_text(Path(folder, f"{number}-{rank}.txt"), last[0]) for rank in range(it.world)]
            for number, it in enumerate(listed)
        ]


def _text(file: Path, last: str) -> str:
    return file.read_text() if file.exists() else f"has ended without a word ({last})"


def _on_rank(folder: Path, number: int, it: Ranked, rank: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=(folder / f"store-{number}").as_uri(),
        rank=rank,
        world_size=it.world,
        timeout=timedelta(seconds=PATIENCE),
    )
    text = ""
    dist.barrier()  # all are connected before any can end
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            it.work()
        dist.barrier()
    except BaseException as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    (folder / f"{number}-{rank}.txt").write_text(text)
    os._exit(0)  # no waiting for ranks that failed


def main(folder: Path, suites: tuple[str, ...]) -> None:
    """Fork the ranks of each case and wait for them; torch is imported once, before."""
    fork = multiprocessing.get_context("fork")
    for number, it in enumerate(i for i in ranked() if not suites or i.suite in suites):
        processes = [
            fork.Process(target=_on_rank, args=(folder, number, it, rank))
            for rank in range(it.world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(3 * PATIENCE)
            process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]))
