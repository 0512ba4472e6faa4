"""Classes that weigh more: scikit-learn's weights, the loss by hand, and what it changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

import truenorm
from truenorm import Dataset, InputError, NormClassifier, Splits, TrainConfig
from truenorm.training.class_weight import weighted, weights_of
from truenorm.training.evaluate import score
from truenorm.training.feed import InMemory
from truenorm.training.steps import Stepper

CPU = torch.device("cpu")


def rows(y: list[int], weight: list[float] | None = None, classes: int = 3) -> Dataset:
    x = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(len(y)))
    weights = None if weight is None else torch.tensor(weight)
    return Dataset(x, torch.tensor(y), tuple(range(classes)), weights)


def skewed(count: int = 400, rare: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that overlap, one of them rare."""
    rng = np.random.default_rng(0)
    y = (rng.random(count) < rare).astype(int)
    x = rng.normal(size=(count, 3)) + 1.2 * y[:, None]
    return x.astype(np.float32), y


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.25, 4)), min_size=1, max_size=30),
    st.booleans(),
)
def test_balanced_weights_are_scikit_learns(
    pairs: list[tuple[int, float]], by_example: bool
) -> None:
    y, weight = (list(values) for values in zip(*pairs, strict=True))
    data = rows(y, weight if by_example else None, 5)
    found = weights_of("balanced", data)
    assert found is not None
    present = np.unique(y)
    theirs = compute_class_weight(
        "balanced", classes=present, y=np.array(y), sample_weight=weight if by_example else None
    )
    assert found[torch.from_numpy(present)].tolist() == pytest.approx(theirs, rel=1e-5)
    absent = sorted(set(range(5)) - set(y))
    assert found[absent].tolist() == [1.0] * len(absent)


def test_none_changes_nothing_at_all() -> None:
    data = rows([0, 1, 2, 2])
    assert weights_of("none", data) is None
    assert weighted(data, None) is data


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_weighted_step_is_that_of_examples_weighed_one_by_one(
    smoothing: float, by_example: bool
) -> None:
    y = [0] * 12 + [1] * 3 + [2]
    own = [1.0 + i % 3 for i in range(16)] if by_example else None
    data = rows(y, own)
    config = TrainConfig(class_weight="balanced", batch_size=16, label_smoothing=smoothing)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    weights = weights_of("balanced", data)
    assert weights is not None
    with torch.no_grad():
        logs = model(Splits(data, data).scaling(data.x)).double().log_softmax(1)
        told = torch.full((16, 3), smoothing / 3, dtype=torch.float64)
        told[range(16), y] += 1 - smoothing
        each = -(told * logs).sum(1)
        of = weights[data.y].double() * (1 if own is None else torch.tensor(own).double())
        expected = (each * of).sum() / of.sum()
    stepper = Stepper(model, Splits(data, data), config)
    number, batches = next(iter(stepper.steps_of(1)))
    loss, share = stepper.update(number, batches)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert share == pytest.approx(float(of.sum()), rel=1e-6)


def test_the_validation_loss_is_the_same_objective_and_accuracy_counts_heads() -> None:
    data = rows([0] * 15 + [1])
    logits = torch.zeros(16, 3)
    logits[:, 0] = 2.0
    weights = weights_of("balanced", data)
    found = score(logits, data, weights)
    logs = logits.double().log_softmax(1)
    # Each of the two classes carries half of the loss, though one has 15 times the examples.
    assert found.loss == pytest.approx(float(-(logs[0, 0] + logs[0, 1]) / 2), rel=1e-6)
    assert found.accuracy == 15 / 16

    held_out = rows([0, 0, 1, 2])
    feed = InMemory(Splits(data, held_out), TrainConfig(class_weight="balanced"), CPU)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        expected = score(model(Splits(data, held_out).scaling(held_out.x)), held_out, weights)
    assert feed.validate(model, None, amp=False) == pytest.approx(expected, rel=1e-6)


def test_rare_examples_are_found_that_were_passed_over() -> None:
    x, y = skewed()
    splits = truenorm.load((x, y))
    found = {}
    for kind in ("none", "balanced"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        truenorm.fit(model, splits, TrainConfig(class_weight=kind, lr=0.05, epochs=15, threads=1))
        assert splits.test is not None
        with torch.no_grad():
            guess = model(splits.scaling(splits.test.x)).argmax(1)
        found[kind] = balanced_accuracy_score(splits.test.y, guess)
    assert found["balanced"] > found["none"] + 0.1


def test_what_has_no_classes_to_count_is_refused() -> None:
    x, y = skewed(40)
    model = nn.Linear(3, 2)
    config = TrainConfig(class_weight="balanced", epochs=1)
    with pytest.raises(InputError, match=r"class_weight counts the classes of Splits, got 'bal"):
        truenorm.fit(model, (x, y), config)
    with pytest.raises(InputError, match="class_weight is for cross entropy, and the loss is"):
        truenorm.fit(model, truenorm.load((x, y)), config, loss=nn.CrossEntropyLoss())
    with pytest.raises(InputError, match="unknown class_weight 'fair'; choose one of none, bal"):
        TrainConfig(class_weight="fair")  # type: ignore[arg-type]


def test_at_its_default_it_is_not_among_what_digests_are_made_of() -> None:
    assert "class_weight" not in TrainConfig().to_json()
    assert TrainConfig(class_weight="balanced").to_json()["class_weight"] == "balanced"
    before = dataclasses.asdict(TrainConfig())
    del before["class_weight"]
    assert TrainConfig(**before) == TrainConfig()


def test_the_command_line_passes_it_on(cli, tmp_path: Path) -> None:
    code, out, _ = cli(
        "train", "--data", "iris", "--epochs", 1, "--class-weight", "balanced", "--run-dir", "r"
    )
    assert code == 0
    assert "class weights balanced (in the train and val loss)" in out
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["train"]["class_weight"] == "balanced"


def test_the_classifier_weighs_as_scikit_learn_has_it() -> None:
    x, y = skewed()
    names = np.array(["well", "ill"])[y]
    shared = {"random_state": 0, "epochs": 10, "threads": 1}
    plain = NormClassifier(**shared).fit(x, names)
    balanced = NormClassifier(class_weight="balanced", **shared).fit(x, names)
    counts = {name: float(np.mean(names == name)) for name in ("well", "ill")}
    by_hand = {name: 1 / (2 * share) for name, share in counts.items()}
    same = NormClassifier(class_weight=by_hand, **shared).fit(x, names)
    scores = [balanced_accuracy_score(names, m.predict(x)) for m in (plain, balanced, same)]
    assert scores[1] > scores[0]
    np.testing.assert_allclose(balanced.predict_proba(x), same.predict_proba(x), atol=1e-4)


def test_class_weights_multiply_example_weights() -> None:
    x, y = skewed(200, 0.2)
    rng = np.random.default_rng(1)
    own = rng.uniform(0.5, 2, len(y))
    shared = {"random_state": 0, "epochs": 3, "threads": 1}
    both = NormClassifier(class_weight={1: 3.0}, **shared).fit(x, y, own)
    one = NormClassifier(**shared).fit(x, y, own * np.where(y == 1, 3.0, 1.0))
    np.testing.assert_array_equal(both.predict_proba(x), one.predict_proba(x))


@pytest.mark.parametrize("weights", [{0: -1.0}, {0: float("nan")}, {0: 0.0, 1: 0.0}])
def test_weights_that_cannot_be_are_refused(weights: dict[int, float]) -> None:
    x, y = skewed(60, 0.3)
    with pytest.raises(InputError, match="class_weight must hold finite numbers of at least 0"):
        NormClassifier(class_weight=weights).fit(x, y)
