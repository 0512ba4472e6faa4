"""A claim, the arms and parts of its study, and how they are judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from truenorm.models import ModelSpec
from truenorm.studies.paired import Comparison, Decision, compare_scores, verdict
from truenorm.studies.plan import TUNING_SEEDS_FROM
from truenorm.studies.runner import Runner
from truenorm.studies.trial import Purpose, Row, Trial
from truenorm.studies.tuning import best_rates
from truenorm.training.config import TrainConfig

Answer = Literal["supported", "refuted", "cannot tell"]
SeedScores = list[float]  # by seed, NaN where a run has none
BETTER: tuple[Decision, ...] = ("better",)
WORSE: tuple[Decision, ...] = ("worse",)
AS_GOOD: tuple[Decision, ...] = ("better", "equivalent")
POINT = 0.01  # of accuracy: less would not change anybody's choice on these small studies
TENTH = math.log2(1.1)  # less is within what machines and runs vary by
DOUBLE = 1.0  # in log2


# What is asked -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudySize:
    """How large a study is: seeds, training examples, epochs, and values along its axis."""

    seeds: int
    examples: int
    epochs: int
    values: tuple[float, ...] = ()
    tuning: int = 2


@dataclass(frozen=True)
class Arm:
    """One way to train, without seed."""

    label: str
    spec: ModelSpec
    config: TrainConfig
    probe: str = ""

    def trial(self, seed: int, lr: float, size: StudySize, part: Purpose = "judged") -> Trial:
        """The run with ``seed`` and ``lr``; rates are tuned by plain training, not by probe."""
        config = dataclasses.replace(self.config, seed=seed, lr=lr)
        probe = self.probe if part == "judged" else ""
        return Trial(self.label, self.spec, config, part, probe, size.examples)


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: scores of a and b by seed, and which decisions support it."""

    a: str
    b: str
    scores_a: SeedScores
    scores_b: SeedScores
    margin: float
    expects: tuple[Decision, ...] = BETTER
    higher_is_better: bool = True
    unit: str = "points"
    factor: float = 100.0


@dataclass(frozen=True)
class Plot:
    """Scores by seed along an axis, a line for each series."""

    title: str
    axis: str
    series: dict[str, list[tuple[float | str, SeedScores]]]
    log: bool = False
    note: str = ""


@dataclass
class Lab:
    """Where a claim's trials are run; keeps their rows."""

    runner: Runner
    classes: int
    rows: list[Row] = field(default_factory=list)

    def run(
        self, arms: Sequence[Arm], size: StudySize, *, alone: bool = False
    ) -> dict[str, list[Row]]:
        """Each arm's judged rows, by seed; ``alone`` is one run at a time, for what takes time."""
        trials = [a.trial(s, a.config.lr, size) for a in arms for s in range(size.seeds)]
        self.runner.expect(len(trials))
        groups = [[trial] for trial in trials] if alone else [trials]
        rows = [
            row
            for i, group in enumerate(groups)
            for row in self.runner.rows(group, [t for g in groups[i + 1 :] for t in g])
        ]
        self.rows += rows
        return {a.label: [r for r in rows if r.variant == a.label] for a in arms}

    def tuned(self, arms: Sequence[Arm], size: StudySize, rates: Sequence[float]) -> list[Arm]:
        """Each arm at its rate of least mean validation loss over tuning seeds of their own."""
        seeds = range(TUNING_SEEDS_FROM, TUNING_SEEDS_FROM + size.tuning)
        trials = [a.trial(s, r, size, "tuning") for a in arms for r in rates for s in seeds]
        self.runner.expect(len(trials))
        rows = self.runner.rows(trials)
        self.rows += rows
        best = best_rates([a.label for a in arms], rows)
        return [
            dataclasses.replace(a, config=dataclasses.replace(a.config, lr=best[a.label]))
            for a in arms
        ]


@dataclass(frozen=True)
class Claim:
    """What people say, who said it with which number, why the margins, and the study.

    ``needs_images`` is of those whose models are convolutional.
    """

    name: str
    statement: str
    literature: str
    setting: str
    margin: str
    full: StudySize
    quick: StudySize
    study: Callable[[Lab, StudySize], tuple[list[Part], Plot]]
    needs_images: bool = False


# What is answered ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A part with its statistics, in the part's own unit before ``factor``."""

    part: Part
    comparison: Comparison
    decision: Decision
    answer: Answer
    sentence: str


def judge_parts(parts: Sequence[Part]) -> tuple[Judged, ...]:
    """Compare all parts as one family, each in units of its own margin."""
    scores: dict[str, SeedScores] = {}
    for i, p in enumerate(parts):
        scores[f"{i}a"] = [v / p.margin for v in p.scores_a]
        scores[f"{i}b"] = [v / p.margin for v in p.scores_b]
    pairs = [(f"{i}a", f"{i}b") for i in range(len(parts))]
    compared = compare_scores(scores, pairs, margin=1.0)
    return tuple(_judged(p, c) for p, c in zip(parts, compared, strict=True))


def _judged(part: Part, scaled: Comparison) -> Judged:
    def back(value: float | None) -> float | None:
        return None if value is None else value * part.margin

    better = scaled.superiority
    if better is not None and not part.higher_is_better:
        better = 1 - better
    own = {k: back(getattr(scaled, k)) for k in ("difference", "low", "high", "iqm_a", "iqm_b")}
    natural = dataclasses.replace(
        scaled, a=part.a, b=part.b, margin=part.margin, superiority=better,
        higher_is_better=part.higher_is_better, **own,  # type: ignore[arg-type]
    )  # fmt: skip
    said = verdict(natural, unit=part.unit, factor=part.factor)
    answer: Answer = "supported" if said.decision in part.expects else "refuted"
    if said.decision == "cannot tell":
        answer = "cannot tell"
    return Judged(part, natural, said.decision, answer, said.sentence + _ratio(natural, part.unit))


def _ratio(found: Comparison, unit: str) -> str:
    """What a difference of logarithms is in plain numbers."""
    what = unit.removeprefix("doublings of ")
    if what == unit or found.difference is None or found.low is None or found.high is None:
        return ""
    mean, low, high = (2**v for v in (found.difference, found.low, found.high))
    return (
        f" In ratios, {found.a} has {mean:.2f} times {found.b}'s {what} ({low:.2f} to {high:.2f})."
    )


def answer_of(answers: Sequence[Answer]) -> Answer:
    """Supported if all parts are, refuted if any is, else cannot tell."""
    if "refuted" in answers:
        return "refuted"
    return "supported" if answers and set(answers) == {"supported"} else "cannot tell"


def given_up(claim: Claim, size: StudySize) -> str:
    """What ``size`` leaves out of the claim's full study."""
    full = claim.full
    fewer = [
        f"{getattr(size, name)} {name} instead of {getattr(full, name)}"
        for name in ("seeds", "examples", "epochs")
        if getattr(size, name) < getattr(full, name)
    ]
    left = [f"{v:g}" for v in full.values if v not in size.values]
    return "; ".join(fewer + ([f"left out: {', '.join(left)}"] if left else []))


@dataclass(frozen=True)
class ClaimFinding:
    """What came of a claim."""

    claim: Claim
    size: StudySize
    verdict: Answer
    parts: tuple[Judged, ...]
    rows: tuple[Row, ...]
    plot: Plot
    gave_up: str

    @property
    def seconds(self) -> float:
        """Of all its runs, each on one thread; what the store held already counts as well."""
        return sum(row.seconds for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """What programs read: rows, pairs, verdict."""
        about = ("name", "statement", "literature", "setting", "margin")
        return {
            **{name: getattr(self.claim, name) for name in about},
            "verdict": self.verdict,
            "size": dataclasses.asdict(self.size),
            "gave_up": self.gave_up,
            "note": self.plot.note,
            "seconds": self.seconds,
            "pairs": [
                {
                    **dataclasses.asdict(j.comparison),
                    "unit": j.part.unit,
                    "factor": j.part.factor,
                    "expects": list(j.part.expects),
                    "decision": j.decision,
                    "answer": j.answer,
                    "sentence": j.sentence,
                }
                for j in self.parts
            ],
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True)
class Findings:
    """All claims asked for, those that the data cannot serve, and how the answers were got."""

    findings: tuple[ClaimFinding, ...]
    left: dict[str, str]
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What programs read."""
        return {
            "claims": [f.to_json() for f in self.findings],
            "left": self.left,
            "provenance": self.provenance,
        }
