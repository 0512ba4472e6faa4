from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: one thread each, children too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

import truenorm
from samples import blobs
from truenorm.cli import main
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


@pytest.fixture
def same_kernels():
    """torch's layers compute by what ours do, so that equal is equal to the bit."""
    with truenorm.accelerate():
        yield


@pytest.fixture
def splits():
    """60 training and 30 validation rows of 6 features in 3 classes."""
    x, y = blobs(90)
    return Splits(dataset(x[:60], y[:60]), dataset(x[60:], y[60:]))


@pytest.fixture
def model():
    return truenorm.build(truenorm.ModelSpec(widths=(8,)), (6,), 3, seed=0)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder: its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*tokens):
        with pytest.raises(SystemExit) as end:
            main([str(t) for t in tokens])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call
