from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from truenorm.errors import InputError
from truenorm.studies import paired, sequential
from truenorm.studies.paired import Comparison, compare_scores, verdict
from truenorm.studies.sequential import monitor

LOOKS_20 = tuple(range(3, 61, 3))


def one(a, b, **options) -> Comparison:
    return compare_scores({"batch": a, "group": b}, **options)[0]


def said(a, b, unit="", factor=1.0, **options):
    return verdict(one(a, b, **options), unit=unit, factor=factor)


def brute_force_p(differences):
    """Two-sided, over all sign flips, in exact fractions."""
    d = [Fraction(v) for v in differences]
    seen = abs(sum(d))
    flips = list(itertools.product((1, -1), repeat=len(d)))
    count = sum(abs(sum(s * v for s, v in zip(f, d, strict=True))) >= seen for f in flips)
    return count / len(flips)


def standard_error(rate, studies):
    return math.sqrt(rate * (1 - rate) / studies)


# -- each statistic against a reference -----------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("grid", [0, 1, 3], ids=["continuous", "many ties", "some ties"])
def test_the_sign_flip_p_is_brute_force(n, grid):
    rng = np.random.default_rng(n)
    for _ in range(4):
        d = rng.normal(0.5, 1, n)
        d = np.round(d * grid) / 4 if grid else d
        assert paired.sign_flip(d) == brute_force_p(d)


def test_the_sign_flip_p_is_scipys():
    d = np.random.default_rng(1).normal(0.4, 1, 12)
    for two_sided, way in ((True, "two-sided"), (False, "greater")):
        theirs = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=10_000, alternative=way
        )
        assert paired.sign_flip(d, two_sided=two_sided) == pytest.approx(theirs.pvalue)


def test_the_random_flips_agree_with_all_flips(monkeypatch):
    d = np.random.default_rng(2).normal(0.5, 1, (40, 14))
    exact = paired.sign_flip(d)
    paired._signs.cache_clear()
    monkeypatch.setattr(paired, "EXACT", 13)
    drawn = paired.sign_flip(d)
    paired._signs.cache_clear()
    tolerance = 4 * np.sqrt(exact * (1 - exact) / paired.FLIPS) + 1 / paired.FLIPS
    assert (np.abs(drawn - exact) <= tolerance).all()
    assert not (drawn == exact).all()


def test_a_p_of_random_flips_is_never_zero():
    assert paired.sign_flip(np.ones(40)) == 1 / (paired.FLIPS + 1)


def test_holm_is_the_example_worked_by_hand():
    # sorted 0.01 0.02 0.03 0.04, times 4 3 2 1: 0.04 0.06 0.06 0.04, never falling
    found = paired.holm([0.04, 0.01, 0.03, 0.02])
    np.testing.assert_allclose(found, [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(paired.holm([0.9, 0.6]), [1, 1])
    np.testing.assert_allclose(
        paired.holm([[0.01, 0.04], [0.5, 0.02]]), [[0.02, 0.04], [0.5, 0.04]]
    )


@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_holm_is_statsmodels(m):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    ps = np.random.default_rng(m).random(m) ** 3
    np.testing.assert_allclose(paired.holm(ps), multitest.multipletests(ps, method="holm")[1])


@pytest.mark.parametrize("d_z", [-1.5, 0.3, 0.8, 2.5])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_seeds_needed_and_their_power_are_statsmodels(d_z, alpha):
    power = pytest.importorskip("statsmodels.stats.power")
    n = paired.seeds_needed(d_z, alpha, 0.8)
    for count in (n - 1, n):
        theirs = power.TTestPower().power(abs(d_z), count, alpha) if count > 1 else 0.0
        assert (theirs >= 0.8) == (count == n)
    assert paired.power_at(n, d_z, alpha) == pytest.approx(power.TTestPower().power(d_z, n, alpha))


def test_both_kinds_of_test_are_corrected_as_worked_by_hand():
    # 0.001 * 2 pairs left; 0.002 * 2, and that pair is done; 0.03 * 1; 0.5 * 1
    different, within = paired.one_family([0.001, 0.03], [0.002, 0.5])
    np.testing.assert_allclose(different, [0.002, 0.03])
    np.testing.assert_allclose(within, [0.004, 0.5])
    different, within = paired.one_family([0.001, 0.03], [0.9, 0.5])
    np.testing.assert_allclose(different, [0.002, 0.06])  # a pair half done counts in full
    np.testing.assert_allclose(within, [1, 1])


def test_the_interquartile_mean_is_scipys():
    a = np.random.default_rng(25).gamma(2, size=(2, 11))
    found = one(*a)
    assert (found.iqm_a, found.iqm_b) == pytest.approx(tuple(stats.trim_mean(a, 0.25, axis=1)))


def test_equivalence_is_two_one_sided_permutation_tests():
    d = np.random.default_rng(3).normal(0.1, 0.5, 10)
    ps = [
        stats.permutation_test((x,), np.mean, permutation_type="samples", alternative="greater")
        for x in (d + 0.6, 0.6 - d)
    ]
    assert paired.equivalence(d, 0.6) == pytest.approx(max(p.pvalue for p in ps))


def test_the_bootstrap_t_interval_is_the_one_written_out():
    d = np.random.default_rng(4).gamma(3, size=12)
    rng, n, ends = np.random.default_rng(0), 12, []
    for x in (d, -d):
        t = []
        for _ in range(20_000):
            take = rng.choice(x, n)
            t.append((take.mean() - x.mean()) / (take.std(ddof=1) / math.sqrt(n)))
        high, low = np.quantile(t, [0.025, 0.975])
        error = x.std(ddof=1) / math.sqrt(n)
        ends.append((x.mean() - low * error, x.mean() - high * error))
    (low, high), (back_low, back_high) = ends
    expected = ((low - back_high) / 2, (high - back_low) / 2)
    assert paired.bootstrap_t(d) == pytest.approx(expected, abs=0.05 * d.std())


@pytest.mark.parametrize("n", [8, 9, 12])
def test_from_9_seeds_on_an_interval_is_the_wider_of_bootstrap_t_and_students_at_each_end(n):
    wider = 0
    for d in np.random.default_rng(n).gamma(1, size=(20, n)):
        theirs = stats.ttest_1samp(d, 0).confidence_interval(0.95)
        low, high = paired.bootstrap_t(d)
        expected = (min(low, theirs.low), max(high, theirs.high)) if n >= 9 else (low, high)
        assert paired.interval(d) == pytest.approx(expected)
        wider += expected != (low, high)
    assert wider > 15 if n >= 9 else wider == 0


@pytest.mark.parametrize("n", [2, 3])
def test_the_interval_of_two_or_three_seeds_is_students(n):
    a, b = np.random.default_rng(5).normal(size=(2, n))
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert paired.interval(a - b) == pytest.approx((theirs.low, theirs.high))


def test_an_interval_is_finite_where_ties_leave_resamples_no_spread():
    d = np.array([0.0, 0, 0, 0, 1])
    theirs = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert paired.interval(d) == pytest.approx((theirs.low, theirs.high))


def test_many_intervals_are_each_ones():
    d = np.random.default_rng(6).normal(size=(5, 9))
    low, high = paired.interval(d)
    for row, ends in zip(d, zip(low, high, strict=True), strict=True):
        assert paired.interval(row) == pytest.approx(ends)


def test_an_interval_beyond_what_resamples_can_tell_is_students():
    d = np.random.default_rng(24).normal(size=8)
    theirs = stats.ttest_1samp(d, 0).confidence_interval(0.9999)
    assert paired.interval(d, 0.9999) == pytest.approx((theirs.low, theirs.high))


def test_effect_sizes_are_the_formulas():
    a, b = np.random.default_rng(7).normal(size=(2, 9))
    found, d = one(a, b), a - b
    assert found.d_z == pytest.approx(d.mean() / d.std(ddof=1))
    j = math.gamma(4) / (math.sqrt(4) * math.gamma(3.5))  # 8 degrees of freedom
    assert found.g_z == pytest.approx(found.d_z * j)
    assert found.superiority == np.mean(a > b)
    assert found.iqm_a == pytest.approx(np.sort(a)[2:-2].mean())
    assert one([1, 2, 3, 5], [1, 1, 4, 4]).superiority == 0.625


def test_seeds_needed_are_the_textbooks():
    # Cohen's and G*Power's paired t-test at 5 % two-sided, 80 %: d_z 0.2, 0.5, 0.8
    assert [paired.seeds_needed(d) for d in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert paired.seeds_needed(0.0) is None
    assert paired.seeds_needed(-0.5) == 34
    assert paired.seeds_needed(0.001) == 7_848_880
    assert paired.seeds_needed(50.0) == 2
    assert paired.seeds_needed(0.5, 0.05, 0.01) == 2  # any test finds that much
    assert paired.seeds_needed(1e-200) is None


@pytest.mark.parametrize(("d_z", "more"), [(0.8, 15), (1.0, 11), (1.5, 7), (5.0, 6)])
def test_few_seeds_are_as_many_as_the_sign_flip_test_itself_needs(d_z, more):
    least = max(paired.seeds_needed(d_z), paired.least_seeds(1))
    n = paired.flips_needed(least, d_z)
    assert n == more
    d = np.random.default_rng(99).normal(d_z, 1, (4000, n))
    assert (paired.sign_flip(d) <= 0.05).mean() >= 0.78


@pytest.mark.parametrize(("family", "least"), [(1, 6), (2, 7), (3, 7), (4, 8), (6, 8), (28, 11)])
def test_fewer_than_the_least_seeds_can_tell_nothing(family, least):
    assert paired.least_seeds(family) == least
    assert family * paired.sign_flip(np.ones(least)) <= 0.05
    assert family * paired.sign_flip(np.ones(least - 1)) > 0.05


# -- verdicts -------------------------------------------------------------------------------------

SURE = np.array([0.3, 0.5, 0.2, 0.4, 0.6, 0.35, 0.45, 0.5])


def test_a_sentence_says_better_by_how_much():
    found = said(SURE / 100, np.zeros(8), "points", 100)
    low, high = (100 * v for v in paired.interval(SURE / 100))
    assert found.decision == "better"
    assert found.sentence == (
        f"batch is better than group by 0.41 points (95 % interval {low:.2f} to {high:.2f}, n = 8, "
        "p = 0.0078)."
    )


def test_a_sentence_of_several_pairs_names_holm():
    zero = np.zeros(8)
    scores = {"batch": SURE, "group": zero, "layer": zero}
    texts = [verdict(c).sentence for c in compare_scores(scores)]
    assert "p = 0.023 after Holm" in texts[0]
    assert texts[2].startswith("cannot tell group from layer: 0.00 (95 % interval 0.00 to 0.00")
    assert texts[2].endswith("no number of seeds can be named for a difference of zero.")


def test_a_lower_loss_is_better_by_a_positive_amount():
    found = said(-SURE, np.zeros(8), higher_is_better=False)
    assert found.decision == "better"
    assert "batch is better than group by 0.41 (95 % interval 0." in found.sentence
    assert said(-SURE, np.zeros(8)).decision == "worse"


def test_cannot_tell_names_the_seeds_that_would():
    d = np.array([1.0, -0.8, 0.5, 0.9, -0.7, 0.6, -0.2, 0.4])
    found = one(d, np.zeros(8))
    needed = paired.seeds_needed(d.mean() / d.std(ddof=1))
    assert found.seeds_needed == needed
    assert f"; {needed - 8} more seeds would at 80 % power" in verdict(found).sentence


def test_seeds_needed_reckon_with_the_family():
    d = np.array([1.0, -0.8, 0.5, 0.9, -0.7, 0.6, -0.2, 0.4])
    alone, of_three = one(d, 0 * d), compare_scores({"a": d, "b": 0 * d, "c": -3 * d})[0]
    assert of_three.seeds_needed == paired.seeds_needed(alone.d_z, 0.05 / 3) > alone.seeds_needed


def test_five_seeds_are_told_that_six_are_needed():
    found = said([1, 2, 3, 4, 5], [0, 0, 0, 0, 0])
    assert found.decision == "cannot tell"
    assert "n = 5), and fewer than 6 seeds can tell nothing; 1 more seed would" in found.sentence


def test_differences_within_the_margin_are_equivalent():
    found = said(SURE, np.zeros(8), "points", margin=1.0)
    assert found.decision == "equivalent"
    assert found.sentence.startswith("batch and group are equivalent within 1 point: 0.41 points (")
    assert said(SURE, np.zeros(8), margin=0.3).decision == "better"
    assert said(np.zeros(8), np.zeros(8), margin=0.1).decision == "equivalent"


def test_equivalence_is_corrected_over_the_family():
    zero = np.zeros(6)
    scores = {"a": zero, "b": zero, "c": zero}
    assert {c.p_equivalent_holm for c in compare_scores(scores, margin=1.0)} == {3 / 64}
    four = compare_scores({**scores, "d": zero}, margin=1.0)
    assert {verdict(c).decision for c in four} == {"cannot tell"}


# -- failed runs, few seeds, bad input ------------------------------------------------------------


def test_a_failed_run_drops_its_seed_from_its_pairs_and_is_counted():
    a, b, c = np.random.default_rng(8).normal(size=(3, 9))
    a[2], b[5] = np.nan, np.nan
    ab, ac, bc = compare_scores({"a": a, "b": b, "c": c})
    assert [(x.n, x.dropped) for x in (ab, ac, bc)] == [(7, 2), (8, 1), (8, 1)]
    keep = ~np.isnan(a - b)
    assert ab.p == paired.sign_flip((a - b)[keep])
    assert "n = 7, 2 dropped for failed runs" in verdict(ab).sentence


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([], [], "no seed has both scores; at least 6"),
        ([1.0], [2.0], "only 1 seed has both scores; at least 6"),
        ([math.nan] * 8, range(8), "no seed has both scores, 8 dropped for failed runs; at least"),
        ([1, 5], [2, 3], "fewer than 6 seeds can tell nothing"),
        ([3] * 8, [3] * 8, "no number of seeds can be named"),
    ],
    ids=["n = 0", "n = 1", "all failed", "n = 2", "all differences zero"],
)
def test_what_cannot_be_told_says_why(a, b, reason):
    found = said(np.array(a), np.array(b))
    assert found.decision == "cannot tell"
    assert reason in found.sentence


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_seeds_are_not_equivalent_either(n):
    assert said(np.zeros(n), np.zeros(n), margin=0.1).decision == "cannot tell"


def test_the_same_difference_on_every_seed_is_a_sure_one():
    found = one(np.full(8, 0.3), np.full(8, 0.1))
    assert (found.low, found.high) == pytest.approx((0.2, 0.2))
    assert (found.d_z, found.seeds_needed) == (None, 6)
    assert verdict(found).decision == "better"


def test_rounding_is_no_difference():
    a = np.array([0.1 + 0.2, 0.7, 0.9, 0.3, 0.2, 0.1, 0.8])
    b = np.array([0.3, 0.7, 0.9, 0.1 + 0.2, 0.2, 0.1, 0.8])
    assert one(a, b).difference == 0
    assert one(a, b).p == 1


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        ({"a": [1, math.inf], "b": [1, 2]}, {}, "finite.*got inf at position 1; mark a run that"),
        ({"a": [1, -1e200], "b": [1, 2]}, {}, "below 1e[+]100 in size, got -1e[+]200"),
        ({"a": [1, 2, 3], "b": [1, 2]}, {}, "one score for each seed, got {'a': 3, 'b': 2}"),
        ({"a": [[1, 2]], "b": [1, 2]}, {}, r"one axis, the seeds, got shape \(1, 2\)"),
        ({"a": ["x"], "b": [1]}, {}, "must be numbers"),
        ({"a": [1]}, {}, "at least one pair"),
        ({"a": [1], "b": [1]}, {"pairs": [("a", "c")]}, "unknown variant 'c'"),
        ({"a": [1], "b": [1]}, {"pairs": [("a", "a")]}, "two variants, got 'a' twice"),
        ({"a": [1], "b": [1]}, {"pairs": [("a", "b"), ("b", "a")]}, "name each pair once"),
        ({"a": [1], "b": [1]}, {"margin": 0}, "margin must be a positive number, got 0"),
        ({"a": [1], "b": [1]}, {"margin": math.nan}, "margin must be a positive number, got nan"),
        ({"a": [1], "b": [1]}, {"alpha": 5}, "alpha must lie between 0 and 1, got 5"),
        ({"a": [1], "b": [1]}, {"power": 80}, "power must lie between 0 and 1, got 80"),
    ],
)
def test_bad_input_is_refused_with_its_value(scores, options, words):
    with pytest.raises(InputError, match=words):
        compare_scores(scores, **options)


def test_more_pairs_than_random_flips_can_tell_are_refused():
    names = {f"v{i}": [1.0, 2.0] for i in range(46)}
    with pytest.raises(InputError, match=r"at most 1000 pairs can be told.*got 1035"):
        compare_scores(names)
    with pytest.raises(InputError, match=r"at most 500 pairs can be told.*got 1035"):
        monitor(names, [2], 2)


@pytest.mark.parametrize("looks", [[], [0, 4], [4, 4], [8, 4], [4, 9], [4, 12]])
def test_looks_that_cannot_be_are_refused(looks):
    scores = {"a": np.arange(8), "b": np.zeros(8)}
    with pytest.raises(InputError, match="looks must rise from at least 1"):
        monitor(scores, looks, 10)


# -- properties -----------------------------------------------------------------------------------

# Quarters: their sums and differences are exact, so that equal things are equal to the bit.
quarters = st.integers(-40, 40).map(lambda v: v / 4)
tables = st.integers(0, 10).flatmap(
    lambda n: st.tuples(*(st.lists(quarters | st.just(math.nan), min_size=n, max_size=n),) * 2)
)
FLIPPED = {"better": "worse", "worse": "better"}
SYMMETRIC = ("n", "dropped", "p", "p_holm", "p_equivalent", "seeds_needed", "least_seeds")


def same(x, y):
    return x == y if x is None or y is None else x == pytest.approx(y, rel=1e-9, abs=1e-9)


@given(tables, st.sampled_from([None, 2.0]))
def test_swapping_a_and_b_flips_the_verdict(table, margin):
    a, b = map(np.array, table)
    there, back = one(a, b, margin=margin), one(b, a, margin=margin)
    assert all(same(getattr(there, k), getattr(back, k)) for k in SYMMETRIC)
    decision = verdict(there).decision
    assert verdict(back).decision == FLIPPED.get(decision, decision)
    if there.n > 1:
        assert same(there.low, -back.high)
        assert same(there.high, -back.low)
        assert same(there.superiority, 1 - back.superiority)


@given(tables, quarters)
def test_adding_a_constant_to_both_changes_nothing(table, shift):
    a, b = map(np.array, table)
    was, now = one(a, b), one(a + shift, b + shift)
    assert all(same(getattr(was, k), getattr(now, k)) for k in (*SYMMETRIC, "low", "high", "d_z"))
    assert verdict(was).sentence == verdict(now).sentence


@given(tables, st.sampled_from([0.25, 2.0, 64.0]), quarters)
def test_intervals_follow_a_scale_and_a_shift(table, scale, shift):
    a, b = map(np.array, table)
    was, scaled, moved = one(a, b), one(a * scale, b * scale), one(a + shift, b)
    assert all(same(getattr(was, k), getattr(scaled, k)) for k in (*SYMMETRIC, "d_z", "g_z"))
    for end in ("difference", "low", "high"):
        if getattr(was, end) is not None:
            assert same(getattr(scaled, end), scale * getattr(was, end))
            assert same(getattr(moved, end), getattr(was, end) + shift)


@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_seeds_does_not_matter(table, random):
    order = list(range(len(table[0])))
    random.shuffle(order)
    a, b = map(np.array, table)
    was, now = one(a, b, margin=1.0), one(a[order], b[order], margin=1.0)
    assert all(same(getattr(was, k), getattr(now, k)) for k in (*SYMMETRIC, "low", "high"))
    assert verdict(was) == verdict(now)


def test_the_order_of_seeds_does_not_matter_to_random_flips():
    a, b = np.random.default_rng(9).normal(size=(2, 30))
    order = np.random.default_rng(10).permutation(30)
    assert one(a, b).p == one(a[order], b[order]).p == one(b, a).p


# -- rates, by simulation -------------------------------------------------------------------------


def test_under_the_null_a_family_errs_in_at_most_five_percent_of_studies():
    scores = np.random.default_rng(11).normal(size=(2000, 4, 8))
    pairs = list(itertools.combinations(range(4), 2))
    diffs = np.stack([scores[:, i] - scores[:, j] for i, j in pairs], 1)
    p = paired.holm(paired.sign_flip(diffs))
    for study in range(5):  # these are compare_scores' own
        named = dict(zip("abcd", scores[study], strict=True))
        assert [c.p_holm for c in compare_scores(named)] == pytest.approx(list(p[study]))
    assert (p.min(1) <= 0.05).mean() <= 0.05 + 3 * standard_error(0.05, 2000)


def test_a_difference_at_the_margin_is_called_equivalent_in_at_most_five_percent():
    d = np.random.default_rng(12).normal(1.0, 0.5, (2000, 10))
    rate = (paired.equivalence(d, 1.0) <= 0.05).mean()
    assert 0.03 < rate <= 0.05 + 3 * standard_error(0.05, 2000)


@pytest.mark.parametrize("n", [4, 5, 8, 16, 32])
@pytest.mark.parametrize("kind", ["normal", "skewness 1", "skewness 2", "t3"])
def test_intervals_cover_95_percent_give_or_take_2(n, kind):
    u = np.random.default_rng(n).random((2000, n))
    d = {
        "normal": lambda: stats.norm.ppf(u),
        "skewness 1": lambda: stats.gamma.ppf(u, 4) - 4,
        "skewness 2": lambda: stats.expon.ppf(u) - 1,
        "t3": lambda: stats.t.ppf(u, 3),
    }[kind]()
    low, high = paired.interval(d)
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97


@pytest.mark.parametrize(("d_z", "n"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_power_is_as_computed(d_z, n):
    d = np.random.default_rng(13).normal(d_z, 1, (2000, n))
    t = (stats.ttest_1samp(d, 0, axis=1).pvalue <= 0.05).mean()
    flips = (paired.sign_flip(d) <= 0.05).mean()
    power = paired.power_at(n, d_z)
    assert power == pytest.approx(t, abs=3 * standard_error(power, 2000))
    assert power == pytest.approx(flips, abs=0.04)


def test_the_sequential_rate_holds_under_20_looks():
    d = np.random.default_rng(14).normal(size=(2000, 60))
    first = sequential.crossed(d, LOOKS_20, 60, 0.05, paths=1999)
    rate = (first >= 0).mean()
    assert 0.03 < rate <= 0.05 + 3 * standard_error(0.05, 2000)
    naive = np.stack([paired.sign_flip(d[:300, :n]) for n in LOOKS_20[1:5]], 1).min(1)
    assert (naive <= 0.05).mean() > 0.08  # what four looks do to an uncorrected test


def test_each_look_spends_no_more_than_it_may():
    d = np.random.default_rng(15).standard_t(3, (2000, 20))
    looks = (5, 10, 15, 20)
    first = sequential.crossed(d, looks, 20, 0.2, paths=1999)
    for k, at in enumerate(looks):
        may = 0.2 * (at / 20) ** 2
        rate = ((first >= 0) & (first <= k)).mean()
        assert rate <= may + 3 * standard_error(may, 2000)
        if at > 5:  # of 5 seeds no flip is as rare as what may be spent
            assert rate >= may - 3 * standard_error(may, 2000)


def test_power_counts_both_sides():
    assert paired.power_at(6, 1e-6) == pytest.approx(0.05, abs=1e-4)


def test_conditional_power_is_how_often_the_trend_ends_beyond_the_bound():
    rng = np.random.default_rng(26)
    d = rng.normal(0.4, 1, 12)
    rest = rng.normal(d.mean(), d.std(ddof=1), (20_000, 12))
    last = (d.sum() + rest.sum(1)) / 24
    error = d.std(ddof=1) / math.sqrt(24)
    told = (np.abs(last) > stats.norm.isf(0.025) * error).mean()
    assert sequential._conditional(d, 12, 24, 0.05, None) == pytest.approx(told, abs=0.015)
    within = (np.abs(last) < 0.9 - stats.norm.isf(0.05) * error).mean()
    assert sequential._conditional(d, 12, 24, 0.05, 0.9) == pytest.approx(
        max(told, within), abs=0.015
    )


def test_equivalence_waits_for_the_later_of_its_two_tests():
    d = np.random.default_rng(27).normal(0.5, 1, (40, 24))
    looks = (6, 12, 18, 24)
    both = sequential._within(d, 1.2, looks, 24, 0.05)
    sides = [sequential.crossed(x, looks, 24, 0.05, two_sided=False) for x in (d + 1.2, 1.2 - d)]
    for found, above, below in zip(both, *sides, strict=True):
        assert found == (-1 if min(above, below) < 0 else max(above, below))
    assert any(0 <= above < below for above, below in zip(*sides, strict=True))


def half_zero_half_at_the_margin(seed, n, pairs=2, studies=2000):
    """Differences whose every verdict is wrong: noisy zeros, and margins of 1 with little noise."""
    odd = np.arange(pairs) % 2
    noise = np.random.default_rng(seed).normal(size=(studies, pairs, n))
    return odd, noise * np.where(odd, 0.3, 3)[:, None] + odd[:, None]


def test_both_kinds_of_verdict_together_err_in_at_most_five_percent():
    odd, d = half_zero_half_at_the_margin(21, 16)
    ps, tosts = paired.sign_flip(d), paired.equivalence(d, 1.0)
    wrong = {"one family": 0, "two families": 0}
    for p, tost in zip(ps, tosts, strict=True):
        for way, (different, within) in {
            "one family": paired.one_family(p, tost),
            "two families": (paired.holm(p), paired.holm(tost)),
        }.items():
            wrong[way] += (np.where(odd, within, different) <= 0.05).any()
    assert wrong["one family"] / 2000 <= 0.05 + 3 * standard_error(0.05, 2000)
    assert wrong["two families"] / 2000 > 0.065  # why it is one


def test_looks_with_a_margin_err_in_at_most_five_percent_over_both_kinds():
    _, d = half_zero_half_at_the_margin(22, 24, studies=400)
    zero, wrong = np.zeros(24), 0
    for few, many in d:
        scores = {"a": few, "b": many, "zero": zero}
        pairs = [("a", "zero"), ("b", "zero")]
        first, second = monitor(scores, (8, 16, 24), 24, pairs, margin=1.0, futility=False).pairs
        wrong += first.decision in ("better", "worse") or second.decision == "equivalent"
    assert wrong / 400 <= 0.05 + 3 * standard_error(0.05, 400)


# -- looks ----------------------------------------------------------------------------------------


def watched(effect, seeds=48, seed=16, **options):
    rng = np.random.default_rng(seed)
    scores = {"batch": effect + rng.normal(size=seeds), "group": np.zeros(seeds)}
    return monitor(scores, range(6, seeds + 1, 6), 48, **options).pairs[0]


def test_a_large_effect_is_told_before_the_last_look():
    found = watched(1.5)
    assert (found.decision, found.stopped, found.hopeless) == ("better", True, False)
    assert found.n < 48
    assert watched(-1.5).decision == "worse"
    assert watched(1.5, higher_is_better=False).decision == "worse"


def test_a_small_spread_is_told_to_be_equivalent_before_the_last_look():
    found = watched(0.0, margin=1.5)
    assert found.decision == "equivalent"
    assert found.n < 48


def test_a_hopeless_pair_is_given_up_from_half_of_the_seeds_on():
    rows = [watched(0.0, seed=s) for s in range(40)]
    lost = [row for row in rows if row.hopeless]
    assert len(lost) > 20
    assert all(24 <= row.n < 48 and row.conditional_power < 0.1 for row in lost)
    assert all(row.decision == "cannot tell" and row.stopped for row in lost)
    assert not any(watched(0.0, seed=s, futility=False).hopeless for s in range(5))


def test_giving_up_makes_no_error_more():
    for seed in range(60):
        given_up, not_given_up = (
            watched(0.0, seed=seed, futility=on).decision for on in (True, False)
        )
        assert given_up in ("cannot tell", not_given_up)


def test_scores_after_a_stop_and_before_a_look_are_not_looked_at():
    rng = np.random.default_rng(17)
    a, b = rng.normal(1.5, 1, 48), np.zeros(48)
    looks = range(6, 49, 6)
    whole = monitor({"a": a, "b": b}, looks, 48)
    at = whole.pairs[0].n
    assert at < 48
    later = a.copy()
    later[at:] = np.nan
    assert monitor({"a": later, "b": b}, looks, 48) == whole
    early = monitor({"a": a, "b": b}, range(6, at, 6), 48)
    assert not early.pairs[0].stopped
    assert early.running == ("a", "b")
    assert whole.running == ()


def test_a_variant_runs_on_while_one_of_its_pairs_is_open():
    rng = np.random.default_rng(18)
    scores = {"a": rng.normal(3, 1, 24), "b": rng.normal(size=24), "c": rng.normal(size=24)}
    found = monitor(scores, (8, 16, 24), 48, futility=False)
    told = {(w.a, w.b): w.decision for w in found.pairs}
    assert told == {("a", "b"): "better", ("a", "c"): "better", ("b", "c"): "cannot tell"}
    assert found.running == ("b", "c")


def test_a_difference_that_rounds_to_zero_has_no_minus():
    assert [paired.hundredths(v) for v in (-0.001, 0.0, -0.006, 1.005)] == [
        "0.00", "0.00", "-0.01", "1.00",
    ]  # fmt: skip


def test_what_is_decided_gives_its_share_to_the_rest():
    rng = np.random.default_rng(19)
    helped = 0
    for _ in range(60):
        d = rng.normal(0.65, 1, 24)
        zero = np.zeros(24)
        wide = {"a": d, "zero": zero, "sure": 5 + rng.normal(size=24)}
        pairs = [("a", "zero"), ("sure", "zero")]
        both = monitor(wide, (8, 16, 24), 24, pairs).pairs[0]
        half = sequential.crossed(d[None], (8, 16, 24), 24, 0.025)[0] >= 0
        alone = sequential.crossed(d[None], (8, 16, 24), 24, 0.05)[0] >= 0
        assert (both.decision == "better") <= alone
        assert half <= (both.decision == "better" or both.hopeless)
        helped += both.decision == "better" and not half
    assert helped


def test_with_a_margin_no_share_is_given_away():
    rng, looks, wider = np.random.default_rng(28), (8, 16, 24), 0
    for _ in range(60):
        d, zero = rng.normal(0.65, 1, 24), np.zeros(24)
        wide = {"a": d, "zero": zero, "sure": 5 + rng.normal(size=24)}
        pairs = [("a", "zero"), ("sure", "zero")]
        found = monitor(wide, looks, 24, pairs, margin=1e-3, futility=False).pairs
        assert found[1].decision == "better"
        half, whole = (sequential.crossed(d[None], looks, 24, a)[0] >= 0 for a in (0.025, 0.05))
        assert (found[0].decision == "better") == half
        wider += whole and not half
    assert wider


def test_swapping_flips_a_sequential_verdict_too():
    a, b = np.random.default_rng(20).normal(size=(2, 30)) + np.array([[0.9], [0]])
    there, back = (
        monitor({"a": a, "b": b}, range(5, 31, 5), 30, [pair]).pairs[0]
        for pair in (("a", "b"), ("b", "a"))
    )
    assert FLIPPED.get(there.decision, there.decision) == back.decision
    assert there.n == back.n


def test_a_sequential_study_of_runs_that_all_failed_cannot_tell():
    found = monitor({"a": [math.nan] * 8, "b": [1.0] * 8}, (4, 8), 8).pairs[0]
    assert (found.decision, found.stopped, found.hopeless) == ("cannot tell", True, False)


def test_a_pair_that_never_differs_is_given_up_at_half_of_the_seeds():
    found = monitor({"a": [1.0] * 8, "b": [1.0] * 8}, (2, 4, 6), 8).pairs[0]
    assert (found.decision, found.hopeless, found.n) == ("cannot tell", True, 4)
    assert found.conditional_power == 0


@pytest.mark.parametrize(("gain", "margin"), [(0.5, None), (0.0, 0.25), (0.5, 0.25)])
def test_a_pair_that_always_differs_alike_is_not_given_up(gain, margin):
    scores = {"a": [1.0 + gain] * 2, "b": [1.0] * 2}
    found = monitor(scores, (2,), 4, margin=margin).pairs[0]
    assert (found.stopped, found.conditional_power) == (False, 1)
