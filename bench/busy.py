"""The main job and tuned torch beside 0, 2 and 4 processes that keep a core busy each.

Each runs in a process of its own, in turn, several rounds. "spinning" is the main job with its
threads waiting as OpenMP lets them, which is how it was before they gave way.

Targets, of fit seconds:
  beside 4 on 2 cores <= 6 times idle, and <= 1.3 times what one thread needs there
  idle <= 1.1 times spinning
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
from harness import peer, spread, truenorm_train

BESIDE = (0, 2, 4)
_SPINNING = "from truenorm import cores, cli; cores._park = lambda threads: None; cli.main()"
Row = dict[str, Any]
WHO: dict[str, Callable[[int], Row]] = {
    "truenorm (default)": lambda seed: truenorm_train(seed=seed, goal=1),
    "truenorm, spinning": lambda seed: truenorm_train(seed=seed, goal=1, program=("-c", _SPINNING)),
    "truenorm --threads 1": lambda seed: truenorm_train("--threads", "1", seed=seed, goal=1),
    "tuned torch": lambda seed: peer("tuned_torch", seed),
}
# What is compared: name, ours beside how many, theirs beside how many, the target.
RATIOS = (
    ("beside 4, to idle", ("truenorm (default)", 4), ("truenorm (default)", 0), 6.0),
    ("beside 4, to one thread", ("truenorm (default)", 4), ("truenorm --threads 1", 4), 1.3),
    ("idle, to spinning", ("truenorm (default)", 0), ("truenorm, spinning", 0), 1.1),
    ("beside 2, to idle", ("truenorm (default)", 2), ("truenorm (default)", 0), None),
    ("spinning, beside 4 to idle", ("truenorm, spinning", 4), ("truenorm, spinning", 0), None),
    ("tuned torch, beside 4 to idle", ("tuned torch", 4), ("tuned torch", 0), None),
)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    """Run the rounds, print the table and the ratios, keep both."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    rounds = options.parse_args().rounds
    about = harness.provenance("python bench/busy.py")
    rows: dict[str, dict[int, list[Row]]] = {who: {n: [] for n in BESIDE} for who in WHO}
    for seed in range(rounds):
        for beside in BESIDE:
            for who, job in WHO.items():
                with busy(beside):
                    rows[who][beside].append(job(seed))
                print(
                    f"{seed + 1}: {who} beside {beside}: {rows[who][beside][-1]}", file=sys.stderr
                )
    same = all(
        a["val_loss"] == b["val_loss"]
        for beside in BESIDE
        for a, b in zip(
            rows["truenorm (default)"][beside], rows["truenorm, spinning"][0], strict=True
        )
    )
    text = "\n".join(
        [
            f"n = {rounds} rounds; fit seconds, median (range), beside so many busy processes.",
            "",
            "| who | " + " | ".join(map(str, BESIDE)) + " |",
            "|---|" + "---|" * len(BESIDE),
            *(
                f"| {who} | {' | '.join(spread(_seconds(of[n])) for n in BESIDE)} |"
                for who, of in rows.items()
            ),
            "",
            "| ratio | paired, median (range) | target | met |",
            "|---|---|---|---|",
            *(_ratio(rows, *asked) for asked in RATIOS),
            "",
            f"The best epoch's validation loss, idle, busy and spinning: "
            f"{'the same bits' if same else 'DIFFERENT'} for every seed.",
            "",
        ]
    )
    harness.save("busy", text, {"provenance": about, "rows": rows})


def _seconds(runs: list[Row]) -> list[float]:
    return [run["fit_seconds"] for run in runs]


def _ratio(
    rows: dict[str, dict[int, list[Row]]],
    name: str,
    ours: tuple[str, int],
    theirs: tuple[str, int],
    target: float | None,
) -> str:
    pairs = zip(*(_seconds(rows[who][n]) for who, n in (ours, theirs)), strict=True)
    ratios = [a / b for a, b in pairs]
    if target is None:
        return f"| {name} | {spread(ratios)} | | |"
    met = "yes" if statistics.median(ratios) <= target else "NO"
    return f"| {name} | {spread(ratios)} | {target} | {met} |"


if __name__ == "__main__":
    main()
