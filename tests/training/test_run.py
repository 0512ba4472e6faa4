from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

import truenorm
from samples import blobs
from states import same_state
from truenorm import InputError, ModelSpec, Run, TrainConfig
from truenorm.files import to_json, write_atomically
from truenorm.training import job
from truenorm.training.fit import fit
from truenorm.training.run import Request
from truenorm.training.state import snapshot

REQUEST = Request(ModelSpec(), TrainConfig())


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(beside):
        beside.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"No space left on device.*intact. Free space"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_is_seen_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"

    def write(beside):
        beside.write_text("new")
        assert not path.exists()

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_a_full_disk_while_training_is_told_and_loses_nothing(splits, model, tmp_path, monkeypatch):
    """The third checkpoint fails; what the second one held is still there, and resumes."""
    run = Run.create(tmp_path / "run", REQUEST)
    saved = []
    whole = Run.save_checkpoint

    def save(self, state):
        if len(saved) == 2:
            raise InputError("full")
        saved.append(len(state["epochs"]))
        whole(self, state)

    monkeypatch.setattr("truenorm.training.fit._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Run, "save_checkpoint", save)
    config = TrainConfig(epochs=6, batch_size=16)
    with pytest.raises(InputError, match="full"):
        fit(model, splits, config, run=run)
    monkeypatch.setattr(Run, "save_checkpoint", whole)
    assert len(run.checkpoint()["epochs"]) == 2
    run.abandon()
    assert run.request() == REQUEST  # what has learned something keeps its claim

    resumed, straight = (truenorm.build(ModelSpec(widths=(8,)), (6,), 3, seed=0) for _ in range(2))
    fit(resumed, splits, config, run=run)
    fit(straight, splits, config)
    assert same_state(resumed.state_dict(), straight.state_dict())


def test_a_checkpoint_continues_to_the_bit_from_every_epoch(splits, tmp_path, monkeypatch):
    """Dropout, weight decay, accumulation: all that a checkpoint must not forget."""
    monkeypatch.setattr("truenorm.training.fit._CHECKPOINT_SECONDS", 0.0)
    config = TrainConfig(
        epochs=5, batch_size=8, lr=0.01, schedule="onecycle", weight_decay=0.01, accumulate=3
    )

    def build():
        return truenorm.build(ModelSpec(widths=(8,), dropout=0.5), (6,), 3, seed=0)

    straight = build()
    expected = fit(straight, splits, config)
    for stop in range(1, 6):
        run = Run.create(tmp_path / f"run{stop}", REQUEST)

        def interrupt(progress, stop=stop):
            if progress.epoch == stop and progress.record is not None:
                raise KeyboardInterrupt

        fit(build(), splits, config, run=run, observe=interrupt)
        resumed = build()
        torch.rand(3)
        history = fit(resumed, splits, config, run=run)
        assert same_state(resumed.state_dict(), straight.state_dict())
        assert history.best_epoch == expected.best_epoch
        losses = [[(e.train_loss, e.valid_loss) for e in h.epochs] for h in (history, expected)]
        assert losses[0] == losses[1]


def test_a_run_folder_holds_what_it_says(tmp_path):
    work = job.start("iris", ModelSpec(), changes={"epochs": 4}, folder=tmp_path / "run")
    outcome = work.execute()
    assert work.run.result() is None
    work.save(outcome, "<html>")
    names = {str(p.relative_to(work.run.folder)) for p in work.run.folder.rglob("*")}
    assert names == {
        "config.json", "environment.json", "metrics.csv", "checkpoint", "checkpoint/last.pt",
        "model.safetensors", "result.json", "report.html",
    }  # fmt: skip
    lines = (work.run.folder / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,valid_loss,valid_accuracy,lr,seconds,best"
    assert len(lines) == 5
    assert work.run.request() == work.request
    assert work.run.result()["val_loss"] == outcome.result["val_loss"]


def test_a_saved_model_gives_the_same_logits(tmp_path):
    work = job.start("wine", ModelSpec(), changes={"epochs": 3}, folder=tmp_path / "run")
    outcome = work.execute()
    work.save(outcome)
    trained = truenorm.load_model(tmp_path / "run")
    assert not trained.model.training
    assert trained.classes == work.splits.classes
    logits = truenorm.logits_of(
        trained.model, work.splits.test, trained.scaling, torch.device("cpu")
    )
    assert truenorm.score(logits, work.splits.test).loss == outcome.result["test_loss"]


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    Run.create(tmp_path / "run", REQUEST)
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        Run.create(tmp_path / "run", REQUEST)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Run.create(tmp_path / "run", REQUEST)


def test_a_folder_that_holds_other_things_may_become_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    Run.create(tmp_path, REQUEST)
    assert (tmp_path / "notes.txt").read_text() == "x"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is no run's config"):
        Run.open(tmp_path).request()


def test_damaged_files_are_refused_by_name(tmp_path):
    run = Run.create(tmp_path, REQUEST)
    with pytest.raises(InputError, match=r"has no model\.safetensors yet; finish it with --resume"):
        truenorm.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        truenorm.load_model(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "last.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"last\.pt: is damaged; remove it"):
        run.checkpoint()


def test_a_model_of_a_network_that_is_not_built_so_any_more_is_refused(tmp_path):
    begun = job.start(
        "iris", ModelSpec(widths=(4,)), changes={"epochs": 1}, folder=tmp_path / "run"
    )
    begun.save(begun.execute())
    path = tmp_path / "run" / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = {**safetensors.torch.load_file(path), "0.bias": torch.zeros(4)}
    safetensors.torch.save_file(tensors, path, metadata=about)
    with pytest.raises(InputError, match=r'do not fit the mlp.*Unexpected key.*"0\.bias".*train'):
        truenorm.load_model(tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused_and_the_model_is_as_it_was(tmp_path, splits):
    run = Run.create(tmp_path, REQUEST)
    config = TrainConfig(epochs=2)
    first, wider = (
        truenorm.build(ModelSpec(widths=(8, width)), (6,), 3, seed=0) for width in (4, 5)
    )
    fit(first, splits, dataclasses.replace(config, epochs=1), run=run)
    before = snapshot(wider)
    with pytest.raises(InputError, match=r"checkpoint does not fit the model.*size mismatch"):
        fit(wider, splits, config, run=run)
    assert same_state(wider.state_dict(), before)


def test_resuming_on_changed_data_is_refused(tmp_path):
    x, y = blobs(60)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    job.start(str(tmp_path / "d.npz"), ModelSpec(), folder=tmp_path / "run")
    np.savez(tmp_path / "d.npz", x=x + 1, y=y)
    with pytest.raises(InputError, match="has changed since"):
        job.resume(tmp_path / "run")


def test_a_resumed_run_that_fails_keeps_what_was_asked_of_it(tmp_path):
    changes = {"batch_size": 1}  # which batch norm refuses in the first step
    job.start("iris", ModelSpec(), changes=changes, folder=tmp_path / "run")
    with pytest.raises(InputError, match="batch_size of at least 2"):
        job.resume(tmp_path / "run").execute()
    assert job.resume(tmp_path / "run").request.train.batch_size == 1


def test_to_train_neither_models_nor_folding_are_loaded():
    script = "import sys, truenorm.training.fit; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = [n for n in done.stdout.split() if n.startswith("truenorm.")]
    assert "truenorm.training.run" in loaded
    assert not [n for n in loaded if n.startswith(("truenorm.folding", "truenorm.models"))]


def test_json_has_no_nan():
    assert json.loads(to_json({"a": [math.nan, math.inf, 1.5]})) == {"a": [None, None, 1.5]}
