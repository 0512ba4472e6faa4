"""One finding of the doctor, and what was not looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from truenorm.doctor import codes
from truenorm.doctor.check import Severity
from truenorm.doctor.facts import Distances

Verdict = Literal["healthy", "not healthy", "not examined with data"]
NO_DATA = "needs data"  # why a check was skipped


@dataclass(frozen=True)
class Finding:
    """One fault of one layer, with its proof and its remedy.

    Attributes:
        code: stable name of the fault; ``truenorm doctor --explain CODE`` tells of it.
        title: the fault in a few words.
        severity: "error" (results are wrong), "warning" (they probably are) or "note".
        layer: dotted name as in ``named_modules()``, or None for the whole model.
        evidence: numbers by what they are of.
        cause: what brought it about here.
        advice: the remedy.
        fix: applies the remedy to the model in place, or None.
    """

    code: str
    title: str
    severity: Severity
    layer: str | None
    evidence: dict[str, Any]
    cause: str
    advice: str
    fix: Callable[[], Any] | None = None

    @property
    def page(self) -> str:
        """What ``truenorm doctor --explain`` prints of its code, in Markdown."""
        return codes.page(self.code)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become text."""
        return {
            "code": self.code,
            "title": self.title,
            "severity": self.severity,
            "layer": self.layer,
            "cause": self.cause,
            "evidence": {k: _plain(v) for k, v in self.evidence.items()},
            "advice": self.advice,
            "fixable": self.fix is not None,
        }


@dataclass(frozen=True)
class Skipped:
    """A check that could not be made, and why."""

    code: str
    title: str
    why: str


class Examination(Protocol):
    """What a rendering reads of a diagnosis."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Worst first."""

    @property
    def passed(self) -> tuple[str, ...]:
        """Codes of the checks that found nothing."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Checks that could not be made."""

    @property
    def layers(self) -> int:
        """Number of normalization layers looked at."""

    @property
    def distances(self) -> Distances | None:
        """How far each layer's running statistics are off, where that is known."""

    @property
    def verdict(self) -> Verdict:
        """Whether it is healthy, as far as was looked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
