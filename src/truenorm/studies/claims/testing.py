"""claims(): put them to the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from truenorm.data import sources
from truenorm.errors import InputError, choose
from truenorm.provenance import environment
from truenorm.studies.claims.catalogue import CLAIMS
from truenorm.studies.claims.claim import (
    Claim,
    ClaimFinding,
    Findings,
    Lab,
    StudySize,
    answer_of,
    given_up,
    judge_parts,
)
from truenorm.studies.plan import TUNING_SEEDS_FROM
from truenorm.studies.runner import StudyObserver, runner_of


def claims(
    names: Sequence[str] = (),
    *,
    data: Any = "mnist",
    target: str | None = None,
    quick: bool = False,
    seeds: int | None = None,
    processes: int | None = None,
    store: Path | str | None = None,
    retry: bool = False,
    observe: StudyObserver | None = None,
    found: Callable[[ClaimFinding], None] | None = None,
    sizes: Mapping[str, StudySize] | None = None,
) -> Findings:
    """Put claims to the test and say of each: supported, refuted, or cannot tell.

    Args:
        names: of :data:`CLAIMS`; all if empty.
        data: a data source, as :func:`truenorm.load` takes it; the convolutional need images.
        quick: fewer seeds, examples and settings.
        seeds: in place of each claim's own.
        store: an SQLite file of finished runs, as for :func:`truenorm.compare`.
        observe: told of progress within a claim.
        found: told of each finding as it comes.
        sizes: by name, in place of the claims' own.

    Raises:
        InputError: unknown names, data or numbers that will not do.
    """
    for name in names:
        choose("claim", name, tuple(CLAIMS))
    if seeds is not None and not 1 <= seeds < TUNING_SEEDS_FROM:
        raise InputError(f"seeds must lie in [1, {TUNING_SEEDS_FROM}), got {seeds!r}.")
    uncut = sources.uncut(data, target=target)
    splits = uncut.cut(0)
    asked = {name: CLAIMS[name] for name in names or CLAIMS}
    unfit = {name: _unfit(claim, splits.input_shape) for name, claim in asked.items()}
    left = {name: reason for name, reason in unfit.items() if reason}
    if names and left:
        name, reason = next(iter(left.items()))
        raise InputError(f"{splits.train.name}: {name} {reason}; leave it out.")
    findings = []
    with runner_of(
        uncut, len(splits.train), store, processes, retry=retry, observe=observe
    ) as runner:
        for name, claim in asked.items():
            if name in left:
                continue
            size = (sizes or {}).get(name) or (claim.quick if quick else claim.full)
            if seeds is not None:
                size = dataclasses.replace(size, seeds=seeds)
            size = dataclasses.replace(size, examples=min(size.examples, len(splits.train)))
            finding = _finding_of(claim, Lab(runner, len(splits.classes)), size)
            findings.append(finding)
            if found is not None:
                found(finding)
        about = {
            "data": data if isinstance(data, str) else splits.train.name,
            "fingerprint": runner.fingerprint,
            "quick": quick,
            "processes": runner.pool.count,
        }
    return Findings(tuple(findings), left, {**environment(), **about})


def _unfit(claim: Claim, shape: tuple[int, ...]) -> str:
    """Why examples of ``shape`` cannot serve, or nothing."""
    if claim.needs_images and len(shape) < 3:
        return f"needs images, got rows of {shape[0]} numbers"
    return ""


def _finding_of(claim: Claim, lab: Lab, size: StudySize) -> ClaimFinding:
    """Run a claim's study and judge it."""
    parts, plot = claim.study(lab, size)
    judged = judge_parts(parts)
    return ClaimFinding(
        claim,
        size,
        answer_of([j.answer for j in judged]),
        judged,
        tuple(lab.rows),
        plot,
        given_up(claim, size),
    )
