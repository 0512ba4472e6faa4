"""The scores that are compared: checked, in rows by seed, with their differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from truenorm.errors import InputError

Array = np.ndarray[Any, Any]
Pairs = Sequence[tuple[str, str]]

LARGEST = 1e100  # squares and sums of scores stay finite


def checked(
    scores: Mapping[str, Any], pairs: Pairs | None, margin: float | None, alpha: float, draws: int
) -> tuple[dict[str, Array], list[tuple[str, str]]]:
    """Scores as float64 rows of one length, and the family of pairs."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha!r}; 0.05 is usual.")
    if margin is not None and not 0 < margin < LARGEST:
        raise InputError(
            f"margin must be a positive number, got {margin!r}; leave it out if every "
            "difference counts."
        )
    rows = {name: _row(name, row) for name, row in scores.items()}
    sizes = {name: len(row) for name, row in rows.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"every variant must have one score for each seed, got {sizes}; mark runs that failed "
            "as NaN."
        )
    family = list(itertools.combinations(rows, 2)) if pairs is None else list(pairs)
    _check_family(family, rows)
    if len(family) > alpha * (draws + 1):  # p is never below 1 / (draws + 1)
        raise InputError(
            f"at most {math.floor(alpha * (draws + 1))} pairs can be told at alpha = {alpha:g}, "
            f"got {len(family)}; name the pairs that matter."
        )
    return rows, family


def _check_family(family: list[tuple[str, str]], rows: Mapping[str, Array]) -> None:
    for a, b in family:
        for name in (a, b):
            if name not in rows:
                raise InputError(
                    f"unknown variant {name!r} in pairs; choose one of {', '.join(rows)}."
                )
        if a == b:
            raise InputError(f"a pair needs two variants, got {a!r} twice; leave it out.")
    if len({frozenset(pair) for pair in family}) < len(family):
        raise InputError(f"pairs must differ, got {family}; name each pair once.")
    if not family:
        raise InputError(f"at least one pair is needed, got the variants {list(rows)}; name two.")


def _row(name: str, scores: Any) -> Array:
    try:
        row = np.asarray(scores, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"scores of {name!r} must be numbers, got {scores!r}; mark runs that failed as NaN."
        ) from error
    if row.ndim != 1:
        raise InputError(
            f"scores of {name!r} must have one axis, the seeds, got shape {row.shape}; "
            "give one metric at a time."
        )
    wrong = ~np.isnan(row) & ~(np.abs(row) < LARGEST)
    if wrong.any():
        seed = int(wrong.argmax())
        raise InputError(
            f"scores of {name!r} must be finite and below {LARGEST:g} in size, got {row[seed]} at "
            f"position {seed}; mark a run that diverged as NaN."
        )
    return row


def differences_of(a: Array, b: Array) -> Array:
    """``a - b``, NaN where either is; zero where it is only rounding."""
    d = a - b
    d[np.abs(d) <= 4 * np.finfo(float).eps * np.maximum(np.abs(a), np.abs(b))] = 0
    return d


def mean_of(d: Array) -> float | None:
    """The mean of what is not NaN, or None if all is."""
    d = d[~np.isnan(d)]
    return float(d.mean()) if len(d) else None
