"""A case of a suite, and what becomes of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

State = Literal["passed", "by design", "torch's, too", "failed"]


class Wanting(AssertionError):
    """A layer is not what the suite asks for."""


@dataclass(frozen=True)
class Case:
    """One check of one layer on one example.

    Attributes:
        suite: whose it is.
        subject: the layer.
        check: what is asked of it.
        example: the arguments that it is asked with.
        run: raises where the layer is not so.
        theirs: the same with torch's layer; None where torch has none.
    """

    suite: str
    subject: str
    check: str
    example: str
    run: Callable[[], None]
    theirs: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """For people and for the patterns of what is by design."""
        return " / ".join(part for part in (self.subject, self.check, self.example) if part)


class ByDesign(NamedTuple):
    """Cases that fail because the layer is meant to be otherwise."""

    suite: str
    pattern: str  # of Case.name, whole
    reason: str

    def fits(self, case: Case) -> bool:
        return case.suite == self.suite and re.fullmatch(self.pattern, case.name) is not None


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``reason`` is empty where it passed."""

    case: Case
    state: State
    reason: str = ""


def need(condition: bool, text: str) -> None:
    """Raise unless ``condition``."""
    if not condition:
        raise Wanting(text)


def need_close(got: object, wanted: object, what: str, *, rtol: float, atol: float) -> None:
    """Raise unless the tensors, or lists and dicts of them, are equal within the tolerances."""
    torch.testing.assert_close(
        got, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def refused(work: Callable[[], object], *kinds: type[BaseException]) -> str:
    """The text of the error that ``work`` raises; it must be of ``kinds``."""
    try:
        work()
    except kinds as error:
        return str(error)
    raise Wanting(f"nothing was refused; expected {' or '.join(k.__name__ for k in kinds)}")


# Said by torch about itself, in its own test material and its old interfaces.
_OF_TORCH = (
    r".*torch\.jit\.\w+.* is (deprecated|not supported).*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*torch\.ao\.quantization is deprecated.*",
)


def _error_of(work: Callable[[], None]) -> str:
    """The first line of what ``work`` raises; "" for nothing. What it draws is always the same."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in _OF_TORCH:
            warnings.filterwarnings("ignore", message=text)
        torch.manual_seed(0)
        try:
            work()
        except AssertionError as error:
            return _first_line(error) or "an assertion without words"
        except Exception as error:
            return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return scrubbed(" ".join(lines[:2]))[:300]


def scrubbed(text: str) -> str:
    """``text`` without what differs between runs and machines: addresses, ports, folders."""
    text = re.sub(r" To execute this test, run the following.*", "", text)
    text = re.sub(r"0x[0-9a-f]+", "0x...", text)
    text = re.sub(r"(\d+\.){3}\d+\]?:\d+", "...", text)
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def outcome(case: Case, designs: Iterable[ByDesign] = ()) -> Outcome:
    """Run ``case``."""
    reason = _error_of(case.run)
    if not reason:
        return Outcome(case, "passed")
    for design in designs:
        if design.fits(case):
            return Outcome(case, "by design", design.reason)
    if case.theirs is not None and _error_of(case.theirs):
        return Outcome(case, "torch's, too", reason)
    return Outcome(case, "failed", reason)


def run(cases: Iterable[Case], designs: Iterable[ByDesign] = ()) -> list[Outcome]:
    """Run ``cases`` one after another."""
    designs = tuple(designs)
    return [outcome(case, designs) for case in cases]


def unused(designs: Iterable[ByDesign], outcomes: Iterable[Outcome]) -> Iterator[ByDesign]:
    """What is said to be by design though no case fails by it."""
    failing = [it.case for it in outcomes if it.state == "by design"]
    return (d for d in designs if not any(d.fits(case) for case in failing))
