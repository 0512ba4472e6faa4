"""The report's drawings: SVG whose colours are the page's own variables, for light and dark."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from truenorm.report.canvas import MAIN, MARK, QUIET, drawing, svg
from truenorm.training.history import History
from truenorm.training.judgement import Histogram, NormView


def loss_curves(history: History) -> str:
    """Training and validation loss by epoch, the best epoch marked."""
    with drawing("loss", 1) as figure:
        axes = figure.axes[0]
        _curve(axes, history, "train_loss", colour=QUIET, label="training")
        _curve(axes, history, "valid_loss", colour=MAIN, label="validation")
        _mark_best(axes, history, "valid_loss")
        axes.set(xlabel="epoch", title="Loss (cross entropy, nats)")
        return svg(figure)


def accuracy_curve(history: History) -> str:
    """Validation accuracy by epoch, the best epoch marked."""
    with drawing("accuracy", 1) as figure:
        axes = figure.axes[0]
        _curve(axes, history, "valid_accuracy", colour=MAIN, label="validation", factor=100)
        _mark_best(axes, history, "valid_accuracy", 100)
        axes.set(xlabel="epoch", title="Accuracy (%)")
        return svg(figure)


def distributions(view: NormView) -> str:
    """What enters a norm and what leaves it, one above the other on one axis."""
    with drawing(f"distributions {view.name}", 2, sharex=True) as figure:
        before, after = figure.axes
        _bars(before, view.before, QUIET, "before")
        _bars(after, view.after, MAIN, "after")
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
            axes.plot(values, ".", color=MAIN, markersize=3)
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
        axes.axvline(best.epoch, color=MARK, linewidth=1, linestyle=":")
        axes.plot([best.epoch], [value], "o", color=MARK, label=f"best: epoch {best.epoch}")
    axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
