"""What the doctor's commands print or write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from rich.console import Console

from truenorm.doctor.diagnosis import Diagnosis
from truenorm.doctor.finding import Finding
from truenorm.doctor.rendering import grouped, summary
from truenorm.errors import InputError
from truenorm.files import to_json, write_atomically
from truenorm.layers.recalibration import Recalibration

_FORMATS = {"": "text", ".txt": "text", ".log": "text", ".json": "json", ".sarif": "sarif",
            ".html": "html"}  # fmt: skip


def format_of(out: Path | None) -> str:
    """The format that the suffix of ``out`` asks for.

    Raises:
        InputError: it asks for another than there are.
    """
    suffix = "" if out is None else out.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(
            f"{out}: --out must end in {', '.join(filter(None, _FORMATS))}; or choose by --format."
        )
    return _FORMATS[suffix]


def deliver(
    diagnosis: Diagnosis,
    format: str,
    out: Path | None,
    *,
    name: str,
    file: str,
    applied: Collection[Finding] | None = None,
) -> None:
    """Print the diagnosis, or write it to ``out`` and say so on stderr.

    Args:
        diagnosis: what to tell.
        format: text, json, sarif or html.
        out: None for stdout.
        name: of what was examined, as it was given.
        file: where SARIF places the findings.
        applied: findings that were fixed before, which JSON then lists.

    Raises:
        InputError: ``out`` cannot be written.
    """
    console = Console(highlight=False)
    if format == "text" and out is None and console.is_terminal:
        console.print(diagnosis)
        return
    fixed = {} if applied is None else {"fixed": [finding.to_dict() for finding in applied]}
    writers: dict[str, Callable[[], str]] = {
        "text": lambda: str(diagnosis),
        "json": lambda: json.dumps(diagnosis.to_dict() | fixed, indent=1),
        "sarif": lambda: diagnosis.to_sarif(file),
        "html": lambda: diagnosis.to_html(name),
    }
    text = writers[format]()
    if out is None:
        print(text)
    else:
        write_atomically(out, lambda path: path.write_text(text + "\n", "utf-8"))
        print(f"{summary(diagnosis)}; written to {out}", file=sys.stderr)


def forgiven(
    diagnosis: Diagnosis, known: Collection[tuple[str, str | None]], baseline: Path
) -> None:
    """Say on stderr which findings a baseline knows, so that the exit status is understood."""
    old = sum((f.code, f.layer) in known for f in diagnosis.findings)
    print(f"{baseline}: knows {old} of {len(diagnosis.findings)} findings", file=sys.stderr)


def mended(applied: Collection[Finding], out: Path, *, tried: int) -> None:
    """Say on stderr which of ``tried`` remedies helped; stdout shows the model after them."""
    for group in grouped(applied):
        print(f"fixed {group.first.code} {group.where}: {group.first.title}", file=sys.stderr)
    vain = tried - len(applied)
    told = f"{vain} of {tried} remedies did not help; " if vain else ""
    print(f"{told if tried else 'nothing to fix; '}written to {out}", file=sys.stderr)


def recalibrated(result: Recalibration, out: Path, *, as_json: bool) -> None:
    """Print what a recalibration did."""
    if not as_json:
        print(result)
        print(f"written to {out}" if result.kept else "nothing was written; see --keep-worse")
        return
    about = {
        "kept": result.kept,
        "reason": result.reason,
        "out": str(out) if result.kept else None,
        "passes": result.passes,
        "batches": result.batches,
        "examples": result.examples,
        "before": None if result.before is None else result.before._asdict(),
        "after": None if result.after is None else result.after._asdict(),
        "pooled": None if result.pooled is None else result.pooled._asdict(),
        "layers": [row._asdict() for row in result.rows],
        "left": [it._asdict() for it in result.left],
    }
    print(to_json(about))


def known(baseline: Path) -> set[tuple[str, str | None]]:
    """Code and layer of every finding in an earlier diagnosis's JSON.

    Raises:
        InputError: the file is none.
    """
    if not baseline.exists():
        raise InputError(f"{baseline}: no such file.")
    try:
        findings = json.loads(baseline.read_text("utf-8"))["findings"]
        return {(finding["code"], finding["layer"]) for finding in findings}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{baseline}: is no diagnosis; make one with truenorm doctor TARGET --format json "
            "--out FILE."
        ) from error
