"""A diagnosis as a rich table, as plain text, as SARIF 2.1.0 and as a page; computes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any
from urllib.parse import quote

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from truenorm.doctor.check import SEVERITIES, Severity
from truenorm.doctor.codes import Code, codes, page
from truenorm.doctor.finding import NO_DATA, Examination, Finding, Verdict
from truenorm.templates import render

NAMED = 3  # layers and values that are named where many stand in one row
UNSEEN: Verdict = "not examined with data"
_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
_VERDICTS: dict[Verdict, str] = {"healthy": "green", "not healthy": "red", UNSEEN: "yellow"}
_WITH_DIGIT = re.compile(r"[\w.]*\d[\w.]*")  # numbers, and names such as layer1.0.conv2
_LINK = re.compile(r"\[([^]]+)\]\([^)]+\.md\)")


@dataclass(frozen=True)
class Alike:
    """Findings of one code and severity whose causes differ in numbers and names alone."""

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        return self.findings[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, each once."""
        return tuple(dict.fromkeys(f.layer or "(model)" for f in self.findings))

    @property
    def where(self) -> str:
        """One layer's name, or the number of layers and the first names."""
        if len(self.layers) == 1:
            return self.layers[0]
        return f"{len(self.layers)} layers: {_some(self.layers)}"

    @property
    def cause(self) -> str:
        same = all(f.cause == self.first.cause for f in self.findings)
        return self.first.cause if same else f"{self.first.cause}; the others likewise"

    @property
    def evidence(self) -> dict[str, str]:
        """What the numbers are of, and their range over the findings."""
        names = dict.fromkeys(name for f in self.findings for name in f.evidence)
        return {
            name: _range([f.evidence[name] for f in self.findings if name in f.evidence])
            for name in names
        }

    @property
    def numbers(self) -> str:
        """The evidence on one line."""
        return "; ".join(f"{name}: {value}" for name, value in self.evidence.items())


def grouped(findings: Iterable[Finding]) -> list[Alike]:
    """``findings`` in their order, each joined to the first that it is like."""
    by_cause: dict[tuple[str, ...], list[Finding]] = {}
    for f in findings:
        cause = _WITH_DIGIT.sub("#", f.cause)
        by_cause.setdefault((f.severity, f.code, cause, str(f.fix is None)), []).append(f)
    return [Alike(tuple(same)) for same in by_cause.values()]


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:NAMED]) + (", ..." if len(every) > NAMED else "")


def number(value: Any) -> str:
    """Four digits of a float; anything else as it prints."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _range(values: list[Any]) -> str:
    texts = dict.fromkeys(map(number, values))
    if len(texts) == 1:
        return next(iter(texts))
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return f"{number(min(values))} to {number(max(values))}"
    return _some(texts)


def counted(findings: Iterable[Finding]) -> str:
    """Like "1 error, 2 warnings"; "no findings"."""
    numbers = Counter(f.severity for f in findings)
    counts = [_number_of(numbers[s], s) for s in SEVERITIES if numbers[s]]
    return ", ".join(counts) or "no findings"


def summary(diagnosis: Examination) -> str:
    """One line: the verdict, and how much was looked at."""
    state: str = diagnosis.verdict
    if state == UNSEEN:
        blind = [skipped.code for skipped in diagnosis.skipped if skipped.why == NO_DATA]
        state += f" ({', '.join(blind)} could not look)" if blind else ""
    passed, skipped = len(diagnosis.passed), len(diagnosis.skipped)
    return (
        f"{state}: {counted(diagnosis.findings)}; "
        f"{_number_of(diagnosis.layers, 'normalization layer')}, "
        f"{_number_of(passed, 'check')} passed, {skipped} skipped"
    )


def _number_of(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# -- in a terminal --------------------------------------------------------------------------------


def as_table(diagnosis: Examination) -> RenderableType:
    """What counts as a table, then notes and skipped checks in a few lines, the verdict last."""
    groups = grouped(diagnosis.findings)
    severe = [group for group in groups if group.first.severity != "note"]
    notes = [group for group in groups if group.first.severity == "note"]
    parts: list[RenderableType] = []
    if severe:
        parts += [_findings(severe), ""]
    if notes:
        parts += [_notes(notes), ""]
    if diagnosis.skipped:
        parts += [_skipped(diagnosis), ""]
    style = f"bold {_VERDICTS[diagnosis.verdict]}"
    return Group(*parts, Text(summary(diagnosis), style=style))


def _findings(groups: list[Alike]) -> Table:
    # No lines: box drawing is more than some encodings can print.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("code", no_wrap=True)
    table.add_column("layer", overflow="fold", max_width=24)
    table.add_column("what was found, and what to do", overflow="fold")
    for group in groups:
        first = group.first
        text = Text.assemble((first.title, "bold"), f"\n{group.cause}")
        if group.evidence:
            text.append(f"\n{group.numbers}", style="dim")
        text.append(f"\n{first.advice}" + (" (--fix does it)" if first.fix else ""), style="cyan")
        code = Text(f"{first.code}\n{first.severity}", style=_COLOURS[first.severity])
        table.add_row(code, Text(group.where), text)
    return table


def _notes(groups: list[Alike]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for group in groups:
        text = f"{group.first.title}, {group.where}: {group.cause}"
        table.add_row(Text(f"{group.first.code} note"), Text(text), style="dim")
    return table


def _skipped(diagnosis: Examination) -> Text:
    reasons: dict[str, list[str]] = {}
    for skipped in diagnosis.skipped:
        reasons.setdefault(skipped.why, []).append(skipped.code)
    lines = [f"skipped, {why}: {', '.join(codes)}" for why, codes in reasons.items()]
    return Text("\n".join(lines), style="dim")


def as_text(diagnosis: Examination) -> str:
    """The table without colours, as wide as the terminal, or 80 characters."""
    console = Console(
        file=io.StringIO(), color_system=None, force_terminal=False, force_jupyter=False
    )
    with console.capture() as caught:
        console.print(as_table(diagnosis))
    return "\n".join(line.rstrip() for line in caught.get().splitlines())


def in_lines(findings: Iterable[Finding]) -> str:
    """A few lines for each kind of finding, as an assertion's message has them."""
    lines = []
    for group in grouped(findings):
        f = group.first
        numbers = f" ({group.numbers})" if group.evidence else ""
        lines.append(f"  {f.severity} {f.code} {group.where}: {f.title}: {group.cause}{numbers}")
        lines.append(f"    {f.advice}")
    return "\n".join(lines)


# -- SARIF ----------------------------------------------------------------------------------------


def as_sarif(diagnosis: Examination, target: str) -> str:
    """SARIF 2.1.0 (OASIS): a result for each finding, layers as logical locations."""
    rules = [_rule(code) for code in codes()]
    places = {rule["id"]: i for i, rule in enumerate(rules)}
    seen: Counter[str] = Counter()
    results = [_result(f, target, places[f.code], seen) for f in diagnosis.findings]
    run = {
        "tool": {
            "driver": {"name": "truenorm", "version": metadata.version("truenorm"), "rules": rules},
        },
        "invocations": [_invocation(diagnosis)],
        "results": results,
        "properties": {k: v for k, v in diagnosis.to_dict().items() if k != "findings"},
    }
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1)


def _invocation(diagnosis: Examination) -> dict[str, Any]:
    """That the examination ran, and what it did not look at."""
    notes = [{"level": "warning", "message": {"text": summary(diagnosis)}}]
    unseen = diagnosis.verdict == UNSEEN
    return {"executionSuccessful": True, "toolExecutionNotifications": notes if unseen else []}


def _rule(code: Code) -> dict[str, Any]:
    text = _LINK.sub(r"\1", page(code.code))  # links between pages lead nowhere from there
    return {
        "id": code.code,
        "name": "".join(word.capitalize() for word in re.findall(r"\w+", code.title)),
        "shortDescription": {"text": code.title},
        "help": {"text": text, "markdown": text},
        "defaultConfiguration": {"level": code.severities[0]},
    }


def _result(finding: Finding, target: str, rule: int, seen: Counter[str]) -> dict[str, Any]:
    identity = f"{finding.code}:{finding.layer or ''}"
    seen[identity] += 1
    # The one fingerprint that code scanning goes by, in its form "hash:occurrence".
    mark = f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}:{seen[identity]}"
    where, plain = finding.layer or "(model)", finding.to_dict()
    return {
        "ruleId": finding.code,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": f"{where}: {finding.title}: {finding.cause}. {finding.advice}"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(target)},
                    "region": {"startLine": 1},  # a place in the file has to be given
                },
                "logicalLocations": [
                    {"name": where, "fullyQualifiedName": finding.layer or target, "kind": "module"}
                ],
            }
        ],
        "partialFingerprints": {"primaryLocationLineHash": mark},
        "properties": {"evidence": plain["evidence"], "fixable": plain["fixable"]},
    }


def _uri(target: str) -> str:
    """``target`` as a URI reference: a path, or something like package.module:factory."""
    if "://" in target:
        return target
    return quote(target.replace("\\", "/"))


# -- HTML -----------------------------------------------------------------------------------------


def as_html(diagnosis: Examination, target: str, *, whole: bool = True) -> str:
    """One page that opens offline, in light and in dark; or, not ``whole``, its content alone."""
    numbers = Counter(f.severity for f in diagnosis.findings)
    groups: dict[Severity, list[Alike]] = {severity: [] for severity in SEVERITIES}
    for group in grouped(diagnosis.findings):
        groups[group.first.severity].append(group)
    return render(
        "doctor/diagnosis.html",
        diagnosis=diagnosis,
        target=target,
        whole=whole,
        groups=groups,
        number=number,
        counts=[(s, numbers[s]) for s in SEVERITIES],
        picture=_picture(diagnosis),
        passed={code.code: code.passed for code in codes()},
    )


def _picture(diagnosis: Examination) -> str:
    """How far each layer is off, as SVG; nothing where that is not known."""
    distances = diagnosis.distances
    if distances is None or not distances.layers:
        return ""
    from truenorm.doctor.plots import how_far  # here: matplotlib is for pages alone

    found = {f.layer or "" for f in diagnosis.findings if f.code == distances.code}
    return how_far(distances, found)
