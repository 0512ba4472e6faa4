"""An exported file is the model, at any batch size, or there is no file."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import truenorm as tn
from foldable import Heads, images, lively, resnet
from truenorm.folding import export as exporting

RAW = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
SCALING = tn.Scaling(torch.tensor([[[100.0]], [[120.0]], [[90.0]]]), torch.full((1,), 1 / 60))


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("fold_norms", [True, False])
def test_a_file_gives_the_models_answers_at_any_batch_size(tmp_path, suffix, fold_norms):
    model = resnet()
    exported = tn.export(
        model, images(1, 3, 12, 12), tmp_path / f"m.{suffix}", fold_norms=fold_norms
    )
    assert exported.batch == "dynamic"
    assert exported.error < 1e-5
    run = tn.load_program(exported.path).run
    for size in (1, 2, 7):
        x = torch.randn(size, 3, 12, 12)
        torch.testing.assert_close(run((x,), {})[0], model(x).detach(), atol=1e-5, rtol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == [f"m.{suffix}"]


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_file_takes_raw_images_and_carries_its_metadata(tmp_path, suffix):
    model, about = resnet(), {"classes": ["cat", "dog"]}
    exported = tn.export(model, RAW, tmp_path / f"m.{suffix}", scaling=SCALING, about=about)
    program = tn.load_program(exported.path)
    assert program.about["classes"] == ["cat", "dog"]
    assert program.about["scaling"] == SCALING.to_json()
    expected = model(SCALING(RAW)).detach()
    torch.testing.assert_close(program.run((RAW,), {})[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_rows_of_numbers_are_scaled_in_the_file(tmp_path, suffix):
    model = lively(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()))
    scaling = tn.Scaling(torch.arange(6.0), torch.linspace(0.5, 2, 6))
    exported = tn.export(model, images(4, 6), tmp_path / f"m.{suffix}", scaling=scaling)
    assert exported.folded.left == ()
    got = tn.load_program(exported.path).run((images(3, 6),), {})[0]
    torch.testing.assert_close(got, model(scaling(images(3, 6))).detach())
    half = exported.folded.model.half()
    assert half(images(3, 6)).dtype == torch.float16


def test_an_onnx_file_has_no_batch_norm_left(tmp_path):
    import onnx

    tn.export(resnet(), images(2, 3, 12, 12), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_a_model_in_train_mode_is_exported_for_evaluation(tmp_path):
    model = resnet().train()
    exported = tn.export(model, images(2, 3, 12, 12), tmp_path / "m.pt2")
    assert model.training
    model.eval()
    x = images(4, 3, 12, 12)
    got = tn.load_program(exported.path).run((x,), {})[0]
    torch.testing.assert_close(got, model(x).detach(), atol=1e-5, rtol=1e-4)


class Several(nn.Module):
    """Two inputs by name, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        out = self.heads(left)
        return {"sum": out + right, "out": out}


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_named_inputs_and_several_outputs_are_exported(tmp_path, suffix):
    model = lively(Several())
    example = {"left": images(4, 6), "right": images(4, 6)}
    exported = tn.export(model, example, tmp_path / f"m.{suffix}")
    outs = tn.load_program(exported.path).run((), example)
    for got, expected in zip(outs, model(**example).values(), strict=True):
        torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_file_that_is_not_the_model_is_not_left_behind(tmp_path, monkeypatch):
    old = tmp_path / "m.pt2"
    old.write_bytes(b"what was there before")
    right = exporting._WRITERS["pt2"]

    def wrong(model, *given):
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        right(model, *given)

    monkeypatch.setitem(exporting._WRITERS, "pt2", wrong)
    with pytest.raises(tn.InputError, match=r"not the model: its outputs differ by \d"):
        tn.export(resnet(), images(2, 3, 12, 12), old)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert old.read_bytes() == b"what was there before"


class Deciding(nn.Module):
    """A forward that no tracer follows."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "name", "told"),
    [
        (Deciding(), "m.onnx", "cannot be traced"),
        (nn.ReLU(), "m.bin", "format must be onnx or pt2"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(tmp_path, model, name, told):
    with pytest.raises(tn.InputError, match=told):
        tn.export(model, images(2, 6), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "content"), [("m.onnx", b"x"), ("m.pt2", b"x")])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    with pytest.raises(tn.InputError, match="no such file"):
        tn.load_program(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(tn.InputError, match="cannot load it"):
        tn.load_program(tmp_path / name)


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipping") / "run"
    given = ["--data", "digits", "--model", "convnet", "--widths", "8,8", "--epochs", "1"]
    assert truenorm("train", *given, "--run-dir", str(folder), "--quiet").returncode == 0
    return folder


def truenorm(*args: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "truenorm", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=where, check=False)


@functools.cache
def answers(place: Path) -> dict[str, object]:
    done = truenorm("predict", str(place), "digits", "--json")
    assert done.returncode == 0, done.stderr
    return {key: json.loads(done.stdout)[key] for key in ("predicted", "accuracy", "classes")}


@pytest.mark.parametrize(
    ("command", "name"), [("fold", "f.safetensors"), ("export", "m.onnx"), ("export", "m.pt2")]
)
def test_what_a_run_ships_predicts_as_the_run_does(run, tmp_path, command, name):
    done = truenorm(command, str(run), "-o", str(tmp_path / name), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {pair["norm"] for pair in told["pairs"]} >= {"(input scaling)"}
    assert len(told["pairs"]) >= 3
    assert told["left"] == []
    assert told["error"] < 1e-5
    assert answers(tmp_path / name) == answers(run)


FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
"""


def test_a_factorys_model_is_folded_saved_and_loaded(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FACTORY)
    given = ["fold", "mine:make", "--shape", "3,9,9", "-o", "f.safetensors"]
    done = truenorm(*given, where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 folded, 0 left" in done.stdout
    made: dict[str, object] = {}
    exec(FACTORY, made)
    model = made["make"]()
    folded = tn.load_folded(made["make"](), tmp_path / "f.safetensors")
    torch.testing.assert_close(folded(images()), model(images()))
    fresh = tn.load_folded(made["make"]().train(), tmp_path / "f.safetensors")
    assert not any(module.training for m in (folded, fresh) for module in m.modules())
    with pytest.raises(tn.InputError, match="of another model than Linear"):
        tn.load_folded(nn.Linear(2, 2), tmp_path / "f.safetensors")


STAGED = """
from torch import nn

class Staged(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.running_mean)

    def features(self, x, mask=None):
        return self.conv(x)

    def forward(self, x, mask=None):
        return self.norm(self.features(x)).relu()
"""


def test_the_command_tells_what_it_left_what_it_changed_and_what_it_did_not_prove(tmp_path):
    (tmp_path / "mine.py").write_text(STAGED)
    given = ["fold", "mine:Staged", "--shape", "3,9,9"]
    left = truenorm(*given, where=tmp_path)
    assert "left: is in train mode" in left.stdout
    (tmp_path / "mine.py").write_text(STAGED + "\ndef make():\n    return Staged().eval()\n")
    given[1] = "mine:make"
    left = truenorm(*given, where=tmp_path)
    assert "left: with it, the method features is another function" in left.stdout
    assert "not proved: argument mask: no example gives it" in left.stdout
    folded = truenorm(*given, "--forward-only", where=tmp_path)
    assert "1 folded, 0 left" in folded.stdout
    assert "changed: the method features is another function" in folded.stdout
    assert "proved on the example, random numbers like the example" in folded.stdout
    folded = truenorm(*given, "--forward-only", "--seconds", "0", where=tmp_path)
    assert "1 folded, 0 left" in folded.stdout
    assert "not proved: features: the time that proofs may take" in folded.stdout


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fold", "mine:make", "--shape", "3,9,9", "--seconds", "-1"], "seconds must be 0 or more"),
        (["fold", "mine:make"], "an example is needed"),
        (["fold", "mine:make", "--shape", "3,x"], "--shape must be sizes"),
        (["fold", "mine:make", "--shape", "4,9,9"], "does not run"),
        (["fold", "mine:make", "--shape", "3,9,9", "-o", "f.onnx"], "--out must end in .safetens"),
        (["export", "mine:make", "--shape", "3,9,9", "-o", "f.bin"], "--out must end in .onnx"),
        (["fold", "nothing"], "nothing"),
        (["predict", "nothing.onnx", "digits"], "no such file"),
    ],
)
def test_what_the_commands_cannot_do_is_one_line(tmp_path, args, told):
    (tmp_path / "mine.py").write_text(FACTORY)
    done = truenorm(*args, where=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_without_classes_predicts_nothing(tmp_path):
    tn.export(resnet(), images(2, 3, 12, 12), tmp_path / "m.onnx")
    done = truenorm("predict", str(tmp_path / "m.onnx"), "digits")
    assert done.returncode == 2
    assert "does not say what its classes are" in done.stderr
