"""The job every peer does, stated once: data, split, and the row a peer prints.

Plain numpy on purpose, so that a peer pays only for the libraries it really uses.
The IDX files are those that TrueNorm ships; the 80/20 cut is a seeded permutation.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parents[2] / "src" / "truenorm" / "mnist"
EPOCHS, BATCH, PATIENCE, MIN_DELTA, LR = 20, 64, 3, 1e-3, 1e-3
GOAL = 0.972  # the validation accuracy whose first passing is timed


class Mnist(NamedTuple):
    train_x: np.ndarray  # (48000, 28, 28) uint8
    train_y: np.ndarray  # (48000,) int64
    valid_x: np.ndarray
    valid_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def _read(name: str, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress((FOLDER / name).read_bytes()), np.uint8, offset=header)


def mnist(seed: int) -> Mnist:
    """MNIST cut 80/20 by a permutation of ``seed``, with its own 10,000 test images."""
    x = _read("train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    y = _read("train-labels-idx1-ubyte.gz", 8).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(x))
    cut = int(0.8 * len(x))
    train, valid = order[:cut], order[cut:]
    test_x = _read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    test_y = _read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return Mnist(x[train], y[train], x[valid], y[valid], test_x, test_y)


def scaled(images: np.ndarray) -> np.ndarray:
    """Images as float32 rows in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def report(
    *, fit_seconds: float, epochs: int, test_accuracy: float, seconds_to_goal: float | None
) -> None:
    """Print the peer's row as one JSON object."""
    row = {
        "fit_seconds": fit_seconds,
        "epochs": epochs,
        "seconds_per_epoch": fit_seconds / epochs,
        "test_accuracy": test_accuracy,
        "seconds_to_goal": seconds_to_goal,
    }
    json.dump(row, sys.stdout)
    print()


def seed_from_command_line() -> int:
    """The seed, which is every peer's one argument."""
    return int(sys.argv[1]) if len(sys.argv) > 1 else 0
