from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from samples import blobs
from truenorm import NormClassifier

# A weight multiplies an example's loss, but an example that is there twice also enters the
# batch statistics twice, may meet itself in a batch, and moves the cut between training and
# validation. No network trained in random batches can make the two the same to the bit.
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": "batches and the held-out share differ",
}


@parametrize_with_checks(
    [NormClassifier(random_state=0)], expected_failed_checks=lambda _: EXPECTED
)
def test_it_passes_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_it_learns_wine_and_digits():
    for load in (load_wine, load_digits):
        x, y = load(return_X_y=True)
        scores = cross_val_score(NormClassifier(random_state=0), x, y, cv=3)
        assert scores.mean() > 0.93


def test_it_keeps_what_it_learned_through_pickle():
    x, y = blobs(90)
    model = NormClassifier(epochs=5, random_state=0).fit(x, y)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(model.predict_proba(x), again.predict_proba(x))


def test_the_same_random_state_gives_the_same_bits():
    x, y = blobs(90)
    a, b, c = (NormClassifier(epochs=3, random_state=s).fit(x, y) for s in (1, 1, 2))
    assert np.array_equal(a.predict_proba(x), b.predict_proba(x))
    assert not np.array_equal(a.predict_proba(x), c.predict_proba(x))


def test_its_history_tells_of_the_fit():
    x, y = blobs(90)
    model = NormClassifier(epochs=7, random_state=0).fit(x, y)
    assert model.n_iter_ == len(model.history_.epochs) <= 7
    assert model.best_epoch_ == model.history_.best_epoch >= 1
    assert model.n_features_in_ == 6
    assert not model.model_.training


def test_warm_start_goes_on_where_the_last_fit_ended():
    x, y = blobs(90, spread=2.0)
    model = NormClassifier(epochs=2, lr=1e-3, warm_start=True, recipe="classic", random_state=0)
    losses = [model.fit(x, y).history_.epochs[0].train_loss for _ in range(4)]
    network = model.model_
    assert model.fit(x, y).model_ is network
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ValueError, match="warm_start goes on with the classes"):
        model.fit(x, y + 1)


def test_examples_of_weight_zero_are_as_if_absent():
    x, y = blobs(90)
    weight = np.ones(90)
    weight[::3] = 0
    with_zeros = NormClassifier(epochs=3, random_state=0).fit(x, y, sample_weight=weight)
    kept = weight > 0
    without = NormClassifier(epochs=3, random_state=0).fit(x[kept], y[kept], weight[kept])
    assert np.array_equal(with_zeros.predict_proba(x), without.predict_proba(x))


def test_heavy_examples_decide_between_contradictions():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 3)), 2, axis=0)
    y = np.tile([0, 1], 40)
    weight = np.where(y == 1, 20.0, 1.0)
    predicted = NormClassifier(random_state=0).fit(x, y, sample_weight=weight).predict(x)
    assert (predicted == 1).all()


def test_it_works_in_pipelines_and_grid_search():
    x, y = load_wine(return_X_y=True)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), NormClassifier(epochs=10, random_state=0)),
        {"normclassifier__norm": ["batch", "layer"], "normclassifier__hidden": [(8,), (8, 8)]},
        cv=2,
    ).fit(x, y)
    assert search.best_score_ > 0.85


def test_feature_names_and_text_labels_are_kept():
    x, y = blobs(60)
    frame = pd.DataFrame(x, columns=list("abcdef"))
    model = NormClassifier(epochs=4, random_state=0).fit(frame, np.array(["x", "y", "z"])[y])
    assert list(model.feature_names_in_) == list("abcdef")
    assert set(model.predict(frame)) <= {"x", "y", "z"}
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[list("fedcba")])


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group", "instance", "rms"])
def test_every_norm_fits(norm):
    x, y = blobs(90)
    model = NormClassifier(hidden=(16, 16), norm=norm, dropout=0.1, random_state=0).fit(x, y)
    assert model.score(x, y) > 0.85


def test_a_bad_parameter_is_refused_when_fitting():
    x, y = blobs(30)
    with pytest.raises(ValueError, match="unknown norm 'bach'"):
        clone(NormClassifier(norm="bach")).fit(x, y)
    with pytest.raises(ValueError, match="lr must be"):
        NormClassifier(lr=-1.0).fit(x, y)
    with pytest.raises(ValueError, match=r"valid must lie in \(0, 1\)"):
        NormClassifier(valid=1.5).fit(x, y)
