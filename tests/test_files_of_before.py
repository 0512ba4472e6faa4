"""Files that version 0.1.0 wrote, before its modules moved into wings, read by today's code."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

import truenorm as tn
from truenorm.cli import main
from truenorm.data import sources
from truenorm.studies.bench import Bench
from truenorm.training import job
from truenorm.training.predict import predict

FILES = Path(__file__).parent / "fixtures" / "0.1.0"
# Another processor, or another number of threads, adds in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def no_run(self, trial):
    raise AssertionError(f"{trial} is run again")


@pytest.fixture
def only_found(monkeypatch):
    """Forbid runs; a row's key names the versions, so those of the store stand in for ours."""
    monkeypatch.setattr(Bench, "perform", no_run)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0")


def run(*tokens):
    with pytest.raises(SystemExit) as ended:
        main([str(token) for token in tokens])
    assert ended.value.code == 0


def epochs_of(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_begun_before_resumes_and_ends_as_if_it_had_never_stopped(tmp_path):
    folder = shutil.copytree(FILES / "begun", tmp_path / "begun")
    begun = epochs_of(folder)
    run("train", "--quiet", "--resume", folder)
    rows = epochs_of(folder)
    assert rows[: len(begun)] == begun
    assert len(begun) == 3
    losses = [[float(row["train_loss"]), float(row["valid_loss"])] for row in rows]
    np.testing.assert_allclose(losses, json.loads((FILES / "losses.json").read_text()), **CLOSE)
    assert json.loads((folder / "result.json").read_text())["stopped"] == "finished"


def test_a_run_that_ended_before_is_told_and_not_trained_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "fit", no_run)
    folder = shutil.copytree(FILES / "ended", tmp_path / "ended")
    run("train", "--resume", folder, "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    "place", ["ended", "folded.safetensors", "exported.onnx", "exported.pt2"], ids=str
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's reader of .pt2
def test_a_model_saved_before_predicts_as_it_did(place):
    with open(FILES / "predicted.csv") as file:
        rows = list(csv.reader(file))[1:]
    predicted = predict(FILES / place, "digits")
    expected = [[float(p) for p in row[-10:]] for row in rows]
    np.testing.assert_allclose(predicted.probabilities[: len(rows)], expected, **CLOSE)


def test_a_store_of_a_study_written_before_is_read(tmp_path, only_found):
    store = shutil.copy(FILES / "study.sqlite", tmp_path)
    run(
        "compare", "--data", "iris", "--norm", "batch,none", "--batch-size", "16", "--seeds", "3",
        "--epochs", "2", "--widths", "4", "--lr", "tune", "--grid", "0.01,0.1", "--processes", "0",
        "--quiet", "--store", store, "--out", tmp_path / "study.json",
    )  # fmt: skip
    found, before = (
        json.loads((folder / "study.json").read_text()) for folder in (tmp_path, FILES)
    )
    del found["provenance"], before["provenance"]
    assert found == before


def test_a_store_of_claims_written_before_is_read(tmp_path, only_found):
    store = shutil.copy(FILES / "claims.sqlite", tmp_path)
    run(
        "claims", "train-eval", "--data", "digits", "--quick", "--seeds", "2", "--processes", "0",
        "--quiet", "--store", store, "--out", tmp_path / "claims.json",
    )  # fmt: skip
    found, before = (
        json.loads((folder / "claims.json").read_text()) for folder in (tmp_path, FILES)
    )
    assert found["claims"] == before["claims"]


def test_a_model_pickled_whole_before_computes_the_same():
    x, answer = torch.load(FILES / "answer.pt")
    model = torch.load(FILES / "whole.pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), answer)
    model.train()
    model(x)
    tn.commit(model)
    assert model[3].options.sync
    assert model[1].num_batches_tracked == 4


def test_what_a_pickled_layer_had_pending_is_committed_and_calls_begin_again():
    norm, both = torch.load(FILES / "pending.pt", weights_only=False)
    assert norm.num_batches_tracked == 0
    norm.commit()
    assert norm.num_batches_tracked == 1
    x = torch.randn(6, 4)
    both(x)
    both(x)  # the second forward begins at the first call's norm again
    assert [norm.num_batches_tracked.item() for norm in both[1].norms] == [2, 2]


def test_a_state_dict_saved_before_loads_by_the_same_names():
    state = torch.load(FILES / "state.pt")
    model = torch.load(FILES / "whole.pt", weights_only=False)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)


def test_a_classifier_pickled_before_predicts_as_it_did():
    classifier = pickle.loads((FILES / "classifier.pickle").read_bytes())
    rows, _ = load_iris(return_X_y=True)
    before = np.load(FILES / "classified.npy")
    np.testing.assert_allclose(classifier.predict_proba(rows), before, **CLOSE)


def test_a_diagnosis_written_before_is_a_baseline(tmp_path):
    sick = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    sick[1].running_var[0] = float("nan")
    torch.save(sick.state_dict(), tmp_path / "sick.pt")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path / "sick.pt")])
    assert ended.value.code == 1
    run("doctor", tmp_path / "sick.pt", "--baseline", FILES / "diagnosis.json")


def test_the_modules_of_before_are_found_and_have_their_names():
    from truenorm.functional import ACTIVATIONS
    from truenorm.sources import read_idx
    from truenorm.train import EarlyStopping, Epoch

    from truenorm.layers import BatchNorm2d, Renorm

    assert (BatchNorm2d, Renorm, EarlyStopping) == (tn.BatchNorm2d, tn.Renorm, tn.EarlyStopping)
    assert "relu" in ACTIVATIONS
    assert tn.functional.ACTIVATIONS is ACTIVATIONS
    assert callable(read_idx)
    assert callable(sources.read)
    assert Epoch.__module__ == "truenorm.training.history"


def test_a_name_that_no_module_of_before_had_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'truenorm\.norms' has no attribute 'BatchNorm9d'"):
        tn.norms.BatchNorm9d  # noqa: B018
    with pytest.raises(ImportError):
        import truenorm.nothing  # noqa: F401
