"""What the layers cost: forward and backward, paired with torch.nn's in turn.

Target: without an option within 1.05 of torch.nn at (64, 128) and (64, 32, 28, 28). The options
stand beside it without a target.
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
    "mask=": {},
}


def main() -> None:
    """Measure all, print the table and keep it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=31)
    told = options.parse_args()
    about = harness.provenance("python bench/layers.py")
    lines = [
        f"Forward + backward, {torch.get_num_threads()} threads, n = {told.rounds} rounds of "
        "torch.nn, ours, torch.nn; the ratio is ours to the mean of its neighbours, as median "
        "(range); microseconds are medians. act='relu' is compared with torch.nn followed by "
        "nn.ReLU, frozen=True with torch.nn in eval mode without gradients of its own.",
        "",
        "| input | layer | torch.nn us | ours us | paired ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for shape, (layout, sizes, calls) in SHAPES.items():
        for name in OPTIONS:
            row = {"input": shape, "layer": name, **_pair(name, layout, sizes, calls, told.rounds)}
            rows.append(row)
            ratio = statistics.median(row["ratios"])
            target = (
                ("<= 1.05: " + ("yes" if ratio <= 1.05 else "NO")) if name == "no option" else ""
            )
            lines.append(
                f"| {shape} | {name} | {row['torch']:.1f} | {row['ours']:.1f} "
                f"| {harness.spread(row['ratios'])} | {target} |"
            )
            print(lines[-1], flush=True)
    harness.save("layers", "\n".join([*lines, ""]), {"provenance": about, "rows": rows})


def _pair(
    name: str, layout: torch.memory_format, sizes: tuple[int, ...], calls: int, rounds: int
) -> dict[str, Any]:
    one, two = (nn.BatchNorm1d, nn.BatchNorm2d), (truenorm.BatchNorm1d, truenorm.BatchNorm2d)
    images = len(sizes) == 4
    theirs: nn.Module = one[images](sizes[1])
    if name.startswith("act"):
        theirs = nn.Sequential(theirs, nn.ReLU())
    ours = two[images](sizes[1], **OPTIONS[name])
    if name.startswith("frozen"):
        theirs.eval()
        theirs.requires_grad_(False)
    x = torch.randn(sizes).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(sizes).contiguous(memory_format=layout)
    mask = torch.rand(sizes[0], *sizes[2:]) > 0.3 if name == "mask=" else None

    def their_step() -> None:
        theirs(x).backward(grad)

    def our_step() -> None:
        ours(x, mask).backward(grad)
        if ours.options.commit == "step":
            ours.commit()

    a, b, c = [], [], []
    for i in range(rounds + 1):
        seconds = [_seconds(step, calls) for step in (their_step, our_step, their_step)]
        if i:  # the first round warms up
            for kept, second in zip((a, b, c), seconds, strict=True):
                kept.append(second)
    ratios = [mine / ((x + y) / 2) for x, mine, y in zip(a, b, c, strict=True)]
    micro = 1e6 / calls
    torchs, mine = statistics.median([*a, *c]) * micro, statistics.median(b) * micro
    return {"torch": torchs, "ours": mine, "ratios": ratios}


def _seconds(step: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
