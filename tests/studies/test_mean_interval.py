"""A variant's interval does not leave what was seen, and a verdict says why it cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truenorm.studies.paired import compare_scores, interval, mean_interval, verdict


def test_one_bad_seed_of_eight_does_not_draw_the_interval_below_every_score() -> None:
    scores = np.array([0.933, 0.975, 0.976, 0.977, 0.974, 0.978, 0.975, 0.977])
    assert interval(scores)[0] < 0.933
    assert mean_interval(scores)[0] == 0.933


@given(st.lists(st.floats(0, 1), min_size=8, max_size=20))
def test_from_eight_scores_on_the_interval_lies_within_them(values: list[float]) -> None:
    scores = np.array(values)
    low, high = mean_interval(scores)
    assert scores.min() <= low <= high <= scores.max()


def test_it_still_holds_the_mean_of_skewed_scores() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.exponential(size=(600, 8))
    held = [low <= 1 <= high for low, high in map(mean_interval, drawn)]
    assert np.mean(held) == pytest.approx(0.93, abs=0.035)


def test_cannot_tell_beside_an_interval_without_zero_says_the_corrected_p_value() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0.9, 0.01, 12)
    scores = {
        "none": base,
        **{f"other{i}": base + rng.normal(0.004, 0.006, 12) for i in range(6)},
    }
    found = compare_scores(scores, [(f"other{i}", "none") for i in range(6)])
    told = [
        verdict(c).sentence for c in found if c.low is not None and c.low > 0 and c.p_holm > c.alpha
    ]
    assert told
    for sentence in told:
        assert (
            "its own interval leaves out 0, but the test, corrected by Holm over 6 pairs"
            in sentence
        )
