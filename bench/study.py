"""Throughput: 32 early-stopped runs of the classic protocol as one study, beside plain loops.

Targets, in one run of this script:
  the study takes <= 1/8 of 32 times the classic script's time (each a whole process)
  and <= 0.6 of 32 tuned-torch runs in a plain loop (one process, one import of torch)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any

import harness
from harness import mean_and_sd, peer, spread

Measured = dict[str, Any]
TARGETS = {"classic script": 1 / 8, "tuned torch": 0.6}
# The whole script again and again, as people loop over seeds: torch is imported once.
LOOP = """
import sys
sys.path.insert(0, sys.argv[1])
import tuned_torch
for seed in range(int(sys.argv[2])):
    sys.argv[1:] = [str(seed)]
    tuned_torch.main()
"""


def main() -> None:
    """Run the rounds in turn, print the table and the ratios, keep both."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=32)
    options.add_argument("--rounds", type=int, default=1)
    chosen = options.parse_args()
    rounds = []
    for number in range(chosen.rounds):
        script = [peer("classic_script", 3 * number)]
        found = {"study": study(chosen.seeds)}
        script.append(peer("classic_script", 3 * number + 1))
        found["torch"] = loop(chosen.seeds)
        script.append(peer("classic_script", 3 * number + 2))
        rounds.append({**found, "classic": _together(script)})
        print(f"round {number + 1}: {_seconds(rounds[-1], chosen.seeds)}", file=sys.stderr)
    record = {"provenance": harness.provenance("make bench"), "rounds": rounds}
    harness.save("study", _text(rounds, chosen.seeds), record)


def _together(runs: list[Measured]) -> Measured:
    """A few runs of a script, one process each, as one row; seconds are their mean."""
    return {
        "process_seconds": statistics.mean(run["process_seconds"] for run in runs),
        "epochs": [run["epochs"] for run in runs],
        "test_accuracy": [run["test_accuracy"] for run in runs],
        "peak_mb": max(run["peak_mb"] for run in runs),
    }


def study(seeds: int) -> Measured:
    """One study, from an empty store, as a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "truenorm", "compare", "--data", "mnist", "--norm", "batch"),
            *("--recipe", "classic", "--seeds", str(seeds), "--store", f"{folder}/study.sqlite"),
            *("--quiet", "--json"),
        ]
        done = harness.run(command)
    rows = json.loads(done.stdout)["rows"]
    return {
        "process_seconds": done.wall_seconds,
        "epochs": [row["epochs"] for row in rows],
        "test_accuracy": [row["test_accuracy"] for row in rows],
        "peak_mb": done.peak_mb,
    }


def loop(seeds: int) -> Measured:
    """Tuned torch for one seed after the other, as a whole process with torch's own threads."""
    done = harness.run([sys.executable, "-c", LOOP, str(harness.HERE / "peers"), str(seeds)])
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "process_seconds": done.wall_seconds,
        "epochs": [run["epochs"] for run in runs],
        "test_accuracy": [run["test_accuracy"] for run in runs],
        "peak_mb": done.peak_mb,
    }


def _seconds(found: dict[str, Measured], seeds: int) -> dict[str, float]:
    """Of each way, the seconds for so many runs."""
    return {
        "classic script": seeds * found["classic"]["process_seconds"],
        "tuned torch": found["torch"]["process_seconds"],
        "truenorm compare": found["study"]["process_seconds"],
    }


def _text(rounds: list[dict[str, Measured]], seeds: int) -> str:
    times = [_seconds(found, seeds) for found in rounds]
    runs = {who: [r for found in rounds for r in _runs(found[who])] for who in rounds[0]}
    names = {"classic script": "classic", "tuned torch": "torch", "truenorm compare": "study"}
    lines = [
        f"{seeds} runs of 784-128-BatchNorm-ReLU-10 on MNIST (Adam 1e-3, batch 64, patience 3, "
        f"at most 20 epochs) with {seeds} seeds; "
        f"{len(rounds)} round{'s' * (len(rounds) > 1)} in turn, medians (ranges). "
        "The classic script was run three times a round, before, between and after the two "
        f"others, and the mean of its times multiplied by {seeds}.",
        "",
        "| who | seconds for all runs | epochs a run | test accuracy |",
        "|---|---|---|---|",
    ]
    for who, name in names.items():
        epochs = statistics.mean(r["epochs"] for r in runs[name])
        accuracy = mean_and_sd([r["test_accuracy"] for r in runs[name]])
        lines.append(f"| {who} | {spread([t[who] for t in times])} | {epochs:.1f} | {accuracy} |")
    lines += [
        "",
        "| the study's time to that of | paired ratios, median (range) | target | met |",
        "|---|---|---|---|",
    ]
    for who, target in TARGETS.items():
        ratios = [t["truenorm compare"] / t[who] for t in times]
        met = "yes" if statistics.median(ratios) <= target else "NO"
        lines.append(f"| {who} | {spread(ratios)} | {target:g} | {met} |")
    return "\n".join([*lines, ""])


def _runs(found: Measured) -> list[Measured]:
    """A process's runs, one by one."""
    both = zip(found["epochs"], found["test_accuracy"], strict=True)
    return [{"epochs": e, "test_accuracy": a} for e, a in both]


if __name__ == "__main__":
    main()
