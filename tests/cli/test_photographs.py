"""300 photographs as people have them, through every command."""

from __future__ import annotations

import contextlib
import csv
import io
import json

import pytest
import torch

import truenorm
from photographs import CLASSES, photographs
from truenorm.cli import main
from truenorm.data.reading import Reading
from truenorm.training import job

SPEC = truenorm.ModelSpec(name="convnet", widths=(8, 16))
TRAINING = {
    "epochs": 3, "batch_size": 16, "lr": 0.01, "schedule": "onecycle", "augment": "light",
    "threads": 1, "patience": 3,
}  # fmt: skip


def call(capsys, *tokens):
    with pytest.raises(SystemExit) as end:
        main([str(t) for t in tokens])
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "photographs"
    names = photographs(folder)
    (folder / CLASSES[0] / "broken.jpg").write_bytes(b"")
    return folder, list(names)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run's folder, and what the command printed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    options = [t for k, v in TRAINING.items() for t in (f"--{k.replace('_', '-')}", str(v))]
    tokens = (
        "train", "--data", photos[0], "--model", "convnet", "--widths", "8,16",
        "--image-size", "32", "--skip-unreadable", "--run-dir", run, *options,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        main([str(t) for t in tokens])
    assert end.value.code == 0
    return run, out.getvalue()


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_training_tells_what_was_read_and_learns_what_is_upright(photos, trained):
    folder, names = photos
    run, printed = trained
    assert f"{folder}: 15 images of 16 bits are scaled to 8" in printed
    assert "1 of 301 images cannot be read and is left out: at the left/broken.jpg" in printed
    result = json.loads((run / "result.json").read_text())
    assert result["train_examples"] + result["val_examples"] + result["test_examples"] == 300
    # By the stored pixels the classes could not be told apart: chance is a third.
    assert result["test_accuracy"] > 0.8
    config = json.loads((run / "config.json").read_text())
    assert config["reading"] == {"image_size": 32, "skip_unreadable": True}
    assert config["train"]["augment"] == "light"
    mistakes = round((1 - result["test_accuracy"]) * result["test_examples"])
    page = (run / "report.html").read_text()
    assert sum(name in page for name in names) == min(mistakes, 24)


def test_without_a_size_one_is_chosen_and_told(photos):
    splits = truenorm.load(str(photos[0]), skip_unreadable=True)
    assert splits.input_shape == (3, 64, 64)
    assert "300 images of 298 sizes, " in splits.notes[0]
    assert "are read at 64 x 64" in splits.notes[0]


@pytest.mark.parametrize("form", ["run", "folded.safetensors", "exported.pt2"])
def test_every_form_of_the_model_predicts_folders_files_and_one_file(
    photos, trained, form, tmp_path, capsys
):
    folder, names = photos
    model = trained[0]
    if form != "run":
        model = tmp_path / form
        command = "fold" if form.startswith("folded") else "export"
        assert call(capsys, command, trained[0], "-o", model)[0] == 0
    status, out, err = call(capsys, "predict", model, folder, "--skip-unreadable")
    assert status == 0
    assert "300 examples, accuracy" in err
    whole = rows_of(out)
    assert [row["file"] for row in whole] == names
    one = rows_of(call(capsys, "predict", model, folder / names[7])[1])
    assert [row["file"] for row in one] == [str(folder / names[7])]
    few = rows_of(call(capsys, "predict", model, *(folder / n for n in names[5:9]))[1])
    for row, of_folder in zip([*one, *few], [whole[7], *whole[5:9]], strict=True):
        assert row["class"] == of_folder["class"]
        for label in CLASSES:
            expected = pytest.approx(float(of_folder[f"p({label})"]), abs=1e-4)
            assert float(row[f"p({label})"]) == expected


def test_photographs_sorted_otherwise_than_by_class_are_predicted_without_accuracy(
    photos, trained, tmp_path, capsys
):
    folder, names = photos
    for i, name in enumerate(names[:4]):
        album = tmp_path / "albums" / f"of 202{i % 2}"
        album.mkdir(parents=True, exist_ok=True)
        (album / name.split("/")[-1]).write_bytes((folder / name).read_bytes())
    status, out, err = call(capsys, "predict", trained[0], tmp_path / "albums")
    assert status == 0
    assert len(rows_of(out)) == 4
    assert "nothing is scored" in err
    assert "the label 'of 2020' of example 0 is none of the known classes" in err
    assert "correct the label" not in err
    assert "4 examples\n" in err


def test_an_unreadable_photograph_is_refused_in_prediction_and_named(photos, trained, capsys):
    folder, _ = photos
    status, out, err = call(capsys, "predict", trained[0], folder)
    assert (status, out) == (2, "")
    assert "broken.jpg: is no readable image (an empty file); mend or remove it, or leave" in err
    assert err.count("\n") == 1


def test_a_run_on_photographs_that_was_cut_off_ends_with_the_same_bits(
    photos, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("truenorm.training.fit._CHECKPOINT_SECONDS", 0)
    reading = Reading(image_size=32, skip_unreadable=True)
    run = tmp_path / "cut"
    begun = job.start(str(photos[0]), SPEC, changes=TRAINING, folder=run, reading=reading)

    def cut_off(progress):
        if progress.record is not None:
            raise KeyboardInterrupt

    begun.save(begun.execute(cut_off))
    assert not (run / "result.json").exists()
    assert call(capsys, "train", "--resume", run, "--quiet")[0] == 0
    for name in ("metrics.csv", "model.safetensors"):
        ours, theirs = (place / name for place in (run, trained[0]))
        if name == "metrics.csv":  # but for the seconds
            kept = ("epoch", "train_loss", "valid_loss", "valid_accuracy", "lr")
            assert [[r[k] for k in kept] for r in rows_of(ours.read_text())] == [
                [r[k] for k in kept] for r in rows_of(theirs.read_text())
            ]
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    # A photograph that has changed since is noticed.
    path = photos[0] / CLASSES[0] / "broken.jpg"
    path.write_bytes((photos[0] / photos[1][0]).read_bytes())
    (run / "result.json").unlink()
    status, _, err = call(capsys, "train", "--resume", run)
    path.write_bytes(b"")
    assert status == 2
    assert "has changed since" in err


def test_the_doctor_examines_the_run_on_its_photographs_and_on_others(
    photos, trained, tmp_path, capsys
):
    status, out, _ = call(capsys, "doctor", trained[0])
    assert status in (0, 1)
    assert "passed" in out
    photographs(tmp_path / "others", 60, seed=1)
    status, _, err = call(capsys, "doctor", trained[0], "--data", tmp_path / "others")
    assert (status in (0, 1), err) == (True, "")


def test_norms_are_compared_on_photographs(photos, tmp_path, capsys):
    status, out, _ = call(
        capsys, "compare", "--data", photos[0], "--model", "convnet", "--widths", "4",
        "--norm", "batch,none", "--seeds", 2, "--epochs", 1, "--lr", 0.01, "--augment", "light",
        "--image-size", 16, "--skip-unreadable", "--processes", 1,
        "--store", tmp_path / "s.sqlite", "--out", tmp_path / "s.json", "--json",
    )  # fmt: skip
    assert status == 0
    assert len(json.loads(out)["rows"]) == 4


def test_what_a_model_sees_of_a_photograph_has_the_size_of_its_training(trained):
    model = truenorm.training.saved.load_model(trained[0])
    assert model.input_shape == (3, 32, 32)
    assert model.input_type == str(torch.uint8)
