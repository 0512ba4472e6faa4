"""The rates that docs/statistics.md states, by simulation; `make statistics` writes that page.

Seeds are fixed: the same numbers come out again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from harness import provenance
from truenorm.studies import paired, sequential

Array = np.ndarray[Any, Any]
PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
TEXT = Path(__file__).parent / "statistics_text.md"
ALPHA = 0.05
LOOKS = tuple(range(4, 65, 4))
LOOKS_20 = tuple(range(3, 61, 3))


def noise(kind: str, shape: tuple[int, ...], draw: np.random.Generator) -> Array:
    """Of mean 0 and sd 1: a run's score beside its variant's mean."""
    if kind == "skewed":
        return draw.exponential(1, shape) - 1
    if kind == "t3":
        return draw.standard_t(3, shape) / math.sqrt(3)
    return draw.normal(0, 1, shape)


def differences(kind: str, studies: int, pairs: int, n: int, seed: int) -> Array:
    """Of variants without a true difference to one reference, so correlated: (studies, pairs, n).

    The noise is that of the runs; a seed's own, which pairing takes out, is not drawn.
    """
    draw = np.random.default_rng(seed)
    scores = noise(kind, (studies, pairs + 1, n), draw)
    return (scores[:, 1:] - scores[:, :1]) / math.sqrt(2)


def share(hits: Array) -> str:
    """A rate with its 95 % interval (Wilson)."""
    found = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(method="wilson")
    return f"{100 * hits.mean():.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def family_wise(studies: int) -> Iterator[list[str]]:
    """Studies without any difference in which some verdict says that there is one."""
    yield ["noise of runs", "n", "1 pair", "3 pairs", "6 pairs", "12 pairs"]
    for kind in ("normal", "skewed", "t3"):
        for n in (8, 16, 32):
            cells = []
            for m in (1, 3, 6, 12):
                p = paired.sign_flip(differences(kind, studies, m, n, 100 * n + m))
                cells.append(share((paired.holm(p) <= ALPHA).any(1)))
            yield [kind, str(n), *cells]


def equivalence(studies: int) -> Iterator[list[str]]:
    """Studies whose true difference is the margin, called equivalent."""
    yield ["margin in sd of the differences", "n = 8", "n = 16", "n = 32"]
    for margin in (0.5, 1.0, 2.0):
        cells = []
        for n in (8, 16, 32):
            d = differences("normal", studies, 1, n, n)[:, 0] + margin
            cells.append(share(paired.equivalence(d, margin) <= ALPHA))
        yield [f"{margin:g}", *cells]


def both(studies: int) -> Iterator[list[str]]:
    """Studies of six pairs with some false verdict, of either kind."""
    yield ["margin in sd of the differences", "n = 8", "n = 16", "n = 32"]
    for margin in (0.5, 1.0, 2.0):
        cells = []
        for n in (8, 16, 32):
            d = differences("normal", studies, 6, n, 5 * n)
            d[:, 3:] += margin
            ps, tosts = paired.sign_flip(d), paired.equivalence(d, margin)
            wrong = [_wrong(p, tost) for p, tost in zip(ps, tosts, strict=True)]
            cells.append(share(np.array(wrong)))
        yield [f"{margin:g}", *cells]


def _wrong(ps: Array, tosts: Array) -> bool:
    """Whether one of the first three is told to be different or the others to be equivalent."""
    different, within = paired.one_family(ps, tosts)
    equivalent = within <= ALPHA  # said first
    return bool((~equivalent & (different <= ALPHA))[:3].any() or equivalent[3:].any())


def coverage(studies: int) -> Iterator[list[str]]:
    """How often the interval holds the true mean, beside the two that it is made of."""
    sizes = (4, 5, 8, 9, 16, 32)
    yield ["differences", "interval", *(f"n = {n}" for n in sizes)]
    shapes: dict[str, Callable[[Array], Array]] = {
        "normal": stats.norm.ppf,
        "skewed (skewness 1)": lambda u: (stats.gamma.ppf(u, 4) - 4) / 2,
        "skewed (skewness 2)": lambda u: stats.expon.ppf(u) - 1,
        "t3": lambda u: stats.t.ppf(u, 3),
    }
    for name, shape in shapes.items():
        rows: dict[str, list[str]] = {"a study's": [], "bootstrap-t": [], "Student's": []}
        for n in sizes:
            d = shape(np.random.default_rng(n).random((studies, n)))
            half = stats.t.ppf(0.975, n - 1) * d.std(1, ddof=1) / math.sqrt(n)
            ends = (paired.interval(d), paired.bootstrap_t(d), (d.mean(1) - half, d.mean(1) + half))
            for cells, (low, high) in zip(rows.values(), ends, strict=True):
                cells.append(share((low <= 0) & (high >= 0)))
        for kind, cells in rows.items():
            yield ["" if kind != "a study's" else name, kind, *cells]


def power(studies: int) -> Iterator[list[str]]:
    """Differences found with as many seeds as `seeds_needed` asks for, of 80 % power."""
    yield ["d_z", "verdicts", "seeds needed", "found, %"]
    for d_z in (0.5, 0.8, 1.0, 1.5):
        for m in (1, 6):
            least = max(paired.seeds_needed(d_z, ALPHA / m) or 0, paired.least_seeds(m))
            n = paired.flips_needed(least, d_z, ALPHA / m)
            d = np.random.default_rng(1000 + n).normal(d_z, 1, (studies, n))
            yield [f"{d_z:g}", str(m), str(n), share(paired.sign_flip(d) <= ALPHA / m)]


def planted(studies: int) -> Iterator[list[str]]:
    """A true difference of 0.5 points and one of 0, among three verdicts of which two are zero."""
    yield ["sd of the differences", "true", "n = 8", "n = 16", "n = 32"]
    for sd, true in ((0.2, 0.5), (0.4, 0.5), (0.8, 0.5), (0.4, 0.0)):
        cells = []
        for n in (8, 16, 32):
            d = sd * differences("normal", studies, 3, n, 7 * n)
            d[:, 0] += true
            found = paired.holm(paired.sign_flip(d)) <= ALPHA
            cells.append(share(found[:, 0]))
        yield [f"{sd:g} points" if true else "any", f"{true:g} points", *cells]


def until_decided(studies: int) -> Iterator[list[str]]:
    """Until decided: what is told, and at how many seeds."""
    yield ["true d_z", "verdicts", "looks", "told, %", "seeds, mean", "fixed n = most seeds, %"]
    for d_z in (0.0, 0.3, 0.5, 1.0, 2.0):
        for m, looks in ((1, LOOKS), (3, LOOKS), (1, LOOKS_20)):
            d = np.random.default_rng(m).normal(d_z, 1, (studies, looks[-1]))
            at = sequential.crossed(d, looks, looks[-1], ALPHA / m, paths=1999)
            seeds = np.where(at >= 0, np.asarray(looks)[at], looks[-1])
            fixed = share(paired.sign_flip(d) <= ALPHA / m)
            yield [
                f"{d_z:g}",
                str(m),
                str(len(looks)),
                share(at >= 0),
                f"{seeds.mean():.0f}",
                fixed,
            ]


def futility(studies: int) -> Iterator[list[str]]:
    """Giving up: its cost in power and its gain in seeds, one pair, at most 64 seeds."""
    yield ["true d_z", "told, %", "told without giving up, %", "seeds, mean", "given up, %"]
    for d_z in (0.0, 0.3, 0.5):
        found = [_watched(d_z, seed) for seed in range(studies)]
        told, without, seeds, hopeless = (np.array(column) for column in zip(*found, strict=True))
        cells = [share(told), share(without), f"{seeds.mean():.0f}", share(hopeless)]
        yield [f"{d_z:g}", *cells]


def _watched(d_z: float, seed: int) -> tuple[bool, bool, int, bool]:
    """One study: told, told without giving up, seeds, given up."""
    draw = np.random.default_rng([seed, round(100 * d_z)])
    scores = {"a": draw.normal(d_z, 1, LOOKS[-1]), "b": np.zeros(LOOKS[-1])}
    pair = sequential.monitor(scores, LOOKS, LOOKS[-1]).pairs[0]
    plain = sequential.monitor(scores, LOOKS, LOOKS[-1], futility=False).pairs[0]
    return pair.decision != "cannot tell", plain.decision != "cannot tell", pair.n, pair.hopeless


TABLES = {
    "family-wise": family_wise,
    "coverage": coverage,
    "equivalence": equivalence,
    "both": both,
    "power": power,
    "planted": planted,
    "sequential": until_decided,
    "futility": futility,
}


def main() -> None:
    """Fill the tables into the text, and write the page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--studies", type=int, default=2000, help="per cell")
    chosen = options.parse_args()
    text = TEXT.read_text("utf-8")
    for name, table in TABLES.items():
        start = time.perf_counter()
        rows = list(table(chosen.studies))
        text = text.replace(f"<!-- {name} -->", _markdown(rows))
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    about = provenance("make statistics")
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k != "skorch")
    made = f"`{about['command']}` on {about['date']}; {versions}; {chosen.studies:,} studies a cell"
    PAGE.write_text(text.replace("<!-- made -->", made), "utf-8")


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["--:"] * len(head), *body)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
