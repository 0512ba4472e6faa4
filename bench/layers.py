"""What the layers cost: forward and backward, paired with torch.nn's and a plain one of ours.

Targets: without an option within 1.05 of torch.nn at (64, 128) and (64, 32, 28, 28); with a mask,
ghost batches, renorm or commit="step" within 1.5 of the plain layer at (64, 32, 28, 28) and within
2.5 at (64, 128).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import harness
import truenorm
from truenorm import Renorm
from truenorm.kernels import ops

SHAPES = {
    "(64, 128)": (torch.contiguous_format, (64, 128), 2000),
    "(64, 32, 28, 28)": (torch.contiguous_format, (64, 32, 28, 28), 30),
    "(64, 32, 28, 28) channels_last": (torch.channels_last, (64, 32, 28, 28), 30),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "act='relu'": {"act": "relu"},
    "min_count=2": {"min_count": 2},
    "ghost=16": {"ghost": 16},
    "renorm": {"renorm": Renorm()},
    "commit='step'": {"commit": "step"},
    "frozen=True": {"frozen": True},
    "mask=, 5 of 64 examples": {},
    "mask=, 3 of 10 positions": {},
}
TARGETS = {"(64, 128)": 2.5, "(64, 32, 28, 28)": 1.5}  # of the plain layer


def main() -> None:
    """Measure all, print the table and keep it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=31)
    told = options.parse_args()
    about = harness.provenance("python bench/layers.py")
    ops.keep_freed_memory()  # for all: else the system's clearing of pages is what is measured
    lines = [
        f"Forward + backward, {torch.get_num_threads()} threads, n = {told.rounds} rounds of "
        "torch.nn, a plain layer of ours, the one in question, plain, torch.nn; the ratio is that "
        "one to the mean of its neighbours, as median (range); microseconds are medians. "
        "act='relu' is compared with torch.nn followed by nn.ReLU, frozen=True with torch.nn in "
        "eval mode without gradients of its own. The process keeps the memory that is freed.",
        "",
        "| input | layer | torch.nn us | ours us | to torch.nn | to the plain layer | target |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for shape, (layout, sizes, calls) in SHAPES.items():
        for name in OPTIONS:
            row = {"input": shape, "layer": name, **_pair(name, layout, sizes, calls, told.rounds)}
            rows.append(row)
            lines.append(
                f"| {shape} | {name} | {row['torch']:.1f} | {row['ours']:.1f} "
                f"| {harness.spread(row['ratios'])} | {harness.spread(row['to_plain'])} "
                f"| {_target(row)} |"
            )
            print(lines[-1], flush=True)
    harness.save("layers", "\n".join([*lines, ""]), {"provenance": about, "rows": rows})


def _target(row: dict[str, Any]) -> str:
    """What is asked of it, and whether it is so; "" for nothing."""
    if row["layer"] == "no option":
        met = statistics.median(row["ratios"]) <= 1.05
        return f"<= 1.05 of torch.nn: {'yes' if met else 'NO'}"
    limit = TARGETS.get(row["input"])
    if limit is None or not row["layer"].startswith(("mask", "ghost", "renorm", "commit")):
        return ""
    met = statistics.median(row["to_plain"]) <= limit
    return f"<= {limit} of plain: {'yes' if met else 'NO'}"


def _pair(
    name: str, layout: torch.memory_format, sizes: tuple[int, ...], calls: int, rounds: int
) -> dict[str, Any]:
    one, two = (nn.BatchNorm1d, nn.BatchNorm2d), (truenorm.BatchNorm1d, truenorm.BatchNorm2d)
    images = len(sizes) == 4
    theirs: nn.Module = one[images](sizes[1])
    if name.startswith("act"):
        theirs = nn.Sequential(theirs, nn.ReLU())
    ours, plain = two[images](sizes[1], **OPTIONS[name]), two[images](sizes[1])
    if name.startswith("frozen"):
        theirs.eval()
        theirs.requires_grad_(False)
    x = torch.randn(sizes).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(sizes).contiguous(memory_format=layout)
    mask = None
    if name.startswith("mask"):
        examples = torch.arange(sizes[0]) < sizes[0] - 5
        mask = examples if "examples" in name else torch.rand(sizes[0], *sizes[2:]) > 0.3

    def their_step() -> None:
        theirs(x).backward(grad)

    def plain_step() -> None:
        plain(x).backward(grad)

    def our_step() -> None:
        ours(x, mask).backward(grad)
        if ours.options.commit == "step":
            ours.commit()

    steps = (their_step, plain_step, our_step, plain_step, their_step)
    seconds = [[_seconds(step, calls) for step in steps] for _ in range(rounds + 1)]
    seconds = seconds[1:]  # the first round warms up
    micro = 1e6 / calls
    return {
        "torch": statistics.median(s for row in seconds for s in (row[0], row[4])) * micro,
        "ours": statistics.median(row[2] for row in seconds) * micro,
        "ratios": [row[2] / ((row[0] + row[4]) / 2) for row in seconds],
        "to_plain": [row[2] / ((row[1] + row[3]) / 2) for row in seconds],
    }


def _seconds(step: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
