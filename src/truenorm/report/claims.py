"""Findings as a person sees them: lines on the console; HTML, Markdown and JSON files."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from truenorm.canvas import INK, MARK, QUIET, SERIES, drawing, style_of, svg, tell
from truenorm.files import to_json
from truenorm.report import pages
from truenorm.report.pages import page
from truenorm.report.study import command_of
from truenorm.report.study import following as following_runs
from truenorm.studies.claims.catalogue import CLAIMS
from truenorm.studies.claims.claim import ClaimFinding, Findings, Judged, Plot
from truenorm.studies.runner import StudyObserver, StudyProgress


def listed(*, as_json: bool) -> None:
    """Print the names and what they state."""
    if as_json:
        print(to_json({name: claim.statement for name, claim in CLAIMS.items()}))
        return
    for name, claim in CLAIMS.items():
        print(f"{name:16} {claim.statement}")


class Following(NamedTuple):
    """What to tell of claims while they are tested."""

    observe: StudyObserver | None
    found: Callable[[ClaimFinding], None] | None


@contextlib.contextmanager
def following(store: Path, *, quiet: bool, as_json: bool) -> Iterator[Following]:
    """Findings as they come, above a bar with time left over each claim's runs.

    Elsewhere than in a terminal there is no bar, and of runs only failures are told.
    """
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)

    def finding(found: ClaimFinding) -> None:
        console.print("\n".join([*lines(found), ""]), markup=False)

    told = None if as_json else finding
    with following_runs(store, quiet=quiet, as_json=as_json, console=console) as observe:

        def failures(progress: StudyProgress) -> None:
            assert observe is not None
            row = progress.row if progress.row is not None and progress.row.error else None
            observe(progress._replace(row=row))

        yield Following(None if observe is None else failures, told)


def left_out(found: Findings) -> None:
    """Print the claims that were not tested, and how many of the others have which verdict."""
    for name, reason in found.left.items():
        print(f"{name}: left out, {reason}")
    print(tally(found))


def tally(found: Findings) -> str:
    """How many claims have which verdict."""
    counts = Counter(f.verdict for f in found.findings)
    verdicts = ", ".join(
        f"{counts[v]} {v}" for v in ("supported", "refuted", "cannot tell") if counts[v]
    )
    many = len(found.findings)
    return f"{many} claim{'s' * (many != 1)}: {verdicts or 'none tested'}."


def lines(found: ClaimFinding) -> list[str]:
    """Verdict, parts, literature, what was given up, time."""
    claim, size = found.claim, found.size
    failed = sum(row.error is not None for row in found.rows)
    return [
        f"{claim.name}: {found.verdict.upper()}. {claim.statement}",
        *(f"  {said(j)}" for j in found.parts),
        f"  literature: {claim.literature}",
        f"  margin: {claim.margin}",
        f"  study: {claim.setting} {size.seeds} seeds, {size.examples} examples, "
        f"{size.epochs} epoch{'s' * (size.epochs > 1)}.",
        *([f"  {found.plot.note}"] if found.plot.note else []),
        *([f"  given up: {found.gave_up}"] if found.gave_up else []),
        *([f"  {failed} runs failed"] if failed else []),
        f"  {len(found.rows)} runs, {found.seconds:.0f} s of one core",
    ]


def said(j: Judged) -> str:
    """A part's answer and sentence; the sentence of one that cannot tell says so itself."""
    return j.sentence if j.answer == "cannot tell" else f"{j.answer}: {j.sentence}"


def kind_of(out: Path | None) -> str:
    """What the suffix of ``out`` asks for; raises InputError if nothing that can be written."""
    return pages.kind_of(out, _WRITERS)


def write(found: Findings, out: Path) -> None:
    """Write a report as its suffix says: .html, .md or .json.

    Raises:
        InputError: another suffix, or ``out`` cannot be written.
    """
    pages.write(found, out, _WRITERS)


def html(found: Findings) -> str:
    """One page that opens offline, in light and in dark."""
    return page(
        "claims.html",
        found=found,
        cards=[(f, scores(f.plot), differences(f), table(f)) for f in found.findings],
        about=_about(found),
        tally=tally(found),
        said=said,
        columns=_COLUMNS,
        command=command_of(found.provenance["command"]),
    )


def markdown(found: Findings) -> str:
    """A table of verdicts, then each claim."""
    text = ["# Batch norm's claims, tested", "", _about(found), "", "| claim | verdict |"]
    text += ["| :-- | :-- |"]
    text += [f"| {f.claim.statement} | {f.verdict} |" for f in found.findings]
    text += ["", tally(found)]
    for f in found.findings:
        text += ["", f"## {f.claim.name}: {f.verdict}", "", f"{f.claim.statement}", ""]
        text += [f"- {line.strip()}" for line in lines(f)[1:]]
        text += ["", *("| " + " | ".join(row) + " |" for row in (_COLUMNS, _SIDES, *table(f)))]
    text += ["", "```console", f"$ {command_of(found.provenance['command'])}", "```", ""]
    text += [f"- {k}: {v}" for k, v in found.provenance.items() if k != "command"]
    return "\n".join(text) + "\n"


def _about(found: Findings) -> str:
    """What the page is, in a paragraph."""
    seconds = sum(f.seconds for f in found.findings)
    runs = sum(len(f.rows) for f in found.findings)
    quick = "Quick: fewer seeds, examples and settings than the full studies. "
    return (
        f"{quick if found.provenance['quick'] else ''}Each claim is a small study on "
        f"{found.provenance['data']} with paired seeds. Supported: all of its comparisons say so; "
        "refuted: any says otherwise; else cannot tell. The p-values are corrected by Holm within "
        f"a claim. {runs:,} runs took {seconds / 60:.0f} minutes of one core, on "
        f"{found.provenance['processes']} processes."
        + "".join(f" Left out: {name}, which {reason}." for name, reason in found.left.items())
    )


_COLUMNS = ("a", "b", "a - b", "interval", "unit", "margin", "p (Holm)", "n", "decision", "answer")
_SIDES = (":--", ":--", *["--:"] * 6, ":--", ":--")


def table(found: ClaimFinding) -> list[list[str]]:
    """A line for each part."""
    return [_cells(j) for j in found.parts]


def _cells(j: Judged) -> list[str]:
    c, factor = j.comparison, j.part.factor

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{factor * value:.2f}"

    interval = f"{figure(c.low)} to {figure(c.high)}"
    return [
        *(c.a, c.b, figure(c.difference), interval, j.part.unit, figure(c.margin)),
        *(f"{c.p_holm:.2g}", str(c.n), j.decision, j.answer),
    ]


_WRITERS: dict[str, Callable[[Findings], str]] = {
    ".html": html,
    ".md": markdown,
    ".json": lambda found: to_json(found.to_json(), indent=2) + "\n",
}


def scores(plot: Plot) -> str:
    """Means with a dot for each seed: lines along an axis, or a row for each label."""
    rows = not plot.axis
    count = max((len(points) for points in plot.series.values()), default=1)
    values_told: list[str] = []
    with drawing(plot.title + plot.axis, 1, height=0.9 + 0.3 * count if rows else 2.8) as figure:
        axes = figure.axes[0]
        for i, (name, points) in enumerate(plot.series.items()):
            known = [(x, v) for x, values in points if (v := _known(values))]
            places: list[float] = [
                float(count - 1 - k) if rows else float(x) for k, (x, _) in enumerate(known)
            ]
            means = [float(np.mean(v)) for _, v in known]
            colour = SERIES[(i + 1) % len(SERIES)]
            for at, (_, values) in zip(places, known, strict=True):
                along = [at] * len(values)
                spots = (values, along) if rows else (along, values)
                axes.plot(*spots, ".", color=QUIET if rows else colour, alpha=0.5, markersize=3)
            if rows:
                (line,) = axes.plot(means, places, "o", color=MARK, markersize=5)
                axes.set_yticks(places, [str(x) for x, _ in known])
            else:
                (line,) = axes.plot(places, means, markersize=4, label=name, **style_of(i + 1))
            texts = [f"{name}, {x}: {m:.4g}" for (x, _), m in zip(known, means, strict=True)]
            tell(line, texts)
            values_told += texts
        if plot.log and not rows:
            axes.set_xscale("log")
        axes.set(title=plot.title, xlabel=plot.axis)
        if not rows:
            axes.legend()
        return svg(figure, plot.title, f"Means over seeds: {'; '.join(values_told)}.")


def differences(found: ClaimFinding) -> str:
    """Each part's differences by seed, mean and interval, in multiples of its margin."""
    parts = list(reversed(found.parts))
    with drawing("claim " + found.claim.name, 1, height=0.9 + 0.32 * len(parts)) as figure:
        axes = figure.axes[0]
        axes.axvspan(-1, 1, color=QUIET, alpha=0.2, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        for y, j in enumerate(parts):
            p, c = j.part, j.comparison
            pairs = zip(p.scores_a, p.scores_b, strict=True)
            seen = _known([(a - b) / p.margin for a, b in pairs])
            (dots,) = axes.plot(seen, [y + 0.18] * len(seen), ".", color=QUIET, markersize=4)
            tell(dots, [f"one seed: {d:+.3g} margins" for d in seen])
            if c.difference is not None:
                axes.plot([c.difference / p.margin], [y - 0.1], "o", color=MARK, markersize=5)
            if c.low is not None and c.high is not None:
                ends = [c.low / p.margin, c.high / p.margin]
                axes.plot(ends, [y - 0.1] * 2, color=MARK, linewidth=1.6)
        axes.set_yticks(range(len(parts)), [f"{j.part.a}\n- {j.part.b}" for j in parts])
        axes.set_ylim(-0.6, len(parts) - 0.4)
        axes.set(xlabel="difference, in margins (grey: within)")
        told = " ".join(said(j) for j in found.parts)
        return svg(figure, f"Differences: {found.claim.name}", told)


def _known(values: list[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]
