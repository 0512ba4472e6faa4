from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from hypothesis import settings

import truenorm
from truenorm.data.datasets import Splits, dataset

# Deterministic, and without a clock: a slow machine must not fail a true property.
settings.register_profile("truenorm", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("truenorm")


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def blobs(count=120, features=6, classes=3, seed=0, spread=1.0):
    """Rows around one centre per class: arrays x (N, F) float32 and y (N,)."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    centres = rng.normal(size=(classes, features)) * 2
    return (centres[y] + spread * rng.normal(size=(count, features))).astype(np.float32), y


@pytest.fixture
def splits():
    """60 training and 30 validation rows of 6 features in 3 classes."""
    x, y = blobs(90)
    return Splits(dataset(x[:60], y[:60]), dataset(x[60:], y[60:]))


@pytest.fixture
def model():
    return truenorm.build(truenorm.ModelSpec(widths=(8,)), (6,), 3, seed=0)


def heed_ctrl_c():
    """For a child process: a shell's background jobs ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def same_state(a, b):
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
