"""The report's drawings: SVG whose colours are the page's own variables, for light and dark."""

from __future__ import annotations

from truenorm.canvas import MAIN, MARK, QUIET, Axes, drawing, svg, tell, ticker
from truenorm.training.history import History
from truenorm.training.judgement import Histogram, NormView

_MOST_TOLD = 512  # channels that say their value each; more would make the page heavy


def loss_curves(history: History) -> str:
    """Training and validation loss by epoch, the best epoch marked."""
    with drawing("loss", 1) as figure:
        axes = figure.axes[0]
        _curve(axes, history, "train_loss", colour=QUIET, label="training", dash="--", mark="s")
        _curve(axes, history, "valid_loss", colour=MAIN, label="validation")
        _mark_best(axes, history, "valid_loss")
        axes.set(xlabel="epoch", ylabel=history.loss, title="Loss")
        first, last, best = history.epochs[0], history.epochs[-1], history.best
        fell = f"training loss from {first.train_loss:.3g} to {last.train_loss:.3g}, "
        fell += f"validation loss from {first.valid_loss:.3g} to {last.valid_loss:.3g}"
        lowest = f"; best at epoch {best.epoch}, {best.valid_loss:.3g}" if best else ""
        return svg(figure, "Loss by epoch", f"{len(history.epochs)} epochs: {fell}{lowest}.")


def accuracy_curve(history: History) -> str:
    """Validation accuracy by epoch, the best epoch marked."""
    with drawing("accuracy", 1) as figure:
        axes = figure.axes[0]
        _curve(axes, history, "valid_accuracy", colour=MAIN, label="validation", factor=100)
        _mark_best(axes, history, "valid_accuracy", 100)
        axes.set(xlabel="epoch", ylabel="accuracy (%)", title="Validation accuracy")
        first, last, best = history.epochs[0], history.epochs[-1], history.best
        rose = f"from {first.valid_accuracy:.2%} to {last.valid_accuracy:.2%}"
        kept = f"; {best.valid_accuracy:.2%} at the best epoch, {best.epoch}" if best else ""
        return svg(figure, "Validation accuracy by epoch", f"{rose}{kept}.".capitalize())


def distributions(view: NormView) -> str:
    """What enters a norm and what leaves it, one above the other on one axis."""
    with drawing(f"distributions {view.name}", 2, sharex=True) as figure:
        before, after = figure.axes
        _bars(before, view.before, QUIET, "before")
        _bars(after, view.after, MAIN, "after")
        spans = " ".join(
            f"{name}: values from {h.low:.3g} to {h.high:.3g}."
            for name, h in (("Before", view.before), ("After", view.after))
        )
        return svg(figure, f"What enters and leaves {view.name}", spans)


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
            (line,) = axes.plot(values, ".", color=MAIN, markersize=3)
            if len(values) <= _MOST_TOLD:
                tell(line, [f"channel {i}: {value:.4g}" for i, value in enumerate(values)])
            axes.set(title=title, xlabel="channel")
            if title == "running variance" and min(values) > 0 and max(values) > 50 * min(values):
                axes.set_yscale("log")
        spans = "; ".join(f"{t} from {min(v):.3g} to {max(v):.3g}" for t, v in kept)
        return svg(figure, f"What each channel of {view.name} has learned", f"{spans}.")


def _bars(axes: Axes, histogram: Histogram, colour: str, title: str) -> None:
    width = (histogram.high - histogram.low) / len(histogram.counts)
    edges = [histogram.low + i * width for i in range(len(histogram.counts))]
    bars = axes.bar(edges, histogram.counts, width, align="edge", color=colour)
    for bar, edge, count in zip(bars, edges, histogram.counts, strict=True):
        tell(bar, [f"{edge:.3g} to {edge + width:.3g}: {count:,}"])
    axes.set(yticks=[], ylabel="count", xlabel="value")
    axes.set_title(title, loc="left")


def _curve(
    axes: Axes,
    history: History,
    field: str,
    *,
    colour: str,
    label: str,
    factor: float = 1,
    dash: str = "-",
    mark: str = "o",
) -> None:
    values = [getattr(e, field) * factor for e in history.epochs]
    epochs = [e.epoch for e in history.epochs]
    (line,) = axes.plot(epochs, values, dash, color=colour, marker=mark, markersize=3, label=label)
    tell(line, [f"epoch {e}, {label}: {v:.4g}" for e, v in zip(epochs, values, strict=True)])


def _mark_best(axes: Axes, history: History, field: str, factor: float = 1) -> None:
    best = history.best
    if best is not None:
        value = getattr(best, field) * factor
        axes.axvline(best.epoch, color=MARK, linewidth=1, linestyle=":")
        axes.plot([best.epoch], [value], "o", color=MARK, label=f"best: epoch {best.epoch}")
    axes.legend()
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
