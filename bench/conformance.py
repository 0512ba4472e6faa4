"""Other people's test suites, run with TrueNorm's layers in the place of theirs: conformance.md.

Exits with 1 if a case fails that is not by design.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import io
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

import harness

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

import truenorm
from conformance.cases import Outcome, run, unused
from conformance.expected import BY_DESIGN
from conformance.suites import SUITES, every_case

PAGE = ROOT / "docs" / "conformance.md"
COMMAND = "make conformance"
NAMED = 6  # cases named of those that share a reason


def outcomes() -> list[Outcome]:
    """Every case, run; what torch prints about its own tests is not shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        return run(every_case(), BY_DESIGN)


def table(found: list[Outcome]) -> str:
    """A row for each suite."""
    lines = [
        "| suite | from | how | run | passed | by design | torch's, too | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(s.name, s.source, s.how, [o for o in found if o.case.suite == s.name]) for s in SUITES]
    for name, source, how, mine in [*rows, ("all", "", "", found)]:
        states = [sum(o.state == state for o in mine) for state in STATES]
        cells = [name, source, how, len(mine), *states]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


STATES = ("passed", "by design", "torch's, too", "failed")


def reasons(found: Iterable[Outcome], state: str) -> str:
    """The cases of ``state``, by what was said."""
    cases: dict[tuple[str, str], list[str]] = {}
    for it in found:
        if it.state == state:
            cases.setdefault((it.case.suite, it.reason), []).append(it.case.name)
    if not cases:
        return "None."
    return "\n".join(
        f"- {suite}, {len(names)}: {_cell(reason)}\n  {_listed(names)}"
        for (suite, reason), names in cases.items()
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "; ".join(f"`{name}`" for name in names[:NAMED]) + more


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(found: list[Outcome], seconds: float) -> str:
    """The whole page."""
    about = harness.provenance(COMMAND)
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy"))
    return TEXT.format(
        command=COMMAND,
        machine=f"{about['cpu']}, {about['cores']} cores, one thread",
        versions=f"truenorm {truenorm.__version__}, Python {platform.python_version()}, {versions}",
        seconds=round(seconds),
        table=table(found),
        design=reasons(found, "by design"),
        torchs=reasons(found, "torch's, too"),
        failed=reasons(found, "failed"),
    )


TEXT = """\
# Other people's tests

Made by `{command}` (`bench/conformance.py`) with {versions}; {machine}; {seconds} s.

These suites were written without this library in mind. Each asks its questions of TrueNorm's
layers in the place of its own. torch's databases and its tests of SyncBatchNorm are those installed
with torch; the rest is told again in words of our own in `tests/support/conformance/`, a file for
each suite, and nothing of theirs is copied. A part of it is in `make test`
(`tests/layers/test_conformance.py`).

{table}

- **By design**: the layer is meant to be otherwise; `tests/support/conformance/expected.py` says
  why.
- **torch's, too**: torch's own layer fails the same case.

## By design

{design}

## torch's, too

{torchs}

## Failed

{failed}
"""


def main() -> None:
    """Run everything, write the page and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page goes")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = outcomes()
    out.write_text(page(found, time.perf_counter() - began), encoding="utf-8")
    print(table(found))
    for design in unused(BY_DESIGN, found):
        print(f"no case fails any more by design: {design.suite}, {design.pattern}")
    if any(it.state == "failed" for it in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
