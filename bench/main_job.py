"""The main job against its peers: each in a process of its own, in turn, several rounds.

Targets (ratios of medians, and of pairs within a round, are both printed):
  classic recipe: seconds per epoch <= 0.90 of tuned torch, <= 1/5 of the classic script
  default recipe: fit <= 1/15 of the classic script's; time to 97.2 % likewise; test >= 98.0 %
  whole process of `truenorm train --quiet` <= 1/6 of the classic script's
  `truenorm --help` <= 0.3 s; peak memory of the default run <= 700 MB
  convnet: test >= 99.4 % over five seeds
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import harness
from harness import mean_and_sd, peer, spread, truenorm_train

GOAL = 0.972
Row = dict[str, Any]
WHO: dict[str, Callable[[int], Row]] = {
    "classic script": lambda seed: peer("classic_script", seed),
    "skorch": lambda seed: peer("skorch_net", seed),
    "scikit-learn MLP (no batch norm)": lambda seed: peer("sklearn_mlp", seed),
    "tuned torch": lambda seed: peer("tuned_torch", seed),
    "truenorm --recipe classic": lambda seed: truenorm_train(
        "--recipe", "classic", seed=seed, goal=GOAL
    ),
    "truenorm (default)": lambda seed: truenorm_train(seed=seed, goal=GOAL),
}
# What is compared: name, ours, theirs, figure, the target as a ratio.
RATIOS = (
    ("seconds per epoch", "truenorm --recipe classic", "tuned torch", "seconds_per_epoch", 0.90),
    (
        "seconds per epoch",
        "truenorm --recipe classic",
        "classic script",
        "seconds_per_epoch",
        1 / 5,
    ),
    ("fit", "truenorm (default)", "classic script", "fit_seconds", 1 / 15),
    ("time to 97.2 %", "truenorm (default)", "classic script", "seconds_to_goal", 1 / 15),
    ("whole process", "truenorm (default)", "classic script", "process_seconds", 1 / 6),
)


def main() -> None:
    """Run the rounds, print the table and the ratios, keep both."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seeds", type=int, default=10, help="of the default recipe's accuracy")
    options.add_argument("--convnet-seeds", type=int, default=5)
    told = options.parse_args()
    about = harness.provenance("make bench")

    rows: dict[str, list[Row]] = {who: [] for who in WHO}
    for seed in range(told.rounds):
        for who, job in WHO.items():
            rows[who].append(job(seed))
            print(f"round {seed + 1}: {who}: {rows[who][-1]}", file=sys.stderr)
    more = range(told.rounds, told.seeds)
    default = rows["truenorm (default)"] + [truenorm_train(seed=s, goal=GOAL) for s in more]
    convnet = [
        truenorm_train("--model", "convnet", seed=s, goal=GOAL) for s in range(told.convnet_seeds)
    ]
    helped = [harness.run([sys.executable, "-m", "truenorm", "--help"]) for _ in range(7)]
    text = "\n".join([_table(rows), "", _ratios(rows), "", _others(default, convnet, helped)])
    record = {
        "provenance": about,
        "rows": rows,
        "default": default,
        "convnet": convnet,
        "help_seconds": [h.wall_seconds for h in helped],
    }
    harness.save("main_job", text, record)


def _table(rows: dict[str, list[Row]]) -> str:
    lines = [
        f"n = {len(next(iter(rows.values())))} seeds, one process each, in turn; "
        "median (range) of times, mean +- sd of test accuracy.",
        "",
        "| who | fit s | s/epoch | s to 97.2 % | whole process s | peak MB | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for who, runs in rows.items():
        goal = [r["seconds_to_goal"] for r in runs if r["seconds_to_goal"] is not None]
        passed = spread(goal) if goal else "-"
        if goal and len(goal) < len(runs):
            passed += f", {len(goal)} of {len(runs)}"
        lines.append(
            f"| {who} | {spread([r['fit_seconds'] for r in runs])} "
            f"| {spread([r['seconds_per_epoch'] for r in runs])} | {passed} "
            f"| {spread([r['process_seconds'] for r in runs])} "
            f"| {max(r['peak_mb'] for r in runs):.0f} "
            f"| {mean_and_sd([r['test_accuracy'] for r in runs])} |"
        )
    return "\n".join(lines)


def _ratios(rows: dict[str, list[Row]]) -> str:
    lines = [
        "| ratio | of | to | paired ratios, median (range) | target | met |",
        "|---|---|---|---|---|---|",
    ]
    for name, ours, theirs, figure, target in RATIOS:
        pairs = [
            a[figure] / b[figure]
            for a, b in zip(rows[ours], rows[theirs], strict=True)
            if a[figure] is not None and b[figure] is not None
        ]
        met = "yes" if pairs and statistics.median(pairs) <= target else "NO"
        lines.append(f"| {name} | {ours} | {theirs} | {spread(pairs)} | {target:.3g} | {met} |")
    return "\n".join(lines)


def _others(default: list[Row], convnet: list[Row], helped: list[harness.Finished]) -> str:
    return "\n".join(
        [
            f"- default recipe, n = {len(default)} seeds: test accuracy "
            f"{mean_and_sd([r['test_accuracy'] for r in default])} (target 98.0 %), peak memory "
            f"{max(r['peak_mb'] for r in default):.0f} MB (target 700).",
            f"- convnet, n = {len(convnet)} seeds: test accuracy "
            f"{mean_and_sd([r['test_accuracy'] for r in convnet])} (target 99.4 %), fit "
            f"{spread([r['fit_seconds'] for r in convnet])} s.",
            f"- `truenorm --help`, n = {len(helped)}: "
            f"{spread([h.wall_seconds for h in helped])} s (target 0.3).",
            "",
        ]
    )


if __name__ == "__main__":
    main()
