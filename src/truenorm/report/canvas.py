"""One style for all drawings, as SVG that follows the page's colours."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Stand-ins that matplotlib can draw with; the finished SVG names the page's variables instead.
INK, QUIET, MAIN, MARK = "#010203", "#070809", "#0a0b0c", "#0d0e0f"
SERIES = tuple(f"#1a2b3{i}" for i in range(1, 9))  # one for each norm of a study
_LINE = "#040506"
_VARIABLES = {
    INK: "var(--ink)",
    _LINE: "var(--line)",
    QUIET: "var(--quiet)",
    MAIN: "var(--main)",
    MARK: "var(--mark)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@contextlib.contextmanager
def drawing(
    name: str, panels: int, *, columns: int = 1, sharex: bool = False, height: float = 2.8
) -> Iterator[Figure]:
    """A figure with ``panels`` axes, drawn in the page's style inside the body."""
    # Marks and clips are named by a hash; a salt of its own keeps two drawings apart.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        columns = min(columns, panels)
        for i in range(panels):
            shared = figure.axes[0] if sharex and i else None
            figure.add_subplot(-(-panels // columns), columns, i + 1, sharex=shared)
        yield figure


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # Without a size of its own the drawing takes its card's width.
    return re.sub(
        r'(<svg[^>]*?) height="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1),
        count=1,
    )
