"""What batch norm loses at batch 4 and 2 against batch 64: MNIST, the convnet, five seeds.

One epoch each in float32, one-cycle Adam, a peak rate of 0.01 * sqrt(batch / 128) for all; the
seed's split, order and initial weights are shared. Target: a combination of options ends within
0.3 points of torch.nn.BatchNorm2d at batch 64. One single-threaded process a core.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import harness
import truenorm
from truenorm import Renorm

# The paper's schedule, shortened to the 24,000 steps of an epoch at batch 2.
RENORM = Renorm(start=500, rmax_at=4_000, dmax_at=2_500)
KINDS: dict[str, dict[str, Any]] = {
    "torch.nn.BatchNorm2d": {"to": "torch"},
    "truenorm, renorm": {"to": "truenorm", "renorm": RENORM},
}
RUNS = [(64, "torch.nn.BatchNorm2d"), *((b, kind) for b in (4, 2) for kind in KINDS)]


def one(job: tuple[int, int, str]) -> dict[str, Any]:
    """Train and test one model."""
    seed, batch, kind = job
    torch.set_num_threads(1)
    splits = truenorm.load("mnist", seed=seed)
    spec = truenorm.ModelSpec(name="convnet")
    model = truenorm.build(spec, splits.input_shape, 10, seed=seed)
    truenorm.convert(model, **KINDS[kind])
    config = truenorm.recipe(
        "default",
        "convnet",
        len(splits.train),
        seed=seed,
        epochs=1,
        batch_size=batch,
        lr=0.01 * math.sqrt(batch / 128),
        threads=1,
        amp="off",
    )
    history = truenorm.fit(model, splits, config)
    logits = truenorm.logits_of(model, splits.test, splits.scaling, torch.device("cpu"))
    tested = truenorm.score(logits, splits.test)
    return {
        "seed": seed,
        "batch": batch,
        "kind": kind,
        "test_accuracy": tested.accuracy,
        "test_loss": tested.loss,
        "fit_seconds": history.seconds,
    }


def main() -> None:
    """Run all, print the table and keep it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=5)
    told = options.parse_args()
    about = harness.provenance("python bench/small_batch.py")
    jobs = [(seed, batch, kind) for seed in range(told.seeds) for batch, kind in RUNS]
    context = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for row in pool.map(one, jobs):
            rows.append(row)
            print(row, file=sys.stderr)
    harness.save("small_batch", _table(rows, told.seeds), {"provenance": about, "rows": rows})


def _table(rows: list[dict[str, Any]], seeds: int) -> str:
    base = {r["seed"]: r["test_accuracy"] for r in rows if r["batch"] == 64}
    lines = [
        f"MNIST, convnet 32-64-64-128, one epoch, n = {seeds} seeds; test accuracy and loss as "
        "mean +- sd, paired difference to batch 64 of the same seed in points as mean (range).",
        "",
        "| batch | norm | test accuracy | test loss | points to batch 64 | within 0.3 | fit s |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, kind in RUNS:
        runs = [r for r in rows if (r["batch"], r["kind"]) == (batch, kind)]
        gaps = [100 * (r["test_accuracy"] - base[r["seed"]]) for r in runs]
        losses = [r["test_loss"] for r in runs]
        lines.append(
            f"| {batch} | {kind} | {harness.mean_and_sd([r['test_accuracy'] for r in runs])} "
            f"| {statistics.mean(losses):.4f} +- {statistics.stdev(losses):.4f} "
            f"| {statistics.mean(gaps):+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f}) "
            f"| {'yes' if statistics.mean(gaps) >= -0.3 else 'NO'} "
            f"| {harness.spread([r['fit_seconds'] for r in runs])} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
