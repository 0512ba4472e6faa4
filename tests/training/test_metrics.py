"""What a confusion matrix says by class: scikit-learn's numbers, and those of a skewed table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

import truenorm
from truenorm.training.judgement import judge
from truenorm.training.metrics import ClassScores

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(LABELS)
def test_every_figure_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    true, predicted = map(np.array, zip(*pairs, strict=True))
    confusion = metrics.confusion_matrix(true, predicted, labels=range(5))
    found = ClassScores.from_confusion(torch.from_numpy(confusion))
    of = metrics.precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    for ours, *theirs in zip(found.of, *of, strict=True):
        assert [ours.precision, ours.recall, ours.f1] == pytest.approx(theirs[:3])
        assert ours.support == theirs[3]
    assert found.macro_f1 == pytest.approx(
        metrics.f1_score(true, predicted, average="macro", zero_division=0)
    )
    recalls = [metrics.recall_score(true == k, predicted == k) for k in set(true.tolist())]
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert found.majority_share == np.bincount(true).max() / len(true)


def test_on_a_skewed_table_a_model_that_always_says_no_is_seen_through() -> None:
    x = np.zeros((1000, 2), np.float32)
    x[:, 0] = np.arange(1000)
    y = np.where(np.arange(1000) % 33 == 0, "ill", "well")
    splits = truenorm.load((x, y))
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 5.0]))
    judged = judge(model, splits)
    assert judged.scores.accuracy == judged.by_class.majority_share == pytest.approx(0.97)
    assert judged.by_class.balanced_accuracy == 0.5
    assert [round(c.f1, 3) for c in judged.by_class.of] == [0.0, 0.985]
    mistake = judged.mistakes[0]
    assert splits.test is not None
    row = int(mistake.name.removeprefix("row "))
    assert row % 33 == 0
    assert splits.test.x[mistake.number, 0] == row
