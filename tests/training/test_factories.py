"""Models of a user's own, named package.module:factory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import own_models
import truenorm
from states import same_state
from truenorm import InputError, ModelSpec, Splits, TrainConfig
from truenorm.data.datasets import dataset
from truenorm.factories import name_of
from truenorm.models import build, identified

NORMS = ["own", "none", "batch", "layer", "group", "instance", "rms", "renorm", "ghost"]


@pytest.mark.parametrize("norm", NORMS)
def test_all_norms_of_a_factory_share_its_other_weights(norm):
    spec = ModelSpec(name="own_models:plain", norm=norm)
    own = build(ModelSpec(name="own_models:plain", norm="own"), (1, 8, 8), 3, seed=4)
    model = build(spec, (1, 8, 8), 3, seed=4)
    for i in (0, 4):
        assert same_state(own[i].state_dict(), model[i].state_dict())
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 3)
    other = build(spec, (1, 8, 8), 3, seed=5)
    assert not torch.equal(other[0].weight, model[0].weight)


def test_random_states_are_given_back_after_a_factory():
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    build(ModelSpec(name="own_models:plain", norm="own"), (1, 8, 8), 3, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert (numbers == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "own_models:absent"}, "has no attribute 'absent'"),
        ({"name": "own_model:plain"}, "no module named 'own_model'"),
        ({"name": "own_models:"}, "give package.module:factory"),
        ({"name": "own_models.py:plain"}, "as it is imported, own_models:plain"),
        ({"name": "own_models:demanding"}, "takes width, and a factory is given input_shape, "),
        ({"name": "own_models:nothing"}, "returned int, not a torch.nn.Module"),
        ({"name": "own_models:failing"}, "KeyError: 'width' ("),
        ({"name": "own_models:MODEL"}, "is a model; give a function"),
        ({"name": "own_models:without_norm", "norm": "batch"}, "norm batch (it has no batch norm)"),
        ({"name": "own_models:rows", "norm": "instance"}, "instance norm leaves zeros"),
        ({"name": "own_models:plain", "widths": (3,)}, "widths is for the built-in models"),
        ({"name": "own_models:plain", "dropout": 0.5}, "dropout is for the built-in models"),
        ({"name": "vgg"}, "unknown model 'vgg'; choose one of mlp, convnet"),
        ({"name": "mlp", "norm": "own"}, "unknown norm 'own'"),
    ],
)
def test_what_is_no_factory_or_does_not_fit_is_refused(fields, message):
    with pytest.raises(InputError) as refused:
        build(ModelSpec(**{"norm": "own", **fields}), (1, 8, 8), 3, seed=0)
    assert message in str(refused.value)


def test_a_digest_tells_code_and_weights_apart():
    def digest(name, shape=(1, 8, 8)):
        return identified(ModelSpec(name=f"own_models:{name}"), shape, 3).digest

    assert digest("plain") == digest("plain")
    assert digest("plain") != digest("plain", (2, 8, 8))
    assert identified(ModelSpec(), (4,), 3) == ModelSpec()
    assert "digest" not in ModelSpec(name="own_models:plain").to_json()
    with pytest.raises(InputError, match="different models from the same seed"):
        digest("moody")


def test_a_function_is_named_as_others_import_it():
    assert name_of(own_models.plain) == "own_models:plain"
    for nameless in (lambda: None, pytest.fixture, type("Made", (), {})):
        if nameless is pytest.fixture:
            continue
        with pytest.raises(InputError, match="at the top of a module"):
            name_of(nameless)


@pytest.fixture
def images(tmp_path):
    """A small .npz of bytes, and its path."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 60, (60, 8, 8)).astype(np.uint8) + (y * 90).astype(np.uint8)[:, None, None]
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return tmp_path / "images.npz"


@pytest.mark.parametrize("factory", ["plain", "transformers_resnet", "monai_densenet"])
def test_a_run_of_ones_own_model_is_trained_resumed_and_used(cli, images, tmp_path, factory):
    if "_" in factory:
        pytest.importorskip(factory.partition("_")[0])
    run = tmp_path / "run"
    options = ["--data", images, "--model", f"own_models:{factory}", "--epochs", "2"]
    status, out, err = cli("train", *options, "--batch-size", "8", "--run-dir", run)
    assert status == 0, err
    assert f"own_models:{factory}, its own norms; default recipe" in out
    assert json.loads((run / "config.json").read_text())["spec"]["name"].endswith(factory)
    assert f"<h1>own_models:{factory} on" in (run / "report.html").read_text()
    assert cli("predict", run, images, "--out", "plain.csv")[0] == 0
    if factory == "plain":
        assert cli("train", "--resume", run, "--epochs", "3", "--quiet")[0] == 0
    else:
        assert cli("doctor", run, "--fail-on", "error")[0] in (0, 1)


@pytest.mark.parametrize("factory", ["plain", "transformers_resnet"])
def test_a_run_of_ones_own_model_is_folded_and_exported(cli, images, tmp_path, factory):
    if "_" in factory:
        pytest.importorskip(factory.partition("_")[0])
    run = tmp_path / "run"
    options = ["--data", images, "--model", f"own_models:{factory}", "--epochs", "1", "--quiet"]
    assert cli("train", *options, "--batch-size", "8", "--run-dir", run)[0] == 0
    assert cli("predict", run, images, "--out", "plain.csv")[0] == 0
    assert cli("fold", run, "--out", "folded.safetensors", "--seconds", "0")[0] == 0
    assert cli("predict", "folded.safetensors", images, "--out", "folded.csv")[0] == 0
    status, _, err = cli("export", run, "--no-fold", "--out", "model.pt2")
    assert status == 0, err
    assert cli("predict", "model.pt2", images, "--out", "exported.csv")[0] == 0
    tables = [
        np.genfromtxt(f"{n}.csv", delimiter=",", skip_header=1)
        for n in ("plain", "folded", "exported")
    ]
    np.testing.assert_allclose(tables[1], tables[0], atol=1e-5)
    np.testing.assert_allclose(tables[2], tables[0], atol=1e-5)


def test_a_factory_is_given_another_norm_by_train(cli, images, tmp_path):
    options = ["--data", images, "--model", "own_models:plain", "--norm", "group", "--epochs", "1"]
    assert cli("train", *options, "--batch-size", "8", "--run-dir", tmp_path / "run")[0] == 0
    trained = truenorm.load_model(tmp_path / "run")
    assert type(trained.model[1]).__name__ == "GroupNorm"


def test_a_run_whose_factory_is_gone_or_has_changed_says_so(cli, images, tmp_path, monkeypatch):
    options = ["--data", images, "--model", "own_models:plain", "--epochs", "1"]
    run = tmp_path / "run"
    assert cli("train", *options, "--batch-size", "8", "--run-dir", run)[0] == 0
    monkeypatch.setattr(own_models, "plain", own_models.transformers_resnet)
    status, _, err = cli("predict", run, images)
    assert status == 2
    assert "do not fit what own_models:plain builds now" in err
    monkeypatch.delattr(own_models, "plain")
    status, _, err = cli("predict", run, images)
    assert status == 2
    assert "module 'own_models' has no attribute 'plain'" in err


def test_a_head_of_other_classes_is_refused_before_anything_is_written(cli, images, tmp_path):
    options = ["--data", images, "--model", "own_models:seven", "--run-dir", tmp_path / "run"]
    status, _, err = cli("train", *options)
    assert status == 2
    assert "own_models:seven gives (2, 7) for 2 examples" in err
    assert not (tmp_path / "run").exists()


def test_the_doctor_gives_a_factory_the_shape_and_the_classes_of_data(cli):
    assert cli("doctor", "own_models:rows", "--data", "iris", "--fail-on", "error")[0] == 0
    status, _, err = cli("doctor", "own_models:rows")
    assert status == 2
    assert "takes classes, and a factory is given nothing" in err


def test_a_factory_may_return_its_batches_too(cli, tmp_path):
    assert cli("doctor", "own_models:with_batches", "--fail-on", "error")[0] == 0
    spec = ModelSpec(name="own_models:with_batches", norm="own")
    rows = np.random.default_rng(0).normal(size=(30, 4))
    parts = dataset(rows[:20], np.arange(20) % 3), dataset(rows[20:], np.arange(10) % 3)
    model = build(spec, (4,), 3, seed=0)
    history = truenorm.fit(model, Splits(*parts), TrainConfig(epochs=1, batch_size=8))
    assert history.best_epoch == 1
