"""What the inputs, outputs and axes of an ONNX file are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truenorm as tn
import zoo
from foldable import images
from truenorm.calling.call import Call

Interface = dict[str, list[int | str]]


def interface(path: Path) -> tuple[Interface, Interface]:
    """Names and shapes of what a file takes and gives, as onnxruntime reads them."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken, given = session.get_inputs(), session.get_outputs()
    return {one.name: one.shape for one in taken}, {one.name: one.shape for one in given}


class Returning(nn.Module):
    """Gives what it was made with, of one linear layer's output."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(6, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y,), ["output"]),
        (lambda y: [y, y + 1], ["output_0", "output_1"]),
        (lambda y: {"logits": y, "states": (y + 1, {"last": y + 2})},
         ["logits", "states_0", "states_1_last"]),
        (lambda y: {"x": y, "a b": y + 1, 3: y + 2, "none": None}, ["x_", "a_b", "output_3"]),
        (lambda y: {"one": y, "same": y}, ["one", "same"]),
    ],
    ids=["tensor", "tuple of one", "list", "nested", "odd keys", "twice the same"],
)  # fmt: skip
def test_outputs_are_called_by_the_keys_of_what_the_model_returns(tmp_path, make, names):
    tn.export(Returning(make).eval(), images(4, 6), tmp_path / "m.onnx")
    taken, given = interface(tmp_path / "m.onnx")
    assert taken == {"x": ["batch", 6]}
    assert given == {name: ["batch", 4] for name in names}


def test_a_classifiers_output_is_called_logits(tmp_path):
    model = Returning(lambda y: y).eval()
    tn.export(model, images(4, 6), tmp_path / "m.onnx", about={"classes": list("abcd")})
    assert interface(tmp_path / "m.onnx")[1] == {"logits": ["batch", 4]}


class Pair(nn.Module):
    """Two inputs of which each may have as many rows as it likes."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left.sum(1), right.reshape(-1)


def test_a_second_number_of_rows_is_called_by_its_input(tmp_path):
    tn.export(Pair(), (images(4, 6), images(4, 2)), tmp_path / "m.onnx")
    taken, given = interface(tmp_path / "m.onnx")
    assert taken == {"left": ["batch", 6], "right": ["right_batch", 2]}
    assert given == {"output_0": ["batch"], "output_1": ["2*right_batch"]}


@pytest.mark.parametrize(
    ("name", "taken", "given"),
    [
        ("resnet", ["pixel_values", "labels"], ["loss", "logits"]),
        ("unet", ["x"], ["output"]),
    ],
)
def test_public_architectures_keep_their_own_names(tmp_path, name, taken, given):
    model = zoo.build(name).eval()
    call = Call(model).prepare(zoo.batches(name)[0])
    tn.export(model, call.kwargs or call.args, tmp_path / "m.onnx")
    inputs, outputs = interface(tmp_path / "m.onnx")
    assert (list(inputs), list(outputs)) == (taken, given)
    assert all(shape[0] == "batch" for shape in (*inputs.values(), outputs[given[-1]]))
    outs = tn.load_program(tmp_path / "m.onnx").run(call.args, call.kwargs)
    assert len(outs) == len(given)
    assert torch.isfinite(outs[-1]).all()
