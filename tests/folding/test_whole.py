"""What is proved from end to end, what is not, and what the proof may cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import truenorm as tn
from foldable import images, lively
from truenorm.folding import building
from truenorm.folding.fold import Folded, fold
from truenorm.folding.whole import FoldProgress


def forms(folded: Folded) -> dict[str, str]:
    return {pair.norm: pair.form for pair in folded.pairs}


def reasons(folded: Folded) -> dict[str, str]:
    return dict(folded.left)


# -- other public methods -------------------------------------------------------------------------


class Staged(nn.Module):
    """A model that also gives what it has in between, as the image models of timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), None
        self.body = nn.Conv2d(8, 8, 3)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.forward_features(x)).relu().mean((2, 3)))


def test_a_fold_that_makes_another_function_of_a_public_method_is_left():
    model = lively(Staged())
    folded = fold(model, images())
    assert forms(folded) == {"stem.1": "into producer"}
    assert reasons(folded) == {"norm": "with it, the method forward_features is another function"}
    assert folded.changed == ()
    assert "forward_features" in folded.proved
    expected = model.forward_features(images())
    torch.testing.assert_close(folded.model.forward_features(images()), expected)


def test_a_fold_for_the_forward_alone_names_the_methods_it_changes():
    model = lively(Staged())
    folded = fold(model, images(), forward_only=True)
    assert forms(folded) == {"stem.1": "into producer", "norm": "into producer"}
    assert folded.changed == ("forward_features",)
    torch.testing.assert_close(folded.model(images()), model(images()))


class Writing(nn.Module):
    """Public methods that are nobody's to call, and one that changes what it runs on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.called: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def save_features(self, x: Tensor) -> None:
        raise AssertionError(self.conv(x))

    def embed(self, x: Tensor) -> Tensor:
        self.conv.bias.mul_(2)
        return self.norm(self.conv(x))

    def classify(self, x: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError(self.conv(x), labels)


def test_methods_are_called_on_copies_where_they_take_the_example_and_write_nothing():
    model = lively(Writing())
    before = model.conv.weight.clone()
    folded = fold(model, images())
    assert "norm" in reasons(folded)  # embed doubles a bias that a fold would have changed
    assert torch.equal(model.conv.weight, before)
    torch.testing.assert_close(folded.model(images()), model(images()))


# -- proofs that say nothing ----------------------------------------------------------------------


class Chaos(nn.Module):
    """A pair, and the logistic map ``steps`` times on what it gives: each step loses a bit."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.steps = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), steps

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).sigmoid()
        for _ in range(self.steps):
            y = 4 * y * (1 - y)
        return y


def test_a_model_that_its_own_rounding_moves_as_far_as_a_fold_could_not_be_proved():
    folded = fold(lively(Chaos(100)), images())
    assert "could not be proved: the model's own rounding" in reasons(folded)["norm"]
    assert not folded.pairs
    assert any("own rounding" in told for told in folded.unproved)


def test_chaos_where_nothing_more_precise_runs_could_not_be_proved():
    folded = fold(lively(Chaos(60)).double(), images().double())
    assert "could not be proved: the model's own rounding" in reasons(folded)["norm"]


def test_where_single_precision_is_chaotic_the_proof_is_that_in_double_and_the_noise_is_told():
    folded = fold(lively(Chaos(13)), images())
    assert forms(folded) == {"norm": "into producer"}
    assert folded.noise is not None
    assert folded.noise > 0.01
    assert folded.exact is not None
    assert folded.exact < 1e-8


def test_a_wrong_fold_does_not_pass_in_the_noise(monkeypatch):
    right = building._write

    def spoil(model, target, owner):
        right(model, target, owner)
        owner.bias.data.add_(0.01)

    monkeypatch.setattr(building, "_write", spoil)
    for steps in (0, 13, 100):
        folded = fold(lively(Chaos(steps)), images())
        assert not folded.pairs
        assert len(folded.left) == 1


class Telling(nn.Module):
    """A pair, of which the outputs tell little."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.norm = way, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.way == "empty":
            return y[y > 1e9]
        if self.way == "constant":
            return (y > 1e9).float()
        return y.argmax(1)


@pytest.mark.parametrize(
    ("way", "told"), [("empty", "outputs on the example are empty"), ("constant", "changed by 1 %")]
)
def test_outputs_that_say_nothing_are_no_proof(way, told):
    folded = fold(lively(Telling(way)), images())
    assert told in reasons(folded)["norm"]
    assert "could not be proved" in reasons(folded)["norm"]
    assert not folded.pairs


def test_outputs_that_are_integers_are_compared_in_double():
    folded = fold(lively(Telling("argmax")), images())
    assert forms(folded) == {"norm": "into producer"}


# -- what the proof may cost ----------------------------------------------------------------------


def test_without_time_the_examples_are_proved_and_all_else_is_told():
    model = lively(Staged())
    folded = fold(model, images(), seconds=0)
    assert forms(folded) == {"stem.1": "into producer", "norm": "into producer"}
    assert set(folded.proved) == {
        "the example", "random numbers like the example", "random numbers opposite to the example",
    }  # fmt: skip
    told = [line for line in folded.unproved if "the time that proofs may take is over" in line]
    assert [line.partition(":")[0] for line in told][-1] == "forward_features"
    assert len(told) == 5


def test_without_time_nothing_is_looked_for_in_what_fails(monkeypatch):
    right = building._write

    def spoil(model, target, owner):
        right(model, target, owner)
        owner.bias.data.add_(0.01)

    monkeypatch.setattr(building, "_write", spoil)
    folded = fold(lively(Staged()), images(), seconds=0)
    assert not folded.pairs
    assert set(reasons(folded)) == {"stem.1", "norm"}
    assert "time that proofs may take is over" in reasons(folded)["norm"]


def test_a_negative_time_is_refused():
    with pytest.raises(tn.InputError, match=r"seconds must be 0 or more.*got -1"):
        fold(lively(Staged()), images(), seconds=-1)


def test_progress_is_told_from_the_first_trial_to_the_last():
    seen: list[FoldProgress] = []
    fold(lively(Telling("argmax")), images(), observe=seen.append)
    assert seen[0] == FoldProgress(0, seen[0].total, "the example")
    assert seen[-1].done == seen[-1].total == seen[0].total
    assert [one.done for one in seen] == list(range(seen[0].total + 1))
