from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import truenorm
from truenorm import InputError


class Fixed(nn.Module):
    """Gives its input for logits, through a norm that would move in train mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, eps=0.0, affine=False)

    def forward(self, x):
        return self.norm(x)


X = torch.tensor([[2.0, 0, 0], [0, 1.0, 0], [0, 3.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
Y = torch.tensor([0, 1, 2, 2, 0])
LOSS = float(
    np.mean([np.log(np.exp(x).sum()) - x[y] for x, y in zip(X.numpy(), Y.numpy(), strict=True)])
)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize(
    "data",
    [
        lambda size: (X, Y),
        lambda size: (X.numpy(), Y.tolist()),
        lambda size: TensorDataset(X, Y),
        lambda size: DataLoader(TensorDataset(X, Y), size, shuffle=True),
        lambda size: truenorm.dataset(X, Y),
    ],
    ids=["tensors", "arrays", "dataset", "loader", "part"],
)
def test_scores_are_those_of_all_examples_whatever_the_batches(data, size):
    model = Fixed().train()
    scaling = truenorm.Scaling(None, torch.ones(1))
    before = torch.get_rng_state()
    scores = truenorm.evaluate(model, data(size), batch_size=size, scaling=scaling)
    assert scores.loss == pytest.approx(LOSS, rel=1e-6)
    assert scores.accuracy == pytest.approx(4 / 5)
    assert model.training
    assert model.norm.training
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(before, torch.get_rng_state())


def test_splits_are_judged_on_their_scaled_test_part(splits, model):
    truenorm.fit(model, splits, truenorm.TrainConfig(epochs=2, batch_size=16))
    whole = truenorm.Splits(splits.train, splits.valid, splits.valid.take(torch.arange(7)))
    expected = truenorm.score(
        truenorm.logits_of(model, whole.test, splits.scaling, torch.device("cpu")), whole.test
    )
    assert truenorm.evaluate(model, whole) == expected
    assert truenorm.evaluate(model, whole.test, scaling=splits.scaling) == expected
    with pytest.raises(InputError, match=r"scaling=splits\.scaling"):
        truenorm.evaluate(model, whole.test)


def test_another_loss_is_averaged_and_has_an_accuracy_only_for_classes():
    each = nn.MultiMarginLoss(reduction="none")
    scores = truenorm.evaluate(Fixed(), (X, Y), loss=each, batch_size=2)
    assert scores.loss == pytest.approx(each(X, Y).mean().item())
    assert scores.accuracy == pytest.approx(4 / 5)
    scores = truenorm.evaluate(Fixed(), (X, X + 1), loss=nn.MSELoss(), batch_size=2)
    assert scores.loss == pytest.approx(1.0)
    assert math.isnan(scores.accuracy)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match="no example to judge the model by"):
        truenorm.evaluate(Fixed(), DataLoader(TensorDataset(X[:0], Y[:0])))
    with pytest.raises(InputError, match="batch_size must be an integer of at least 1, got 0"):
        truenorm.evaluate(Fixed(), (X, Y), batch_size=0)
    with pytest.raises(InputError, match="give Splits, a torch Dataset, a DataLoader or a pair"):
        truenorm.evaluate(Fixed(), (TensorDataset(X, Y), TensorDataset(X, Y)))
    with pytest.raises(InputError, match="targets that are missing"):
        truenorm.evaluate(Fixed(), DataLoader(X, 2))


def test_the_module_of_then_that_has_its_name_is_still_there():
    module = importlib.import_module("truenorm.evaluate")
    assert module.Scores is importlib.import_module("truenorm.training.evaluate").Scores
    assert truenorm.evaluate(Fixed(), (X, Y)).accuracy == pytest.approx(4 / 5)
