from __future__ import annotations

import importlib
import sqlite3
import sys

import numpy as np
import pytest

import own_models
import truenorm
from truenorm import InputError, compare
from truenorm.studies.bench import Bench


@pytest.fixture
def images():
    """36 training and 12 validation images, and as many to test, in three classes."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 1, 8, 8)) + y[:, None, None, None]
    parts = [truenorm.dataset(x[a:b], y[a:b]) for a, b in ((0, 36), (36, 48), (48, 60))]
    return truenorm.Splits(*parts)


def asked(**more):
    changes = {"epochs": 1, "batch_size": 12} | more.pop("changes", {})
    sizes = changes.pop("batch_size")
    return {"seeds": 2, "processes": 0, "batch_sizes": (sizes,), "changes": changes, **more}


@pytest.mark.parametrize("factory", ["transformers_resnet", "monai_densenet"])
def test_norms_are_compared_in_a_model_of_ones_own(images, factory):
    pytest.importorskip(factory.partition("_")[0])
    study = compare(
        images, model=getattr(own_models, factory), norms=("batch", "group", "none"), **asked()
    )
    assert [v.label for v in study.variants] == ["batch/12", "group/12", "none/12"]
    assert len(study.rows) == 6
    assert all(row.error is None and row.test_accuracy is not None for row in study.rows)
    assert {v.spec.name for v in study.variants} == {f"own_models:{factory}"}
    assert len({row.valid_loss for row in study.rows}) == 6


def test_worker_processes_give_the_rows_of_this_one(images):
    here, there = (
        compare(images, model="own_models:plain", norms=("batch", "layer"), **asked(processes=n))
        for n in (0, 2)
    )
    values = [
        [(r.variant, r.seed, r.test_loss, r.valid_loss) for r in s.rows] for s in (here, there)
    ]
    assert values[0] == values[1]


def test_several_models_are_compared_norm_by_norm(images):
    study = compare(
        images, model=["convnet", own_models.plain], norms=("batch", "none"), **asked(seeds=1)
    )
    assert set(study.settings()) == {
        "batch size 12, model convnet", "batch size 12, model own_models:plain"
    }  # fmt: skip


SOURCE = """
from torch import nn

def net(input_shape, classes):
    hidden = [nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), {act}]
    return nn.Sequential(*hidden, nn.Linear(8, classes))
"""


def test_rows_are_found_again_until_the_code_changes(images, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(act):
        (tmp_path / "own_changing.py").write_text(SOURCE.format(act=act))
        importlib.invalidate_caches()
        sys.modules.pop("own_changing", None)
        return compare(
            images, model="own_changing:net", norms=("batch", "none"), store=tmp_path / "s.sqlite",
            **asked(),
        )  # fmt: skip

    first = run("nn.ReLU()")
    with monkeypatch.context() as patched:
        patched.setattr(Bench, "perform", lambda self, trial: pytest.fail("run again"))
        assert run("nn.ReLU()").rows == first.rows
    run("nn.Tanh()")
    count = sqlite3.connect(tmp_path / "s.sqlite").execute("SELECT count(*) FROM runs").fetchone()
    assert count == (8,)


def test_what_workers_cannot_import_is_refused(images, monkeypatch):
    with pytest.raises(InputError, match="at the top of a module"):
        compare(images, model=lambda: None, **asked())
    main = sys.modules["__main__"]

    def own(input_shape, classes):
        return own_models.plain(input_shape, classes)

    own.__module__, own.__qualname__ = "__main__", "own"
    monkeypatch.setattr(main, "own", own, raising=False)
    with pytest.raises(InputError, match="pass processes=0"):
        compare(images, model=own, **asked(processes=2))
    study = compare(images, model=own, norms=("batch", "none"), **asked(seeds=1))
    assert all(row.error is None for row in study.rows)


@pytest.mark.parametrize(
    ("factory", "norms", "message"),
    [
        ("seven", ("batch", "none"), r"own_models:seven, norm batch, gives \(2, 7\)"),
        ("without_norm", ("batch", "none"), "it has no batch norm"),
        ("moody", ("batch", "none"), "different models from the same seed"),
        ("absent", ("batch", "none"), "no attribute 'absent'"),
        ("rows", ("batch", "none"), "own_models:rows, norm batch, cannot take a batch"),
    ],
)
def test_factories_that_will_not_do_are_refused_before_any_run(images, factory, norms, message):
    with pytest.raises(InputError, match=message):
        compare(images, model=f"own_models:{factory}", norms=norms, **asked())


def test_the_command_compares_a_factory(cli):
    status, out, err = cli(
        "compare", "--data", "iris", "--model", "own_models:rows", "--norm", "batch,none",
        "--seeds", "1", "--epochs", "1", "--processes", "0",
    )  # fmt: skip
    assert status == 0, err
    assert "batch/" in out
