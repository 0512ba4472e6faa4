"""Where a norm has vanished nothing runs, and all that finds modules still finds one there."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import truenorm as tn
from foldable import images, lively


class Block(nn.Module):
    """A norm in a list of modules, and one that the forward calls by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.stem(x)))


@pytest.fixture(name="folded")
def _folded() -> nn.Module:
    torch.manual_seed(0)
    return tn.fold(lively(Block()), images()).model


def calls_of(model: nn.Module) -> list[str]:
    """Kinds of the modules whose way of calling torch runs in one forward."""
    called, code = [], nn.Module._call_impl.__code__

    def note(frame, event, _):
        if event == "call" and frame.f_code is code:
            called.append(type(frame.f_locals["self"]).__name__)

    sys.setprofile(note)
    try:
        model(images())
    finally:
        sys.setprofile(None)
    return called


def test_a_folded_model_calls_what_computes_and_nothing_else(folded):
    assert calls_of(folded) == ["Block", "Sequential", "Conv2d", "ReLU", "Conv2d"]


def test_indices_and_keys_stay_where_norms_have_vanished(folded):
    assert isinstance(folded.stem[1], nn.Identity)
    assert isinstance(folded.stem[2], nn.ReLU)
    assert list(folded.state_dict()) == ["stem.0.weight", "stem.0.bias", "conv.weight", "conv.bias"]
    assert folded.get_submodule("norm") is folded.norm


def test_hooks_are_called_where_a_norm_has_vanished(folded):
    seen: list[str] = []
    hooks = [
        folded.norm.register_forward_pre_hook(lambda *_: seen.append("before")),
        folded.norm.register_forward_hook(lambda *_: seen.append("after")),
        folded.norm.register_full_backward_hook(lambda *_: seen.append("back")),
    ]
    folded(images()).sum().backward()
    assert seen == ["before", "after", "back"]
    for hook in hooks:
        hook.remove()
    assert calls_of(folded)[-1] == "Conv2d"


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "traced by torch.jit": lambda model: torch.jit.trace(model, images()),
    "scripted": torch.jit.script,
    "traced by torch.fx": torch.fx.symbolic_trace,
    "exported": lambda model: torch.export.export(model, (images(),)).module(),
    "exported strictly": lambda model: torch.export.export(
        model, (images(),), strict=True
    ).module(),
    "captured": lambda model: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_a_folded_model_goes_where_models_go(folded, way):
    torch.testing.assert_close(WAYS[way](folded)(images()), folded(images()))


def test_a_folded_model_folds_to_itself(folded):
    again = tn.fold(folded, images())
    assert (again.pairs, again.left) == ((), ())
    assert torch.equal(again.model(images()), folded(images()))


# -- sizes that a model does not take -------------------------------------------------------------


def test_a_model_of_one_size_is_told_in_one_line():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    folded = tn.fold(lively(model), images(4, 1, 8, 8))
    assert folded.unproved == ("inputs of other sizes: the model takes none of the 4 tried",)
    assert {f"an input of {rows} x 1 x 8 x 8" for rows in (1, 2, 3)} <= set(folded.proved)


def test_sizes_that_a_model_does_not_take_are_told_in_one_line():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PixelUnshuffle(2))
    told = tn.fold(lively(model), images(4, 1, 8, 8)).unproved
    assert told == (
        "an input of 3 x 1 x 9 x 9, an input of 1 x 1 x 7 x 7: the model does not take it",
    )
