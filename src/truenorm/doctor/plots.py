"""The doctor's drawing: which layer's running statistics are off, and how far."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from truenorm.canvas import INK, MAIN, MARK, QUIET, drawing, svg, tell
from truenorm.doctor.facts import Distance, Distances

MOST_DRAWN = 40  # layers; of more those that are off most
LONGEST = 34  # characters of a layer's name
SMALLEST, LARGEST = 1e-3, 1e12  # a shift of 0 and one without end have no place on the axis


class _Panel(NamedTuple):
    """One measure of all layers, from the top down."""

    values: list[float]
    limits: tuple[float, ...]
    title: str
    unit: str


def off(distances: Distances, found: Collection[str]) -> str:
    """Each layer's ratio of variances and shift of means, with the limits.

    Args:
        distances: of the layers.
        found: names of the layers that a finding is of; they are marked by a cross, and in words.
    """
    layers = _drawn(distances)
    exact = distances.code == "TN103"
    panels = (
        _Panel(
            [min(max(one.ratio, 1 / LARGEST), LARGEST) for one in layers],
            (1 / distances.ratio, distances.ratio),
            f"running variance over {distances.of}" if not exact else "running over exact variance",
            "times",
        ),
        _Panel(
            [min(max(one.shift, SMALLEST), LARGEST) for one in layers],
            (distances.shift,),
            "running mean off the exact one" if exact else "running mean off 0",
            "standard deviations",
        ),
    )
    names = [_short(one.layer) for one in layers]
    height = 1.2 + 0.2 * len(layers)
    with drawing("how far off", 2, columns=2, sharey=True, width=7.6, height=height) as figure:
        for axes, panel in zip(figure.axes, panels, strict=True):
            _dots(axes, panel, layers, found)
        first, second = figure.axes
        labels = [
            f"{name}  x" if one.layer in found else name
            for name, one in zip(names, layers, strict=True)
        ]
        first.set_yticks(range(len(layers)), labels)
        first.invert_yaxis()
        second.tick_params(labelleft=False)
        if any(one.layer in found for one in layers):
            second.legend(loc="lower left", bbox_to_anchor=(0, 1.08))
        worst = max(layers, key=_size)
        told = [one.layer or "(model)" for one in layers if one.layer in found]
        said = f"{len(layers)} of {len(distances.layers)} layers against {distances.of}. "
        said += f"Farthest off: {worst.layer or '(model)'}, variance {worst.ratio:.3g} times, mean "
        said += f"{worst.shift:.3g} standard deviations. "
        said += f"Of a finding ({distances.code}): {', '.join(told) or 'none'}."
        return svg(figure, "How far running statistics are off, layer by layer", said)


def _drawn(distances: Distances) -> list[Distance]:
    worst = sorted(distances.layers, key=_size, reverse=True)[:MOST_DRAWN]
    return [one for one in distances.layers if one in worst]


def _size(one: Distance) -> float:
    """How far off, whichever way: the larger of the variances' ratio and the means' shift."""
    return max(one.ratio, 1 / one.ratio if one.ratio else LARGEST, one.shift)


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    shown = name or "(model)"
    return shown if len(shown) <= LONGEST else f"...{shown[3 - LONGEST :]}"


def _dots(axes: Axes, panel: _Panel, layers: list[Distance], found: Collection[str]) -> None:
    for of_finding, mark, colour, label in (
        (False, "o", MAIN, "no finding"),
        (True, "X", MARK, "finding"),
    ):
        at = [i for i, one in enumerate(layers) if (one.layer in found) == of_finding]
        if not at:
            continue
        values = [panel.values[i] for i in at]
        size = 7 if of_finding else 4
        (line,) = axes.plot(values, at, mark, color=colour, markersize=size, label=label)
        names = [layers[i].layer or "(model)" for i in at]
        tell(
            line,
            [
                f"{name}: {value:.3g} {panel.unit}"
                for name, value in zip(names, values, strict=True)
            ],
        )
    for limit in panel.limits:
        axes.axvline(limit, color=QUIET, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=panel.unit, ylim=(len(layers) - 0.5, -0.5))
    axes.set_title(panel.title, loc="left", color=INK)
