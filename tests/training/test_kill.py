from __future__ import annotations

import csv
import random
import subprocess
import sys

import killed

JOB = [
    "--data", "digits", "--dropout", "0.3", "--epochs", "250", "--patience", "250",
    "--batch-size", "32", "--weight-decay", "0.01", "--schedule", "onecycle",
]  # fmt: skip


def train(prefix, delays):
    """Train in folders ``prefix`` 0, 1, ..., killed after each of ``delays``; the statuses."""
    script = killed.__file__
    command = [sys.executable, script, str(prefix), ",".join(map(str, delays)), *JOB]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def losses(folder):
    with open(folder / "metrics.csv") as file:
        return [(r["train_loss"], r["valid_loss"], r["best"]) for r in csv.DictReader(file)]


def test_twenty_kills_at_random_moments_change_no_bit_of_the_result(tmp_path):
    assert train(tmp_path / "straight", []) == [0]
    draw = random.Random(0)
    # Some fall before the first checkpoint, most into the middle of an epoch.
    statuses = train(tmp_path / "killed", [draw.uniform(0.05, 3.2) for _ in range(20)])
    assert statuses.count(-9) == 20
    assert statuses[-1] == 0

    straight = tmp_path / "straight0"
    killed = sorted(tmp_path.glob("killed*"))
    assert len(killed) == statuses.count(0)
    for folder in killed:
        assert weights(folder) == weights(straight)
        assert losses(folder) == losses(straight)
        assert not list(folder.rglob("*.part"))
