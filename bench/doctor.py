"""What the doctor costs: ``watch`` around training steps, and ``examine`` on eight batches.

Targets: a watched step within 1.05 of a plain one; ``examine(model, 8 batches)`` within 3 times
eight forward and backward passes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
import truenorm

BATCHES = 8
WATCH_TARGET, EXAMINE_TARGET = 1.05, 3.0


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them, as in ResNet-18 (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride > 1:
            short = nn.Conv2d(before, after, 1, stride, bias=False)
            self.around = nn.Sequential(short, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, after, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.around(x))


def resnet18() -> nn.Module:
    """ResNet-18's shape for images of 32x32: 20 batch norms, 11.2 million parameters."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [
        Block(before, after, 1 + (before != after)) for before, after in itertools.pairwise(widths)
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp() -> nn.Module:
    """784-256-128-10 with two batch norms: the main job's size."""
    return nn.Sequential(
        nn.Linear(784, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, the shape of its batches, and the training steps of one timing."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int


def main() -> None:
    """Measure all, print the tables and keep them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--small", action="store_true", help="few steps, to see that it works")
    told = options.parse_args()
    cases = [
        Case("ResNet-18, (32, 3, 32, 32)", resnet18, (32, 3, 32, 32), 2 if told.small else 20),
        Case("MLP, (128, 784)", mlp, (128, 784), 200 if told.small else 2000),
        Case("MLP, (32, 784)", mlp, (32, 784), 200 if told.small else 2000),
    ]
    about = harness.provenance("python bench/doctor.py" + " --small" * told.small)
    rows = [_watched(case, told.rounds) for case in cases]
    examined = _examined(cases[0], told.rounds)
    text = _text(rows, examined, told.rounds)
    harness.save("doctor", text, {"provenance": about, "watch": rows, "examine": examined})


def _watched(case: Case, rounds: int) -> dict[str, Any]:
    """Steps without, with and without a ledger, in turn; a new ledger each time."""
    torch.manual_seed(0)
    model = case.make().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = _batches(case)

    def plain() -> float:
        return _seconds(lambda: _train(model, optimizer, data, case.steps))

    def under_a_ledger() -> float:
        with truenorm.watch(model, optimizer):
            return plain()

    ratios, seconds = _paired(plain, under_a_ledger, rounds)
    return {"case": case.name, "steps": case.steps, "ratios": ratios,
            "plain_ms_per_step": 1e3 * seconds / case.steps}  # fmt: skip


def _examined(case: Case, rounds: int) -> dict[str, Any]:
    """Eight forwards and backwards, ``examine`` on as many batches, and the first again."""
    torch.manual_seed(0)
    model = case.make()
    data = _batches(case)
    _train(model.train(), torch.optim.SGD(model.parameters(), lr=0.01), data, 2)

    def passes() -> float:
        return _seconds(lambda: [F.cross_entropy(model(x), y).backward() for x, y in data])

    def examination() -> float:
        return _seconds(lambda: truenorm.examine(model, data))

    ratios, seconds = _paired(passes, examination, rounds)
    return {"case": case.name, "ratios": ratios, "passes_seconds": seconds}


def _paired(
    plain: Callable[[], float], other: Callable[[], float], rounds: int
) -> tuple[list[float], float]:
    """Ratios of ``other`` to the mean of its neighbours, and the median of these in seconds."""
    timed = [(plain(), other(), plain()) for _ in range(rounds + 1)][1:]  # the first warms up
    ratios = [middle / ((before + after) / 2) for before, middle, after in timed]
    return ratios, statistics.median([x for before, _, after in timed for x in (before, after)])


def _text(rows: list[dict[str, Any]], examined: dict[str, Any], rounds: int) -> str:
    head = (
        f"{torch.get_num_threads()} threads, n = {rounds} rounds of plain, with the doctor, plain; "
        "the ratio is to the mean of its neighbours, as median (range)."
    )
    lines = [
        head, "",
        "`truenorm.watch` around training steps; a new ledger in each round:", "",
        "| model and batch | steps a round | plain, ms a step | paired ratio | target |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['steps']} | {row['plain_ms_per_step']:.3g} "
            f"| {harness.spread(row['ratios'])} | {_told(row['ratios'], WATCH_TARGET)} |"
        )
    lines += [
        "", f"`truenorm.examine(model, {BATCHES} batches)` against {BATCHES} forwards and "
        "backwards:", "",
        "| model and batch | passes, s | paired ratio | target |",
        "|---|---|---|---|",
        f"| {examined['case']} | {examined['passes_seconds']:.3g} "
        f"| {harness.spread(examined['ratios'])} | {_told(examined['ratios'], EXAMINE_TARGET)} |",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _told(ratios: list[float], target: float) -> str:
    return f"<= {target:g}: " + ("yes" if statistics.median(ratios) <= target else "NO")


def _batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(case.shape), torch.randint(10, case.shape[:1])) for _ in range(BATCHES)]


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
