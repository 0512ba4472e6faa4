"""What the kernels cost: forward + backward, paired with torch's own in turn, on the same tensors.

torch's arm is ``torch.nn.functional.batch_norm``, followed by an addition and an in-place ReLU
where the form has them. Ours is the same function under ``truenorm.accelerate()`` for batch norm
alone, and ``truenorm.kernels.fused.batch_norm_act`` for the fused forms. Every time holds the
gradients of input, weight, bias and residual.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
import truenorm
from truenorm.kernels import fused, ops

LARGE = [(64, 32, 28, 28), (32, 64, 56, 56), (8, 256, 56, 56), (128, 64, 32, 32)]
FORMS = ("BN", "BN + ReLU", "BN + add + ReLU")


class Group(NamedTuple):
    """Inputs with one target for each form; None for none."""

    name: str
    shapes: list[tuple[int, ...]]
    targets: tuple[float | None, ...]
    last: bool = False
    training: bool = True


GROUPS = [
    Group("large, contiguous", LARGE, (2.5, 4, 4)),
    Group("large, channels_last", LARGE, (1.3, 2, 2.2), last=True),
    Group("small maps", [(128, 512, 4, 4), (64, 256, 7, 7)], (2, 2.5, 2.5)),
    Group("rows", [(512, 512), (4096, 1024), (65536, 256)], (1.5, 2, None)),
    Group("small", [(64, 128), (16, 32)], (1.1, 1.4, None)),
    Group("inference", LARGE, (1, 1.8, 2), training=False),
]


def arms(
    shape: tuple[int, ...], form: str, *, last: bool, training: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One call of torch's way and of ours."""
    x, grad, residual = (torch.randn(shape) for _ in range(3))
    if last:
        x, grad, residual = (t.to(memory_format=torch.channels_last) for t in (x, grad, residual))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    leaves = (x, weight, bias, *((residual,) if "add" in form else ()))
    for leaf in leaves:
        leaf.requires_grad_(training)

    def norm() -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)

    def theirs() -> Tensor:
        out = norm()
        if "add" in form:
            out = out.add_(residual)
        return torch.relu_(out) if "ReLU" in form else out

    def ours() -> Tensor:
        if form == "BN" or (len(leaves) == 3 and x.numel() <= fused.SMALL):
            return theirs()
        return fused.batch_norm_act(
            x,
            (weight, bias),
            (mean, var),
            1e-5,
            momentum=0.1 if training else None,
            act="relu",
            residual=residual if "add" in form else None,
        )[0]

    def whole(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            out = call()
            if training:
                torch.autograd.grad(out, leaves, grad)

        return run

    return whole(theirs), whole(ours)


def timed(call: Callable[[], None], times: int) -> float:
    """Microseconds of one call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times * 1e6


def paired(
    theirs: Callable[[], None], ours: Callable[[], None], rounds: int
) -> tuple[list[float], list[float], list[float]]:
    """Ratio torch / ours of each round, and the times of both."""
    theirs(), ours()
    times = max(2, int(10_000 / max(1.0, timed(theirs, 3))))
    ratios, of_torch, of_ours = [], [], []
    for _ in range(rounds):
        first = timed(theirs, times)
        with truenorm.accelerate():
            mine = timed(ours, times)
        second = timed(theirs, times)
        ratios.append((first + second) / 2 / mine)
        of_torch.append((first + second) / 2)
        of_ours.append(mine)
    return ratios, of_torch, of_ours


def main() -> None:
    """Measure all on two threads and on one, print the tables and keep them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--threads", type=int, nargs="*", default=[2, 1])
    told = options.parse_args()
    about = harness.provenance("python bench/kernels.py")
    ops.keep_freed_memory()  # for both: else the system's clearing of pages is what is measured
    lines, rows = [f"Kernels for {ops.kernels().instructions}."], []
    for threads in told.threads:
        torch.set_num_threads(threads)
        lines += [
            "",
            f"{threads} threads, n = {told.rounds} rounds; torch / ours, median (range); "
            "microseconds are medians. The process keeps the memory that is freed, for both.",
            "",
            "| input | form | torch us | ours us | paired ratio | target |",
            "|---|---|---|---|---|---|",
        ]
        for group in GROUPS:
            for shape in group.shapes:
                for form, target in zip(FORMS, group.targets, strict=True):
                    if target is None:
                        continue
                    with torch.set_grad_enabled(group.training):
                        pair = arms(shape, form, last=group.last, training=group.training)
                        ratios, theirs, ours = paired(*pair, told.rounds)
                    ratio = statistics.median(ratios)
                    rows.append({"threads": threads, "group": group.name, "input": shape,
                                 "form": form, "ratios": ratios})  # fmt: skip
                    met = "met" if ratio >= target else "missed"
                    lines.append(
                        f"| {shape} {group.name.partition(', ')[2]} | {form}"
                        f"{'' if group.training else ', inference'} | "
                        f"{statistics.median(theirs):.0f} | {statistics.median(ours):.0f} | "
                        f"{harness.spread(ratios)} | {target}, {met} |"
                    )
                    print(lines[-1], flush=True)
    harness.save("kernels", "\n".join([*lines, ""]), {"provenance": about, "rows": rows})


if __name__ == "__main__":
    main()
