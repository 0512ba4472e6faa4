"""A run that has ended, and goes on for more epochs."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

import truenorm
from states import same_state
from truenorm import InputError, TrainConfig
from truenorm.training import job
from truenorm.training.run import Request

SHORT = ["--data", "iris", "--epochs", "4", "--patience", "4", "--batch-size", "16"]


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]


def test_a_finished_run_goes_on_from_its_last_epoch(cli, tmp_path):
    folder = tmp_path / "run"
    assert cli("train", *SHORT, "--run-dir", folder, "--dropout", "0.2", "--quiet")[0] == 0
    shutil.copytree(folder, tmp_path / "again")
    first = rows(folder)
    status, out, err = cli("train", "--resume", folder, "--epochs", "7")
    assert status == 0, err
    assert "goes on: 7 epochs in place of 4" in out
    assert rows(folder)[:4] == first
    assert [r["epoch"] for r in rows(folder)] == list("1234567")
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == 7
    assert result["run"] == str(folder)
    assert json.loads((folder / "config.json").read_text())["train"]["epochs"] == 7
    assert f"of {len(rows(folder))}</dd>" in (folder / "report.html").read_text()
    best = min(rows(folder), key=lambda r: float(r["valid_loss"]))
    assert result["val_loss"] == float(best["valid_loss"])

    assert cli("train", "--resume", tmp_path / "again", "--epochs", "7", "--quiet")[0] == 0
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "again")]
    assert weights[0] == weights[1]
    assert rows(folder) == rows(tmp_path / "again")


def test_with_a_constant_rate_it_ends_as_if_it_had_been_asked_for_at_once(cli, tmp_path):
    plain = ["--recipe", "classic", *SHORT[:2], "--patience", "9", "--batch-size", "16"]
    assert cli("train", *plain, "--epochs", "7", "--run-dir", tmp_path / "whole", "--quiet")[0] == 0
    assert cli("train", *plain, "--epochs", "3", "--run-dir", tmp_path / "part", "--quiet")[0] == 0
    assert cli("train", "--resume", tmp_path / "part", "--epochs", "7", "--quiet")[0] == 0
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    whole, part = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "part"))
    assert whole == part


def test_the_schedule_is_that_of_all_epochs(cli, tmp_path):
    one = ["--schedule", "cosine", "--lr", "0.01"]
    assert cli("train", *SHORT, *one, "--run-dir", tmp_path / "run", "--quiet")[0] == 0
    assert cli("train", "--resume", tmp_path / "run", "--epochs", "8", "--quiet")[0] == 0
    config = TrainConfig(epochs=8, schedule="cosine", lr=0.01)
    from truenorm.training.optimizer import learning_rate

    steps = 6  # of 96 examples
    rates = [float(r["lr"]) for r in rows(tmp_path / "run")][4:]
    expected = [learning_rate(config, e * steps - 1, 8 * steps) for e in range(5, 9)]
    assert rates == pytest.approx(expected)


def stopping_early(folder, splits, epochs, **more):
    """A run that finds nothing better after its first epoch."""
    torch.manual_seed(0)
    model = truenorm.build(truenorm.ModelSpec(widths=(8,)), (6,), 3, seed=0)
    config = TrainConfig(epochs=epochs, batch_size=16, patience=2, min_delta=100.0, **more)
    if folder.exists():
        run = truenorm.Run.open(folder)
    else:
        run = truenorm.Run.create(folder, Request(None, config))
    return model, truenorm.fit(model, splits, config, run=run)


def test_patience_counts_anew_where_a_run_that_stopped_early_goes_on(tmp_path, splits):
    _, history = stopping_early(tmp_path / "run", splits, 6)
    assert (history.stopped, len(history.epochs), history.best_epoch) == ("early", 3, 1)
    _, same = stopping_early(tmp_path / "run", splits, 6)
    assert len(same.epochs) == 3
    _, longer = stopping_early(tmp_path / "run", splits, 9)
    assert (longer.stopped, len(longer.epochs), longer.best_epoch) == ("early", 5, 1)
    _, again = stopping_early(tmp_path / "run", splits, 9)
    assert len(again.epochs) == 5
    _, once_more = stopping_early(tmp_path / "run", splits, 10)
    assert len(once_more.epochs) == 7


@pytest.mark.parametrize("kept", [0.0, 9.0], ids=["checkpoint an epoch", "none before the end"])
def test_a_run_killed_while_it_went_on_ends_with_the_same_bits(tmp_path, splits, monkeypatch, kept):
    monkeypatch.setattr("truenorm.training.fit._CHECKPOINT_SECONDS", kept)
    stopping_early(tmp_path / "straight", splits, 6)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    straight, whole = stopping_early(tmp_path / "straight", splits, 9)

    run = truenorm.Run.open(tmp_path / "killed")
    config = TrainConfig(epochs=9, batch_size=16, patience=2, min_delta=100.0)
    model = truenorm.build(truenorm.ModelSpec(widths=(8,)), (6,), 3, seed=0)

    def kill(progress):
        if progress.epoch == 4 and progress.record is not None:
            raise MemoryError

    with pytest.raises(MemoryError):
        truenorm.fit(model, splits, config, run=run, observe=kill)
    assert run.request().train.epochs == 9
    resumed, history = stopping_early(tmp_path / "killed", splits, 9)
    assert [e.train_loss for e in history.epochs] == [e.train_loss for e in whole.epochs]
    assert same_state(straight.state_dict(), resumed.state_dict())


def test_a_checkpoint_of_before_goes_on(tmp_path, splits):
    stopping_early(tmp_path / "run", splits, 6)
    run = truenorm.Run.open(tmp_path / "run")
    stored = run.checkpoint()
    for later in ("asked", "since", "feed"):
        del stored[later]
    run.save_checkpoint(stored)
    _, longer = stopping_early(tmp_path / "run", splits, 9)
    assert len(longer.epochs) == 5


@pytest.mark.parametrize("epochs", [3, 4])
def test_no_more_epochs_than_before_are_refused_with_both_numbers(cli, tmp_path, epochs):
    folder = tmp_path / "run"
    assert cli("train", *SHORT, "--run-dir", folder, "--quiet")[0] == 0
    before = (folder / "result.json").read_bytes()
    status, _, err = cli("train", "--resume", folder, "--epochs", epochs)
    assert status == 2
    assert f"more than the 4 that {folder} was asked for, got {epochs}" in err
    assert (folder / "result.json").read_bytes() == before
    with pytest.raises(InputError, match="got 0"):
        job.resume(folder, epochs=0)


def test_other_choices_are_the_runs(cli, tmp_path):
    status, _, err = cli("train", "--resume", tmp_path, "--epochs", "9", "--lr", "1")
    assert status == 2
    assert "leave out all but --epochs, --quiet and --json" in err
