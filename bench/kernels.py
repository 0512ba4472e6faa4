"""What the kernels cost: forward + backward, paired with torch's own in turn, on the same tensors.

torch's arm is ``torch.nn.functional.batch_norm``, followed by an addition and an in-place ReLU
where the form has them. Ours is the same function under ``truenorm.accelerate()`` for batch norm
alone, and ``truenorm.kernels.fused.batch_norm_act`` for the fused forms. Every time holds the
gradients of input, weight, bias and residual.

The share is that of the machine's copy bandwidth, measured between the arms on tensors that take
as much memory in all: the least that has to be read and written once is x, y (forward), x, dy, dx
(backward), 5 tensors, and 8 with a residual, r, its gradient and y again; a copy of one tensor
moves 2. So the share is 5 / 2, or 8 / 2, of the time of a copy, by our time.

``--compiled`` adds torch.compile's way (inductor), ``--jax PYTHON`` that of JAX in an environment
of its own (``python -m venv jax; jax/bin/pip install jax; ... --jax jax/bin/python``); both as
times of theirs to ours. ``--grid`` measures batch norm alone on 80 inputs: shapes, layouts, dtypes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


def tensors(
    shape: tuple[int, ...],
    form: str,
    *,
    last: bool,
    training: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor]]:
    """x, weight, bias and perhaps a residual, which learn; a gradient; running statistics."""
    x, grad, residual = (torch.randn(shape).to(dtype) for _ in range(3))
    if last:
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x, grad, residual = (t.to(memory_format=layout) for t in (x, grad, residual))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.rand(shape[1], dtype=wide) + 0.5, torch.randn(shape[1], dtype=wide)
    leaves = (x, weight, bias, *((residual,) if "add" in form else ()))
    for leaf in leaves:
        leaf.requires_grad_(training)
    return leaves, grad, (torch.zeros_like(weight), torch.ones_like(weight))


def arms(
    shape: tuple[int, ...],
    form: str,
    *,
    last: bool,
    training: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One call of torch's way and of ours."""
    leaves, grad, running = tensors(shape, form, last=last, training=training, dtype=dtype)
    x, weight, bias = leaves[:3]
    mean, var = (t.detach() for t in running)
    residual = leaves[3] if len(leaves) > 3 else None

    def norm() -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)

    def theirs() -> Tensor:
        out = norm()
        if residual is not None:
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
            residual=residual,
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


class Paired(NamedTuple):
    """Of each round: the ratio torch / ours, microseconds of both, and of copying one tensor."""

    ratios: list[float]
    theirs: list[float]
    ours: list[float]
    copies: list[float]


def paired(
    theirs: Callable[[], None],
    ours: Callable[[], None],
    rounds: int,
    copy: Callable[[], None] | None = None,
) -> Paired:
    """Torch's way, ours, and torch's again, in turn."""
    theirs(), ours()
    times = max(2, int(10_000 / max(1.0, timed(theirs, 3))))
    found = Paired([], [], [], [])
    for _ in range(rounds):
        first = timed(theirs, times)
        with truenorm.accelerate():
            mine = timed(ours, times)
        second = timed(theirs, times)
        found.ratios.append((first + second) / 2 / mine)
        found.theirs.append((first + second) / 2)
        found.ours.append(mine)
        if copy:
            found.copies.append(timed(copy, times))
    return found


def copier(shape: tuple[int, ...], form: str) -> Callable[[], None]:
    """Copies a tensor, a different one each time, of as many as the form has."""
    pairs = itertools.cycle(
        [torch.zeros(2, *shape).unbind() for _ in range(3 if "add" in form else 2)]
    )

    def run() -> None:
        source, target = next(pairs)
        target.copy_(source)

    return run


def compiled(shape: tuple[int, ...], form: str, *, last: bool) -> Callable[[], None]:
    """Torch's way through torch.compile, which is made before it is timed."""
    torch._dynamo.reset()
    leaves, grad, running = tensors(shape, form, last=last, training=True)

    @torch.compile
    def norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5)
        out = out if residual is None else out + residual
        return torch.relu(out) if "ReLU" in form else out

    def run() -> None:
        torch.autograd.grad(norm(*leaves), leaves, grad)

    run()
    return run


def of_jax(python: str, threads: int) -> dict[str, float]:
    """JAX's microseconds, by input and form, from a process of its own."""
    asked = [
        [group.last, list(shape), form]
        for group in GROUPS
        if group.training
        for shape in group.shapes
        for form in FORMS
    ]
    script = Path(__file__).parent / "peers" / "jax_norm.py"
    done = subprocess.run(
        [python, str(script), str(threads)],
        input=json.dumps(asked), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRID: list[tuple[tuple[int, ...], bool]] = [
    ((64, 128), False), ((16, 32), False), ((512, 512), False), ((4096, 1024), False),
    ((32, 64, 50), False), ((8, 16, 2000), False), ((2, 16, 8, 24, 24), False),
    ((2, 16, 8, 24, 24), True),
    *(
        (shape, last)
        for shape in ((128, 512, 4, 4), (64, 256, 7, 7), (64, 32, 28, 28), (8, 256, 56, 56),
                      (1, 16, 224, 224), (4, 1, 64, 64))
        for last in (False, True)
    ),
]  # fmt: skip


def grid(rounds: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Batch norm alone on each input of the grid, in each dtype."""
    lines = [
        "",
        f"The grid: batch norm alone, {torch.get_num_threads()} threads, n = {rounds} rounds; "
        "torch / ours, medians.",
        "",
        "| input | " + " | ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES) + " |",
        "|---|" + "---|" * len(DTYPES),
    ]
    rows: list[dict[str, Any]] = []
    for shape, last in GRID:
        cells = []
        for dtype in DTYPES:
            pair = arms(shape, "BN", last=last, training=True, dtype=dtype)
            ratios = paired(*pair, rounds).ratios
            rows.append({"input": shape, "last": last, "dtype": str(dtype), "ratios": ratios})
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {shape}{' channels_last' if last else ''} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    slower = [row for row in rows if statistics.median(row["ratios"]) < 0.97]
    lines += ["", f"{len(rows)} inputs, {len(slower)} of them below 0.97."]
    return lines, rows


def main() -> None:
    """Measure all on two threads and on one, print the tables and keep them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--threads", type=int, nargs="*", default=[2, 1])
    options.add_argument("--compiled", action="store_true")
    options.add_argument("--jax", metavar="PYTHON", default="")
    options.add_argument("--grid", action="store_true")
    told = options.parse_args()
    about = harness.provenance("python bench/kernels.py " + " ".join(_words(told)))
    ops.keep_freed_memory()  # for both: else the system's clearing of pages is what is measured
    lines, rows = [f"Kernels for {ops.kernels().instructions}."], []
    for threads in told.threads:
        torch.set_num_threads(threads)
        jax = of_jax(told.jax, threads) if told.jax else {}
        lines += [
            "",
            f"{threads} threads, n = {told.rounds} rounds; torch / ours, median (range); "
            "microseconds are medians. The process keeps the memory that is freed, for both.",
            "",
            "| input | form | torch us | ours us | paired ratio | target | share of copying "
            "| torch.compile / ours | JAX / ours |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for group in GROUPS:
            for shape in group.shapes:
                for form, target in zip(FORMS, group.targets, strict=True):
                    if target is None:
                        continue
                    row, line = _line(group, shape, (form, target), told, jax)
                    rows.append({"threads": threads, **row})
                    lines.append(line)
                    print(line, flush=True)
    torch.set_num_threads(told.threads[0])
    cells: list[dict[str, Any]] = []
    if told.grid:
        more, cells = grid(max(5, told.rounds // 2))
        lines += more
    harness.save(
        "kernels", "\n".join([*lines, ""]), {"provenance": about, "rows": rows, "grid": cells}
    )


def _words(told: argparse.Namespace) -> list[str]:
    return [
        *(["--compiled"] if told.compiled else []),
        *(["--jax PYTHON"] if told.jax else []),
        *(["--grid"] if told.grid else []),
    ]


def _line(
    group: Group,
    shape: tuple[int, ...],
    wanted: tuple[str, float],
    told: argparse.Namespace,
    jax: dict[str, float],
) -> tuple[dict[str, Any], str]:
    """One input in one form, with its target: what is kept of it, and its line in the table."""
    form, target = wanted
    with torch.set_grad_enabled(group.training):
        pair = arms(shape, form, last=group.last, training=group.training)
        large = group.training and shape in LARGE
        found = paired(*pair, told.rounds, copier(shape, form) if large else None)
    ratio, ours = statistics.median(found.ratios), statistics.median(found.ours)
    moved = 8 if "add" in form else 5
    shares = [moved / 2 * c / t for c, t in zip(found.copies, found.ours, strict=False)]
    by_compile = None
    if told.compiled and group.training:
        run = compiled(shape, form, last=group.last)
        by_compile = paired(run, pair[1], told.rounds).ratios
    key = json.dumps([group.last, list(shape), form]) if group.training else ""
    row = {
        "group": group.name,
        "input": shape,
        "form": form,
        "ratios": found.ratios,
        "shares": shares,
        "compiled": by_compile,
        "jax_us": jax.get(key),
    }
    line = (
        f"| {shape} {group.name.partition(', ')[2]} | {form}"
        f"{'' if group.training else ', inference'} | "
        f"{statistics.median(found.theirs):.0f} | {ours:.0f} | {harness.spread(found.ratios)} | "
        f"{target}, {'met' if ratio >= target else 'missed'} | "
        f"{f'{statistics.median(shares):.0%}' if shares else ''} | "
        f"{harness.spread(by_compile) if by_compile else ''} | "
        f"{f'{jax[key] / ours:.2f}' if key in jax else ''} |"
    )
    return row, line


if __name__ == "__main__":
    main()
