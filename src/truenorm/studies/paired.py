"""Scores by seed -> paired comparisons and verdicts, all seeds at once. Pure functions, no I/O.

Seeds pair the scores by position. NaN marks a run that failed; its seed is dropped from every pair
of that variant and counted. All tests flip signs: under "no difference" each seed's difference
is as likely to be positive as negative, which is all that they assume.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special, stats

from truenorm.errors import InputError
from truenorm.studies.scores import Array, Pairs, checked, differences_of

Decision = Literal["better", "worse", "equivalent", "cannot tell"]

EXACT = 14  # up to so many seeds every sign flip is tried
FLIPS = 19_999  # beyond it, so many random ones
RESAMPLES = 4_999
WIDER_FROM = 9  # seeds from which an interval holds Student's, too
BLOCK = 10_000_000  # numbers in memory at once


@dataclass(frozen=True)
class Comparison:
    """Variant ``a`` beside ``b``: the statistics of a - b over the seeds that both have.

    Attributes:
        n, dropped: seeds compared, and seeds left out because a run of either failed.
        difference, low, high: mean of a - b and its interval at 1 - alpha (see
            :func:`interval`), not widened for the family; None below 1 and 2 seeds.
        p, p_holm: two-sided sign-flip test, alone and after Holm over the ``family``.
        p_equivalent, p_equivalent_holm: two one-sided sign-flip tests (TOST) of a difference
            within +- margin, alone and corrected; None without a margin. With one, both kinds
            of test are corrected as one family.
        d_z: mean over standard deviation of the differences; None if all are the same, but 0
            if all are zero.
        g_z: d_z with Hedges' correction; None below 3 seeds.
        superiority: share of seeds on which a is the better one, ties counting half.
        iqm_a, iqm_b: interquartile means of each variant's own finished runs.
        seeds_needed: seeds at which the test at alpha / family finds the observed d_z with the
            asked-for power, at least ``least_seeds``; None if no number can be named.
        least_seeds: if all pairs have fewer, no p_holm is <= alpha, whatever the scores.
    """

    a: str
    b: str
    n: int
    dropped: int
    difference: float | None
    low: float | None
    high: float | None
    p: float
    p_holm: float
    p_equivalent: float | None
    p_equivalent_holm: float | None
    d_z: float | None
    g_z: float | None
    superiority: float | None
    iqm_a: float | None
    iqm_b: float | None
    seeds_needed: int | None
    least_seeds: int
    family: int
    alpha: float
    power: float
    margin: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Verdict:
    """What a comparison says of ``a`` beside ``b``, and one plain sentence that says it."""

    a: str
    b: str
    decision: Decision
    sentence: str


def compare_scores(
    scores: Mapping[str, Any],
    pairs: Pairs | None = None,
    *,
    higher_is_better: bool = True,
    margin: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> tuple[Comparison, ...]:
    """Compare variants pair by pair, as one family.

    All tests are one family: the chance that any verdict is false is at most ``alpha``, those of
    difference and of equivalence taken together (see :func:`one_family`). The number of seeds
    must have been fixed beforehand; for looks in between there is
    :func:`truenorm.studies.sequential.monitor`.

    Args:
        scores: of each variant a metric by seed, (S,); NaN where the run failed.
        pairs: the family; all pairs if None.
        higher_is_better: False for a loss.
        margin: differences within +- margin count as none; None if every difference counts.

    Raises:
        InputError: scores of unequal lengths, infinite or beyond 1e100; names or numbers that
            cannot be.
    """
    rows, family = checked(scores, pairs, margin, alpha, FLIPS)
    if not 0 < power < 1:
        raise InputError(f"power must lie between 0 and 1, got {power!r}; 0.8 is usual.")
    diffs = [d[~np.isnan(d)] for d in (differences_of(rows[a], rows[b]) for a, b in family)]
    ps = [sign_flip(d) for d in diffs]
    tosts = None if margin is None else [equivalence(d, margin) for d in diffs]
    holms, tost_holms = (holm(ps), None) if tosts is None else one_family(ps, tosts)
    least = least_seeds(len(family), alpha)
    return tuple(
        Comparison(
            a=a,
            b=b,
            n=len(d),
            dropped=len(rows[a]) - len(d),
            p=float(ps[i]),
            p_holm=float(holms[i]),
            p_equivalent=None if tosts is None else float(tosts[i]),
            p_equivalent_holm=None if tost_holms is None else float(tost_holms[i]),
            **_effect(d if higher_is_better else -d, d, 1 - alpha),
            iqm_a=interquartile_mean(rows[a]),
            iqm_b=interquartile_mean(rows[b]),
            seeds_needed=_needed(d, least, alpha / len(family), power),
            least_seeds=least,
            family=len(family),
            alpha=alpha,
            power=power,
            margin=margin,
            higher_is_better=higher_is_better,
        )
        for i, ((a, b), d) in enumerate(zip(family, diffs, strict=True))
    )


def _effect(gains: Array, d: Array, level: float) -> dict[str, Any]:
    """How large the differences ``d`` are; ``gains`` are above 0 where a is the better one."""
    n, d_z = len(d), _d_z(d)
    low, high = interval(d, level) if n > 1 else (None, None)
    return {
        "difference": float(d.mean()) if n else None,
        "low": low,
        "high": high,
        "d_z": d_z,
        "g_z": None if d_z is None or n < 3 else d_z * _hedges(n - 1),
        "superiority": float((gains > 0).mean() + (gains == 0).mean() / 2) if n else None,
    }


def _needed(d: Array, least: int, alpha: float, power: float) -> int | None:
    """Seeds with which a test at ``alpha`` finds the observed d_z; None if none can be named."""
    d_z = _d_z(d)
    if d_z is None:  # the same difference on every seed, or too few
        return least if len(d) > 1 and d.any() else None
    needed = seeds_needed(d_z, alpha, power)
    return (
        None if needed is None else max(flips_needed(max(needed, least), d_z, alpha, power), least)
    )


def verdict(found: Comparison, *, unit: str = "", factor: float = 1.0) -> Verdict:
    """Say what a comparison decides.

    Equivalence within the margin is said before a difference: a difference inside the margin
    is one that the user does not count. ``factor`` takes the scores to ``unit`` in the sentence.
    """
    decision = _decision(found)
    text = _sentence(found, decision, f" {unit}" if unit else "", factor)
    return Verdict(found.a, found.b, decision, text)


def _decision(found: Comparison) -> Decision:
    if found.p_equivalent_holm is not None and found.p_equivalent_holm <= found.alpha:
        return "equivalent"
    if found.p_holm <= found.alpha and found.difference:
        return "better" if (found.difference > 0) == found.higher_is_better else "worse"
    return "cannot tell"


def _sentence(found: Comparison, decision: Decision, unit: str, factor: float) -> str:
    a, b, n = found.a, found.b, found.n
    gone = f", {found.dropped} dropped for failed runs" if found.dropped else ""
    if found.difference is None or found.low is None or found.high is None:
        seeds = "no seed has" if n == 0 else "only 1 seed has"
        return (
            f"cannot tell {a} from {b}: {seeds} both scores{gone}; "
            f"at least {found.least_seeds} seeds are needed."
        )
    values = [factor * v for v in (found.difference, found.low, found.high)]
    if decision in ("better", "worse") and values[0] < 0:  # "by" a positive amount
        values = [-values[0], -values[2], -values[1]]
    size, low, high = map(hundredths, values)
    level = f"{100 * (1 - found.alpha):g} % interval"
    after = " after Holm" if found.family > 1 else ""
    if decision in ("better", "worse"):
        return (
            f"{a} is {decision} than {b} by {size}{unit} ({level} {low} to {high}, n = {n}{gone}, "
            f"{_p(found.p_holm)}{after})."
        )
    if decision == "equivalent":
        assert found.margin is not None
        assert found.p_equivalent_holm is not None
        margin = amount(factor * found.margin, unit)
        return (
            f"{a} and {b} are equivalent within {margin}: {size}{unit} "
            f"({level} {low} to {high}, n = {n}{gone}, {_p(found.p_equivalent_holm)}{after})."
        )
    said = f"cannot tell {a} from {b}: {size}{unit} ({level} {low} to {high}, n = {n}{gone})"
    if n < found.least_seeds:
        of = f" among {found.family} pairs" if found.family > 1 else ""
        said += f", and fewer than {found.least_seeds} seeds can tell nothing{of}"
    elif found.low > 0 or found.high < 0:
        corrected = f", corrected by Holm over {found.family} pairs," if found.family > 1 else ""
        said += f"; its own interval leaves out 0, but the test{corrected} gives {_p(found.p_holm)}"
    if found.seeds_needed is None:
        return f"{said}; no number of seeds can be named for a difference of zero."
    more = max(1, found.seeds_needed - n)
    return (
        f"{said}; {more:,} more seed{'s' * (more > 1)} would at {100 * found.power:g} % power, "
        "if this difference is the true one."
    )


def hundredths(value: float) -> str:
    """Two decimals, and no minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def amount(value: float, unit: str) -> str:
    """A round number with its unit, in the singular where it is one."""
    number = f"{value:.3g}"
    return number + (unit.removesuffix("s") if number == "1" else unit)


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


# -- the statistics, one function each ------------------------------------------------------------


def sign_flip(differences: Array, *, two_sided: bool = True) -> Array:
    """P-values of the sign-flip test of a mean of zero, over the last axis: (..., n) -> (...).

    Exact, over all 2^n flips, to n = 14; beyond, (k + 1) / (N + 1) over N = 19,999 random ones
    (Phipson and Smyth 2010), the same for any order of the seeds. One-sided: of a mean above 0.
    """
    d = np.asarray(differences, dtype=float)
    n = d.shape[-1]
    flat = d.reshape(math.prod(d.shape[:-1]), n)
    signs, spare = _signs(n)
    p = np.empty(len(flat))
    rows = max(1, BLOCK // signs.shape[1])
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows]
        sizes = np.sort(np.abs(part), axis=1)
        slack = 1e-9 * sizes.sum(1)  # sums equal but for rounding are equal
        flipped, seen = sizes @ signs, part.sum(1)
        if two_sided:
            flipped, seen = np.abs(flipped), np.abs(seen)
        count = (flipped >= (seen - slack)[:, None]).sum(1)
        p[start : start + rows] = (count + spare) / (signs.shape[1] + spare)
    return p.reshape(d.shape[:-1])


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> tuple[Array, int]:
    """Signs (n, N), and how many flips beside them to count: the observed one, if N are drawn."""
    if n > EXACT:
        return np.random.default_rng(n).choice([-1.0, 1.0], (n, FLIPS)), 1
    bits = np.arange(2**n) >> np.arange(n)[:, None] & 1
    return 2.0 * bits - 1, 0


def equivalence(differences: Array, margin: float) -> Array:
    """P-values of two one-sided sign-flip tests (Schuirmann's TOST): (..., n) -> (...)."""
    d = np.asarray(differences, dtype=float)
    above, below = (sign_flip(s * d + margin, two_sided=False) for s in (1, -1))
    return np.maximum(above, below)


def holm(ps: Any) -> Array:
    """Holm's step-down correction over the last axis (Holm 1979)."""
    p = np.asarray(ps, dtype=float)
    m = p.shape[-1]
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, -1) * (m - np.arange(m))
    out = np.empty_like(p)
    np.put_along_axis(out, order, np.minimum(1, np.maximum.accumulate(steps, -1)), -1)
    return out


def one_family(ps: Any, tosts: Any) -> tuple[Array, Array]:
    """Holm's steps over both kinds of test of each pair, (m,) and (m,).

    Of a pair's two null hypotheses, "zero" and "beyond the margin", at most one is true. So of 2 m
    at most m are, and fewer only once both of a pair are rejected (Shaffer 1986). Holm on each
    kind by itself would let a family with both zeros and large differences err twice as often.
    """
    p, m = np.concatenate([ps, tosts]), len(ps)
    out, left, highest = np.empty(2 * m), np.full(m, 2), 0.0
    for i in np.argsort(p, kind="stable"):
        highest = max(highest, min(1.0, p[i] * np.count_nonzero(left)))
        out[i] = highest
        left[i % m] -= 1
    return out[:m], out[m:]


def least_seeds(family: int, alpha: float = 0.05) -> int:
    """Fewest seeds with which p after Holm can reach alpha: family * 2 / 2^n <= alpha."""
    return math.ceil(math.log2(2 * family / alpha) - 1e-12)


def interval(differences: Array, level: float = 0.95) -> tuple[Any, Any]:
    """Ends of the interval of the mean, over the last axis: (..., n) -> (...), (...).

    The bootstrap-t interval; from 9 seeds on each end is Student's where that lies farther out.
    Heavy tails (t3) take bootstrap-t alone to 91 % at n = 16, skewness 2 takes Student's alone to
    88 % at n = 4; this covers 93 to 97 % of normal, skewed and t3 differences at n = 4 to 32
    (by simulation, docs/statistics.md). Where one run in ten fails badly, none covers at these n.
    """
    d = np.sort(np.asarray(differences, dtype=float), axis=-1)  # for sums in any order of seeds
    low, high = bootstrap_t(d, level)
    if d.shape[-1] >= WIDER_FROM:
        mean, half = d.mean(-1), _student(d, level)
        low, high = np.minimum(low, mean - half), np.maximum(high, mean + half)
    return (float(low), float(high)) if d.ndim == 1 else (low, high)


def mean_interval(values: Array) -> tuple[float, float]:
    """Ends of the 95 % interval of one variant's mean score, of (n,) values.

    As :func:`interval`; from 8 values on it ends within them. There the mean lies beyond all of
    them once in 2^(n-1) times, where it is the median too, while resamples of few scores with one
    far below the others reach farther than any score was seen.
    """
    low, high = interval(values)
    if len(values) >= 8:
        low, high = max(low, float(values.min())), min(high, float(values.max()))
    return low, high


def _student(d: Array, level: float) -> Any:
    """Half the length of Student's interval of the mean, over the last axis."""
    n = d.shape[-1]
    return float(stats.t.ppf((1 + level) / 2, n - 1)) * d.std(-1, ddof=1) / math.sqrt(n)


def bootstrap_t(differences: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Ends of the bootstrap-t interval of the mean, over the last axis: (..., n) -> (...), (...).

    Each resample's mean is studentized by its own standard error (Efron and Tibshirani 1993,
    ch. 12). BCa covers 80 % of normal differences at n = 4, 88 at 8 and 92 at 16, so
    scipy.stats.bootstrap is not used. Student's interval takes its place for n < 4, above a level
    of 99.96 %, and where ties leave a resample no spread so often that an end would be infinite.
    Resamples are fixed, and the differences and their mirror image averaged, so neither order nor
    the direction of a - b changes anything.
    """
    d = np.sort(np.asarray(differences, dtype=float), axis=-1)
    n = d.shape[-1]
    mean = d.mean(-1)
    flat = (d - mean[..., None]).reshape(-1, n)
    half = _student(flat, level)
    low, high = -half, half.copy()
    rows = max(1, BLOCK // RESAMPLES)
    enough = n > 3 and (1 - level) / 2 * (RESAMPLES + 1) >= 1  # resamples beyond each end
    for start in range(0, len(flat) if enough else 0, rows):
        part = slice(start, start + rows)
        lows, highs = _studentized(flat[part], level)
        back_lows, back_highs = _studentized(-flat[part, ::-1], level)
        lows, highs = (lows - back_highs) / 2, (highs - back_lows) / 2
        good = np.isfinite(lows) & np.isfinite(highs) & (half[part] > 0)
        low[part] = np.where(good, lows, low[part])
        high[part] = np.where(good, highs, high[part])
    return mean + low.reshape(mean.shape), mean + high.reshape(mean.shape)


def _studentized(centred: Array, level: float) -> tuple[Array, Array]:
    """Ends around zero for rows of centred differences; infinite where the resamples say so."""
    n = centred.shape[1]
    weights = _weights(n)
    means = centred @ weights
    squares = (centred**2) @ weights - means**2
    size = (centred**2).mean(1, keepdims=True)
    flat = squares <= 1e-12 * size  # resamples without spread
    with np.errstate(divide="ignore", invalid="ignore"):
        t = means / np.sqrt(np.where(flat, 0, squares) / (n - 1))
    t = np.sort(np.where(flat & (np.abs(means) <= 1e-9 * np.sqrt(size)), 0, t), axis=1)
    cut = round((1 - level) / 2 * (RESAMPLES + 1))
    error = np.sqrt(size[:, 0] / (n - 1))
    with np.errstate(invalid="ignore"):
        return -t[:, -cut] * error, -t[:, cut - 1] * error


@functools.lru_cache(maxsize=4)
def _weights(n: int) -> Array:
    """The share of each seed in each resample, (n, RESAMPLES)."""
    return np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), RESAMPLES).T / n


def power_at(n: Any, d_z: float, alpha: float = 0.05) -> Any:
    """Power of the two-sided paired t-test with n seeds, from the noncentral t."""
    cut = stats.t.isf(alpha / 2, np.asarray(n) - 1)
    shift = abs(d_z) * np.sqrt(n)
    return stats.nct.sf(cut, np.asarray(n) - 1, shift) + stats.nct.cdf(
        -cut, np.asarray(n) - 1, shift
    )


def seeds_needed(d_z: float | None, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Fewest seeds with which the two-sided paired t-test has this power; None if d_z is zero.

    Beyond 10,000 by the normal approximation, and None beyond 10^15. The sign-flip test of few
    seeds needs more: :func:`flips_needed`.
    """
    if not d_z or abs(d_z) < 1e-12:
        return None
    z = max(0.0, float(stats.norm.isf(alpha / 2) + stats.norm.ppf(power)))
    exact = (z / d_z) ** 2
    if exact > 10_000:
        return math.ceil(exact) if exact < 1e15 else None
    n = max(2, math.floor(exact))
    while n > 2 and power_at(n - 1, d_z, alpha) >= power:  # at low power the wrong side helps
        n -= 1
    while power_at(n, d_z, alpha) < power:
        n += 1
    return n


def flips_needed(n: int, d_z: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Fewest seeds, ``n`` or more, with which the sign-flip test has this power.

    Up to 14 seeds by 1,000 simulated studies with normal differences, since a p of few values
    costs power there; beyond, the t-test's number is the sign-flip test's as well.
    """
    while n <= EXACT:
        studies = np.random.default_rng(n).normal(abs(d_z), 1, (1000, n))
        if (sign_flip(studies) <= alpha).mean() >= power:
            break
        n += 1
    return n


def _d_z(d: Array) -> float | None:
    if len(d) < 2 or not np.ptp(d) > 1e-12 * np.abs(d).max():
        return 0.0 if len(d) > 1 and not d.any() else None
    return float(d.mean() / d.std(ddof=1))


def _hedges(df: int) -> float:
    """Hedges' exact correction of a standardized mean for df degrees of freedom, df > 1."""
    logs = special.gammaln(df / 2) - special.gammaln((df - 1) / 2)
    return float(np.exp(logs) / math.sqrt(df / 2))


def interquartile_mean(row: Array) -> float | None:
    """The mean of the middle half of (S,), NaN left out; None if nothing is left."""
    done = row[~np.isnan(row)]
    return float(stats.trim_mean(done, 0.25)) if len(done) else None
