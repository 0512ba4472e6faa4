"""A model examined: what was found, what passed, and what could not be looked at."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from truenorm.calling.borrowing import borrowed, eager, to_eval
from truenorm.calling.call import Arguments, Loss
from truenorm.cores import share_cores
from truenorm.doctor.check import SEVERITIES, Check, Found, NotApplicable, Severity
from truenorm.doctor.checks.catalogue import CHECKS
from truenorm.doctor.facts import Distances, Facts, gather, observe
from truenorm.doctor.finding import NO_DATA, Finding, Skipped, Verdict
from truenorm.doctor.ledger.book import Book
from truenorm.errors import InputError, choose

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What an examination found; prints as a table, also in a notebook.

    Attributes:
        findings: worst first, then in the order of codes and layers.
        passed: codes of the checks that found nothing.
        skipped: checks that could not be made, with the reason.
        layers: number of normalization layers looked at.
        with_data: whether the model was seen at work on data; else structure and tensors alone.
        distances: how far each layer's running statistics are off, where that was measured, or
            estimated from weights.
    """

    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    layers: int
    with_data: bool = False
    distances: Distances | None = field(default=None, compare=False)
    _again: Callable[[Collection[str]], Diagnosis] | None = field(default=None, compare=False)

    @property
    def healthy(self) -> bool:
        """Examined with data, and no error and no warning; notes may stand."""
        return self.verdict == "healthy"

    @property
    def verdict(self) -> Verdict:
        """Whether there are errors or warnings; without data their absence does not say health."""
        if any(finding.severity != "note" for finding in self.findings):
            return "not healthy"
        return "healthy" if self.with_data else "not examined with data"

    def of(self, code: str) -> tuple[Finding, ...]:
        """The findings of one code."""
        return tuple(finding for finding in self.findings if finding.code == code)

    def worse_than(
        self, least: Severity, known: Iterable[tuple[str, str | None]] = ()
    ) -> tuple[Finding, ...]:
        """Findings at least as severe as ``least``, without those (code, layer) in ``known``."""
        choose("severity", least, SEVERITIES)
        limit, seen = SEVERITIES.index(least), set(known)
        return tuple(
            f
            for f in self.findings
            if SEVERITIES.index(f.severity) <= limit and (f.code, f.layer) not in seen
        )

    def fix(self) -> tuple[Finding, ...]:
        """Apply every remedy there is, errors first, and examine the model again.

        Returns:
            the findings that had a remedy and are gone. What a remedy did not help stands in the
            next diagnosis.
        """
        tried = [finding for finding in self.findings if finding.fix is not None]
        for fix in dict.fromkeys(finding.fix for finding in tried):  # some mend several at once
            assert fix is not None
            fix()
        if not tried or self._again is None:
            return tuple(tried)
        after = self._again({finding.code for finding in tried})
        return tuple(finding for finding in tried if not self._stands(finding, after))

    def _stands(self, finding: Finding, after: Diagnosis) -> bool:
        """Whether the fault is in the diagnosis made ``after`` the fix, as severe, or elsewhere."""
        before = {other.layer for other in self.of(finding.code)}
        worse = SEVERITIES[: SEVERITIES.index(finding.severity) + 1]
        return any(
            other.severity in worse and (other.layer == finding.layer or other.layer not in before)
            for other in after.of(finding.code)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become text."""
        return {
            "healthy": self.healthy,
            "verdict": self.verdict,
            "with_data": self.with_data,
            "layers": self.layers,
            "findings": [finding.to_dict() for finding in self.findings],
            "passed": list(self.passed),
            "skipped": [{"code": s.code, "title": s.title, "why": s.why} for s in self.skipped],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_sarif(self, target: str = "model") -> str:
        """SARIF 2.1.0, for code scanning.

        Args:
            target: the file, by its path or URI, that findings are reported in.
        """
        from truenorm.doctor import rendering

        return rendering.as_sarif(self, target)

    def to_html(self, target: str = "model") -> str:
        """A page that opens offline, in light and in dark.

        Args:
            target: what was examined, for the title.
        """
        from truenorm.doctor import rendering

        return rendering.as_html(self, target)

    def __str__(self) -> str:
        from truenorm.doctor import rendering

        return rendering.as_text(self)

    def __repr__(self) -> str:
        from truenorm.doctor import rendering

        return f"<Diagnosis: {rendering.summary(self)}>"

    def __rich__(self) -> RenderableType:
        from truenorm.doctor import rendering

        return rendering.as_table(self)

    def _repr_html_(self) -> str:
        from truenorm.doctor import rendering

        return rendering.as_html(self, "model", whole=False)


def examine(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
    arguments: Arguments | None = None,
    held_out: Iterable[Any] | None = None,
) -> Diagnosis:
    """Look for every known fault of ``model``'s normalization; leave it exactly as it was.

    Args:
        model: any module. Every bit of its parameters, buffers, modes, hooks, gradients and of the
            random number generators is what it was afterwards, also when this fails.
        data: batches as it is trained on: tensors, tuples (inputs and target) or dicts. Without
            them only structure, buffers and parameter groups are looked at, and a model without
            findings is "not examined with data", not healthy.
        optimizer: for its parameter groups.
        loss: of the output and the target; by default what :mod:`truenorm.calling.call` finds.
        device: where batches go; by default where the model is.
        arguments: makes the model's arguments of a batch.
        held_out: other batches with targets, on which recalibration is tried before it is
            advised; by default every tenth of ``data``, as :func:`truenorm.recalibrate` does.

    Raises:
        InputError: data without a batch, a batch the model cannot be called on, or a model on the
            meta device, whose tensors have no values.
    """
    given = {
        "optimizer": optimizer, "loss": loss, "device": device, "arguments": arguments,
        "held_out": None if held_out is None else list(held_out),
    }  # fmt: skip
    with share_cores():
        return _examine(model, data, CHECKS, given)


def _examine(
    model: nn.Module, data: Iterable[Any] | None, checks: Iterable[Check], given: dict[str, Any]
) -> Diagnosis:
    """Look for the faults of ``checks``."""
    _refuse_without_values(model)
    with borrowed(model), eager(model):
        facts = gather(model, data, **given)
        modes = {m: m.training for m in model.modules()}
        if data is not None:
            observe(facts)
        results = [seen_in_model(check, facts, modes) for check in checks]
    mendable = [r.check for r in results if any(found.fix is not None for found in r.found)]
    # Not data themselves, which may be gone by now; and none, if no check asks for them.
    batches = facts.batches if any(c.looks_at == "data" for c in mendable) else None

    def again(codes: Collection[str]) -> Diagnosis:
        return _examine(model, batches, [c for c in CHECKS if c.code in codes], given)

    diagnosis = _diagnosis(results, facts, with_data=data is not None)
    return replace(diagnosis, _again=again if mendable else None)


def examined(book: Book, optimizer: torch.optim.Optimizer | None) -> Diagnosis:
    """Examine the model of a ledger's book without data, and judge what the book says of it."""
    model = book.model
    _refuse_without_values(model)
    with borrowed(model), eager(model):
        facts = gather(model, None, optimizer=optimizer, loss=None, device=None, arguments=None)
        modes = {m: m.training for m in model.modules()}
        results = []
        for check in CHECKS:
            result = seen_in_model(check, facts, modes)
            if check.watched is not None:
                result = _both(seen_in_training(check, book, facts), result)
            results.append(result)

    def again(codes: Collection[str]) -> Diagnosis:
        given = dict.fromkeys(("optimizer", "loss", "device", "arguments"))
        return _examine(model, None, [c for c in CHECKS if c.code in codes], given)

    return replace(_diagnosis(results, facts, with_data=True), _again=again)


def _refuse_without_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and not nn.parameter.is_lazy(tensor):
            raise InputError(f"{name} is on the meta device and has no values; load them first.")


# -- one check ------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What one check found, or why it could not be made."""

    check: Check
    found: list[Found]
    skipped: str | None = None


def seen_in_model(check: Check, facts: Facts, modes: dict[nn.Module, bool]) -> Result:
    """What a check finds in the facts of a model whose modules are in ``modes``."""
    if check.look is None:
        return Result(check, [], "needs truenorm.watch around training")
    if check.looks_at == "data" and not facts.batches:
        return Result(check, [], NO_DATA)
    if check.looks_at == "optimizer" and facts.optimizer is None:
        return Result(check, [], "needs the optimizer")
    _set_modes(modes)
    # What a check changes to measure, as the statistics, no later one may see.
    lent = borrowed(facts.model) if check.evaluates else contextlib.nullcontext()
    try:
        with lent:
            if check.evaluates:
                to_eval(facts.model)
            return Result(check, list(check.look(facts)))
    except NotApplicable as why:
        return Result(check, [], str(why))
    finally:
        _set_modes(modes)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def seen_in_training(check: Check, book: Book, facts: Facts) -> Result:
    """What a check finds in a ledger's book; no pass where not all layers were seen."""
    assert check.watched is not None
    unseen = book.unseen()
    if not book.called:
        why = "no batch norm was called while it was watched"
        if unseen:
            why = f"no call of a batch norm was seen, though {len(unseen)} moved: "
            why += "compiled models call none"
        return Result(check, [], why)
    try:
        found = list(check.watched(book, facts))
    except NotApplicable as why_not:
        return Result(check, [], str(why_not))
    if unseen and not found:
        why = f"nothing was found in the layers seen; not seen were {', '.join(unseen)}: "
        why += "compiled ones and those that came in later are not"
        return Result(check, [], why)
    return Result(check, found)


def _both(watched: Result, looked: Result) -> Result:
    """Both; of one layer what was seen in training counts."""
    layers = {found.layer for found in watched.found}
    both = [*watched.found, *(found for found in looked.found if found.layer not in layers)]
    return Result(watched.check, both, None if both else watched.skipped)


# -- all of them ----------------------------------------------------------------------------------


def _diagnosis(results: list[Result], facts: Facts, *, with_data: bool) -> Diagnosis:
    findings = [
        Finding(
            check.code, check.title, found.severity, found.layer, found.evidence, found.cause,
            found.advice or check.advice, found.fix,
        )
        for check, every, _ in results
        for found in every
    ]  # fmt: skip
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))  # stable: codes stay in order
    return Diagnosis(
        tuple(findings),
        tuple(check.code for check, found, why in results if not found and why is None),
        tuple(Skipped(c.code, c.title, why) for c, _, why in results if why is not None),
        len(facts.norms),
        with_data,
        facts.distances,
    )


def assert_healthy(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    fail_on: Severity = "warning",
    ignore: Iterable[str] = (),
    **given: Any,
) -> Diagnosis:
    """Examine, and raise AssertionError if anything as bad as ``fail_on`` is found.

    Args:
        model: as for :func:`examine`.
        data: as for :func:`examine`. Without them nothing is asserted but structure and tensors;
            the ``verdict`` of what is returned says so.
        fail_on: "error", "warning" or "note".
        ignore: codes that may stand.
        given: further arguments of :func:`examine`.

    Raises:
        AssertionError: with the findings.
    """
    from truenorm.doctor import rendering

    __tracebackhide__ = True  # pytest then shows the caller's line and the message alone
    known, ignored = {check.code for check in CHECKS}, set(ignore)
    if not ignored <= known:
        raise InputError(f"unknown codes in ignore: {', '.join(sorted(ignored - known))}.")
    diagnosis = examine(model, data, **given)
    bad = [f for f in diagnosis.worse_than(fail_on) if f.code not in ignored]
    if bad:
        kinds = ", ".join(dict.fromkeys(f.code for f in bad))  # pytest's summary is short
        head = f"not healthy: {kinds}; {rendering.counted(bad)}"
        raise AssertionError(f"{head}\n{rendering.in_lines(bad)}")
    return diagnosis
