"""The report's drawings: SVG whose colours are the page's own variables, for light and dark."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from truenorm.training.evaluate import Histogram, NormView
from truenorm.training.fit import History

# Stand-ins that matplotlib can draw with; the finished SVG names the page's variables instead.
_INK, _LINE, _QUIET, _MAIN, _MARK = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "var(--ink)",
    _LINE: "var(--line)",
    _QUIET: "var(--quiet)",
    _MAIN: "var(--main)",
    _MARK: "var(--mark)",
}
# Colours of series, one for each norm of a study.
SERIES = tuple(f"#1a2b3{i}" for i in range(1, 9))
_VARIABLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)}
INK, QUIET, MARK = _INK, _QUIET, _MARK
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def loss_curves(history: History) -> str:
    """Training and validation loss by epoch, the best epoch marked."""
    with drawing("loss", 1) as figure:
        axes = figure.axes[0]
        _curve(axes, history, "train_loss", colour=_QUIET, label="training")
        _curve(axes, history, "valid_loss", colour=_MAIN, label="validation")
        _mark_best(axes, history, "valid_loss")
        axes.set(xlabel="epoch", title="Loss (cross entropy, nats)")
        return svg(figure)


def accuracy_curve(history: History) -> str:
    """Validation accuracy by epoch, the best epoch marked."""
    with drawing("accuracy", 1) as figure:
        axes = figure.axes[0]
        _curve(axes, history, "valid_accuracy", colour=_MAIN, label="validation", factor=100)
        _mark_best(axes, history, "valid_accuracy", 100)
        axes.set(xlabel="epoch", title="Accuracy (%)")
        return svg(figure)


def distributions(view: NormView) -> str:
    """What enters a norm and what leaves it, one above the other on one axis."""
    with drawing(f"distributions {view.name}", 2, sharex=True) as figure:
        before, after = figure.axes
        _bars(before, view.before, _QUIET, "before")
        _bars(after, view.after, _MAIN, "after")
        return svg(figure)


def per_channel(view: NormView) -> str:
    """Running statistics, gamma and beta of every channel."""
    rows = [
        ("running mean", view.running_mean),
        ("running variance", view.running_var),
        ("gamma (weight)", view.weight),
        ("beta (bias)", view.bias),
    ]
    kept = [(title, values) for title, values in rows if values is not None]
    if not kept:
        return ""
    with drawing(f"channels {view.name}", len(kept), height=3.0, columns=2) as figure:
        for axes, (title, values) in zip(figure.axes, kept, strict=False):
            axes.plot(values, ".", color=_MAIN, markersize=3)
            axes.set_title(title)
            if title == "running variance" and min(values) > 0 and max(values) > 50 * min(values):
                axes.set_yscale("log")
        return svg(figure)


def _bars(axes: Axes, histogram: Histogram, colour: str, title: str) -> None:
    width = (histogram.high - histogram.low) / len(histogram.counts)
    edges = [histogram.low + i * width for i in range(len(histogram.counts))]
    axes.bar(edges, histogram.counts, width, align="edge", color=colour)
    axes.set(yticks=[])
    axes.set_title(title, loc="left")


def _curve(
    axes: Axes, history: History, field: str, *, colour: str, label: str, factor: float = 1
) -> None:
    values = [getattr(e, field) * factor for e in history.epochs]
    axes.plot([e.epoch for e in history.epochs], values, color=colour, marker=".", label=label)


def _mark_best(axes: Axes, history: History, field: str, factor: float = 1) -> None:
    best = history.best
    if best is not None:
        value = getattr(best, field) * factor
        axes.axvline(best.epoch, color=_MARK, linewidth=1, linestyle=":")
        axes.plot([best.epoch], [value], "o", color=_MARK, label=f"best: epoch {best.epoch}")
    axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


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
