"""Verdicts looked at while runs come in, with one rate of errors over all looks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from truenorm.errors import InputError
from truenorm.studies.paired import BLOCK, Decision
from truenorm.studies.scores import Array, Pairs, checked, differences_of, mean_of

PATHS = 9_999  # sign flips followed over a sequential study
HOPELESS = 0.1  # conditional power below which a pair is given up
HOPELESS_FROM = 0.5  # of the most seeds; earlier, the trend is noise and true effects are lost


@dataclass(frozen=True)
class Watched:
    """A pair of a sequential study.

    Attributes:
        decision: "cannot tell" while open, when hopeless, and when the seeds ran out.
        stopped: whether the pair needs no more seeds.
        hopeless: stopped because its conditional power was below 10 %.
        n: seeds at the look that stopped it, or at the last look.
        difference: mean of a - b there. The interval of :func:`compare_scores` is not made for
            repeated looks; none is given.
        conditional_power: of deciding by the most seeds if the trend goes on; None if decided.
    """

    a: str
    b: str
    decision: Decision
    stopped: bool
    hopeless: bool
    n: int
    difference: float | None
    conditional_power: float | None


@dataclass(frozen=True)
class Monitored:
    """A sequential study after its last look: its pairs, and the variants that need more seeds."""

    pairs: tuple[Watched, ...]
    running: tuple[str, ...]


def monitor(
    scores: Mapping[str, Any],
    looks: Sequence[int],
    max_seeds: int,
    pairs: Pairs | None = None,
    *,
    higher_is_better: bool = True,
    margin: float | None = None,
    alpha: float = 0.05,
    futility: bool = True,
) -> Monitored:
    """Replay a study's looks, from the first to the last, and say what is decided by now.

    The rate ``alpha`` holds over all looks. It is spent over them (Lan and DeMets 1983), by n
    seeds alpha * (n / max_seeds)^2 (Kim and DeMets 1987). Spending like O'Brien and Fleming's has a
    little more power but with several pairs spends so little early that not even a difference
    of two standard deviations is told before half of the seeds are run (docs/statistics.md).
    What each look may spend is turned into a boundary by random sign flips of the differences,
    each followed over all looks: the share of flips that has crossed by a look is at most what may
    have been spent by then. If the differences are symmetric around zero, the observed signs
    are one such flip as likely as any other, so the rate holds for any n, sizes of looks and
    spread (a sequential permutation test by Monte Carlo). It is exact over the draw of the flips;
    these are fixed, so that an answer can be repeated, which moves a rate of 5 % by some 0.2 %.
    Without a margin Holm is applied at each look as by Maurer and Bretz (2013): what is decided
    gives its share to the rest, at all looks so far. With a margin every pair keeps alpha / pairs:
    one told to be different may in truth be so, and then its other hypothesis, "beyond the margin",
    has had its chance to be falsely rejected; giving its share away could pass ``alpha``.

    From half of max_seeds on, a pair whose power conditional on its trend is below 10 % is
    given up as hopeless. The boundaries reckon as if it went on, so this can only lower the rate of
    errors; the power it costs is in docs/statistics.md. Scores of a pair after its stop are not
    looked at. State is not kept: call again with all scores and one look more.

    Args:
        scores: of each variant a metric by seed, (S,), S at least the last look; NaN where
            a run failed or, the variant's pairs having stopped, was not begun.
        looks: numbers of seeds at which was or is looked, rising; never one after its scores.
        max_seeds: fixed before the first look.

    Raises:
        InputError: as :func:`compare_scores`; looks that do not rise or leave the range.
    """
    rows, family = checked(scores, pairs, margin, alpha, PATHS)
    _check_looks(looks, max_seeds, len(next(iter(rows.values()))))
    diffs = [differences_of(rows[a], rows[b]) for a, b in family]
    watched: list[Watched | None] = [None] * len(family)
    powers: list[float | None] = [None] * len(family)
    table = np.stack(diffs)

    @functools.cache  # looks do not see what comes after them, so one replay serves them all
    def firsts(share: float) -> tuple[Array, Array]:
        """The looks at which each pair is told to be different and to be equivalent, or none."""
        different = crossed(table, looks, max_seeds, share)
        within = (
            np.full(len(family), -1)
            if margin is None
            else _within(table, margin, looks, max_seeds, share)
        )
        return different, within

    def stop(i: int, at: int, decision: Decision, hopeless: bool = False) -> None:
        mean = mean_of(diffs[i][:at])
        watched[i] = Watched(*family[i], decision, True, hopeless, at, mean, powers[i])

    decided = 0
    for k, at in enumerate(looks):
        news = True
        while news:  # what is decided frees some of alpha for the others
            news = False
            share = alpha / max(1, len(family) - (decided if margin is None else 0))
            different, within = firsts(share)
            for i in [i for i, w in enumerate(watched) if w is None]:
                powers[i] = None
                if 0 <= within[i] <= k:
                    stop(i, at, "equivalent")
                elif 0 <= different[i] <= k:
                    gains = (np.nansum(table[i, : looks[different[i]]]) > 0) == higher_is_better
                    stop(i, at, "better" if gains else "worse")
                else:
                    powers[i] = _conditional(diffs[i][:at], at, max_seeds, share, margin)
                    continue
                decided, news = decided + 1, True
        for i in [i for i, w in enumerate(watched) if w is None]:
            chance = powers[i]
            lost = chance is not None and chance < HOPELESS and HOPELESS_FROM <= at / max_seeds < 1
            if at == max_seeds or (futility and lost):
                stop(i, at, "cannot tell", hopeless=at < max_seeds)
    at = looks[-1]
    ended = tuple(
        w or Watched(*family[i], "cannot tell", False, False, at, mean_of(diffs[i][:at]), powers[i])
        for i, w in enumerate(watched)
    )
    wanted = {name for w in ended if not w.stopped for name in (w.a, w.b)}
    return Monitored(ended, tuple(name for name in rows if name in wanted))


def crossed(
    differences: Array,
    looks: Sequence[int],
    max_seeds: int,
    alpha: float,
    *,
    two_sided: bool = True,
    paths: int = PATHS,
) -> Array:
    """The look (its index) at which each row first leaves its boundary, or -1: (R, S) -> (R,).

    A row's observed path is one of ``paths + 1``; each look lets those farthest out cross, as many
    as may have been spent by then, and of ties across that number none. NaN adds nothing.
    """
    d = np.nan_to_num(np.asarray(differences, dtype=float)[:, : looks[-1]])
    signs = _path_signs(max_seeds, paths)
    budgets = [math.floor(_spent(alpha, at / max_seeds) * (paths + 1) + 1e-9) for at in looks]
    out = np.full(len(d), -1)
    rows = max(1, BLOCK // (paths + 1))
    for start in range(0, len(d), rows):
        part = slice(start, start + rows)
        out[part] = _crossed(d[part], signs, list(zip(looks, budgets, strict=True)), two_sided)
    return out


def _crossed(d: Array, signs: Array, plan: list[tuple[int, int]], two_sided: bool) -> Array:
    """Where the first of each row's paths, the observed one, crosses; a plan is (seeds, budget)."""
    first = np.full(len(d), -1)
    sums = np.zeros((len(d), signs.shape[1] + 1))
    gone = np.zeros(sums.shape, dtype=bool)
    before = 0
    for k, (at, budget) in enumerate(plan):
        part = d[:, before:at]
        sums[:, 0] += part.sum(1)
        sums[:, 1:] += np.abs(part) @ signs[before:at]
        before = at
        left = budget - gone.sum(1)
        most = int(left.max(initial=0))
        if not most:
            continue
        far = np.where(gone, -np.inf, np.abs(sums) if two_sided else sums)
        top = -np.sort(np.partition(-far, most, axis=1)[:, : most + 1], axis=1)  # farthest first
        bar = np.take_along_axis(top, left[:, None], 1)  # of those who may cross no more
        new = far > bar + 1e-9 * np.abs(d[:, :at]).sum(1, keepdims=True)
        first[new[:, 0]] = k
        gone |= new
    return first


def _spent(alpha: float, share: float) -> float:
    """Of alpha, what may be spent by this share of the most seeds."""
    return alpha * share**2


@functools.lru_cache(maxsize=2)
def _path_signs(max_seeds: int, paths: int) -> Array:
    return np.random.default_rng(max_seeds).choice([-1.0, 1.0], (max_seeds, paths))


def _within(d: Array, margin: float, looks: Sequence[int], max_seeds: int, alpha: float) -> Array:
    """The look by which both one-sided tests of the margin have crossed, or -1: (R, S) -> (R,)."""
    above, below = (
        crossed(side, looks, max_seeds, alpha, two_sided=False) for side in (d + margin, margin - d)
    )
    return np.where((above >= 0) & (below >= 0), np.maximum(above, below), -1)


def _conditional(
    d: Array, at: int, max_seeds: int, share: float, margin: float | None
) -> float | None:
    """Chance of a decision at the last look if the trend goes on, by the normal approximation."""
    left = 1 - at / max_seeds
    d = d[~np.isnan(d)]
    if len(d) < 2 or not left:
        return None
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    final = len(d) / (1 - left)  # runs that both will have
    error, spread = sd / math.sqrt(final), sd * math.sqrt(left / final)
    if not spread:  # every seed says the same
        return float(mean != 0 or margin is not None)

    def beyond(bound: float) -> float:
        """Chance that the last mean is farther from zero than the bound."""
        ends = stats.norm.sf([(bound - mean) / spread, (bound + mean) / spread])
        return float(ends.sum())

    chance = beyond(float(stats.norm.isf(share / 2)) * error)
    if margin is not None:
        bound = margin - float(stats.norm.isf(share)) * error
        chance = max(chance, 1 - beyond(bound) if bound > 0 else 0.0)
    return min(1.0, chance)


def _check_looks(looks: Sequence[int], max_seeds: int, have: int) -> None:
    rising = all(a < b for a, b in itertools.pairwise([0, *looks]))
    if not looks or not rising or looks[-1] > min(have, max_seeds):
        raise InputError(
            f"looks must rise from at least 1 to at most max_seeds ({max_seeds}) and the scores "
            f"given ({have}), got {list(looks)}; name each look once, in order."
        )
