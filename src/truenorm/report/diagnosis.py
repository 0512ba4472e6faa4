"""A diagnosis as a table for a terminal, as SARIF 2.1.0 for code scanning, and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import truenorm
from truenorm.doctor.diagnosis import Diagnosis, Finding
from truenorm.doctor.register import CHECKS
from truenorm.errors import choose
from truenorm.recalibration import Recalibration
from truenorm.run import to_json, write_atomically

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


def deliver(diagnosis: Diagnosis, target: str, format: str, out: Path | None) -> None:
    """Print the diagnosis, or write it to ``out``.

    Raises:
        InputError: ``out`` cannot be written.
    """
    if format == "text" and out is None:
        told(diagnosis, Console(highlight=False))
        return
    made: dict[str, Callable[[], str]] = {
        "text": lambda: str(diagnosis),
        "json": diagnosis.to_json,
        "sarif": lambda: sarif(diagnosis, target),
        "html": lambda: page(diagnosis, target),
    }
    text = made[format]()
    if out is None:
        print(text)
    else:
        write_atomically(out, lambda path: path.write_text(text + "\n", "utf-8"))


def explained(code: str | None) -> int:
    """Print the page of one code, or with None a line for each.

    Raises:
        InputError: no such code.
    """
    if code is None:
        for check in CHECKS:
            print(f"{check.code}  {check.title} (needs {check.needs})")
        return 0
    choose("code", code, tuple(check.code for check in CHECKS))
    check = next(check for check in CHECKS if check.code == code)
    asked = "" if check.look.__doc__ is None else f"{check.look.__doc__.splitlines()[0]}\n\n"
    print(f"# {check.code}: {check.title}\n\n{asked}{check.advice}\n\nNeeds: {check.needs}.")
    return 0


def recalibrated(result: Recalibration, out: Path, *, as_json: bool) -> None:
    """Print what a recalibration did."""
    if not as_json:
        print(result)
        print(f"written to {out}" if result.kept else "nothing was written")
        return
    about = {
        "kept": result.kept,
        "reason": result.reason,
        "out": str(out) if result.kept else None,
        "passes": result.passes,
        "batches": result.batches,
        "before": None if result.before is None else result.before._asdict(),
        "after": None if result.after is None else result.after._asdict(),
        "layers": [row._asdict() for row in result.rows],
        "left": [it._asdict() for it in result.left],
    }
    print(to_json(about))


def told(diagnosis: Diagnosis, console: Console) -> None:
    """Print the findings as a table, and a line on the rest."""
    if diagnosis.findings:
        table = Table(show_lines=True, expand=False)
        for name in ("", "layer", "what", "evidence", "what to do"):
            table.add_column(name, overflow="fold")
        for finding in diagnosis.findings:
            colour = _COLOURS[finding.severity]
            table.add_row(
                f"[{colour}]{finding.code}\n{finding.severity}[/{colour}]",
                finding.layer or "(model)",
                escape(f"{finding.title}:\n{finding.cause}"),
                escape("\n".join(f"{k}: {_number(v)}" for k, v in finding.evidence.items())),
                finding.advice + ("\n(--fix does it)" if finding.fix else ""),
            )
        console.print(table)
    state = "healthy" if diagnosis.healthy else "not healthy"
    console.print(
        f"{state}: {len(diagnosis.findings)} findings in {diagnosis.layers} normalization layers; "
        f"{len(diagnosis.passed)} checks passed, {len(diagnosis.skipped)} skipped"
    )
    for skipped in diagnosis.skipped:
        console.print(f"  {skipped.code} {skipped.title}: {skipped.why}", style="dim")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sarif(diagnosis: Diagnosis, target: str) -> str:
    """SARIF 2.1.0 (OASIS), a result for each finding, layers as logical locations."""
    levels = {"error": "error", "warning": "warning", "note": "note"}
    run = {
        "tool": {
            "driver": {
                "name": "truenorm",
                "version": truenorm.__version__,
                "rules": [
                    {
                        "id": check.code,
                        "name": check.title,
                        "shortDescription": {"text": check.title},
                        "help": {"text": check.advice},
                    }
                    for check in CHECKS
                ],
            }
        },
        "results": [_sarif_result(f, levels[f.severity], target) for f in diagnosis.findings],
    }
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1)


def _sarif_result(finding: Finding, level: str, target: str) -> dict[str, Any]:
    place = {"name": finding.layer or "(model)", "fullyQualifiedName": finding.layer or target}
    return {
        "ruleId": finding.code,
        "level": level,
        "message": {"text": f"{finding.layer or 'model'}: {finding.cause}. {finding.advice}"},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": target.replace("\\", "/")}},
                "logicalLocations": [place],
            }
        ],
        "properties": {"evidence": {k: str(v) for k, v in finding.evidence.items()}},
    }


def page(diagnosis: Diagnosis, target: str) -> str:
    """One page that opens offline, in light and in dark."""
    loader = jinja2.PackageLoader("truenorm", "report")
    template = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    titles = {check.code: check.title for check in CHECKS}
    return template.get_template("diagnosis.html").render(
        diagnosis=diagnosis,
        target=target,
        titles=titles,
        number=_number,
        count={
            severity: sum(f.severity == severity for f in diagnosis.findings)
            for severity in ("error", "warning", "note")
        },
    )
