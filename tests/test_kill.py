from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

JOB = [
    "--data", "digits", "--dropout", "0.3", "--epochs", "250", "--patience", "250",
    "--batch-size", "32", "--weight-decay", "0.01", "--schedule", "onecycle",
]  # fmt: skip


def train(folder, delays):
    """Train in ``folder``, killed after each of ``delays`` and resumed; the exit statuses."""
    script = Path(__file__).parent / "killed.py"
    command = [sys.executable, str(script), str(folder), ",".join(map(str, delays)), *JOB]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]


def test_twenty_kills_at_random_moments_change_no_bit_of_the_result(tmp_path):
    draw = random.Random(0)
    train(tmp_path / "straight", [])
    # Long enough that some reach a checkpoint, short enough that most strike in mid-epoch.
    statuses = train(tmp_path / "killed", [draw.uniform(0.05, 3.2) for _ in range(20)])
    assert statuses.count(-9) >= 15
    assert statuses[-1] == 0

    def weights(name):
        return (tmp_path / name / "model.safetensors").read_bytes()

    def losses(name):
        with open(tmp_path / name / "metrics.csv") as file:
            return [(r["train_loss"], r["valid_loss"], r["best"]) for r in csv.DictReader(file)]

    assert weights("killed") == weights("straight")
    assert losses("killed") == losses("straight")
    assert not list((tmp_path / "killed").rglob("*.part"))
