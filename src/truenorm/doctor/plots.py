"""The doctor's drawing: which layer's running statistics are off, and how far."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from truenorm.canvas import MAIN, MARK, QUIET, Axes, drawing, svg, tell, ticker
from truenorm.doctor.facts import Distance, Distances

MOST_DRAWN = 40  # layers; of more those that are off most
LONGEST = 34  # characters of a layer's name
SMALLEST, LARGEST = 1e-3, 1e12  # what has no place on a logarithmic axis stands at its end


class _Panel(NamedTuple):
    """One measure of all layers, from the top down."""

    values: list[float]
    limits: tuple[float, ...]
    title: str
    unit: str


def how_far(distances: Distances, found: Collection[str]) -> str:
    """Each layer's ratio of variances and shift of means, with the limits.

    Args:
        distances: of the layers.
        found: names of the layers that a finding is of; they have a cross, and one at their name.
    """
    layers = _farthest(distances)
    panels = (
        _Panel(
            [min(max(one.ratio, 1 / LARGEST), LARGEST) for one in layers],
            (1 / distances.ratio, distances.ratio),
            f"Running over {distances.expected} variance",
            "times",
        ),
        _Panel(
            [min(max(one.shift, SMALLEST), LARGEST) for one in layers],
            (distances.shift,),
            f"Running mean from {distances.expected} mean",
            "standard deviations",
        ),
    )
    height = 1.4 + 0.2 * len(layers)
    with drawing("how far off", 2, columns=2, sharey=True, width=7.6, height=height) as figure:
        for axes, panel in zip(figure.axes, panels, strict=True):
            _dots(axes, panel, layers, found)
        first, second = figure.axes
        names = zip(_short([one.layer for one in layers]), layers, strict=True)
        labels = [f"{name}  x" if one.layer in found else name for name, one in names]
        first.set_yticks(range(len(layers)), labels)
        second.tick_params(labelleft=False)
        figure.legend(*first.get_legend_handles_labels(), loc="outside upper right", ncols=3)
        return svg(
            figure,
            "How far running statistics are off, layer by layer",
            _in_words(distances, layers, found),
        )


def _in_words(distances: Distances, layers: list[Distance], found: Collection[str]) -> str:
    worst = max(layers, key=_size)
    marked = [one.layer or "(model)" for one in layers if one.layer in found]
    return (
        f"{len(layers)} of {len(distances.layers)} layers, against the {distances.expected} "
        f"statistics. Farthest off is {worst.layer or '(model)'}: variance {worst.ratio:.3g} "
        f"times, mean {worst.shift:.3g} standard deviations. Told of by {distances.code}: "
        f"{', '.join(marked) or 'none'}."
    )


def _farthest(distances: Distances) -> list[Distance]:
    """At most :data:`MOST_DRAWN` layers, in the order of the forward."""
    worst = sorted(distances.layers, key=_size, reverse=True)[:MOST_DRAWN]
    return [one for one in distances.layers if one in worst]


def _size(one: Distance) -> float:
    """How far off, whichever way: the larger of the variances' ratio and the means' shift."""
    return max(one.ratio, 1 / one.ratio if one.ratio else LARGEST, one.shift)


def _short(names: list[str]) -> list[str]:
    """Names that fit: where they do not, without the parents that all of them have in common."""
    paths = [name.split(".") for name in names]
    common = 0
    while (
        len(names) > 1
        and max(map(len, names)) > LONGEST
        and all(len(path) > common + 1 for path in paths)
    ):
        if len({path[common] for path in paths}) > 1:
            break
        common += 1
    shown = [".".join(path[common:]) or "(model)" for path in paths]
    half = (LONGEST - 3) // 2
    return [n if len(n) <= LONGEST else f"{n[:half]}...{n[-half:]}" for n in shown]


def _dots(axes: Axes, panel: _Panel, layers: list[Distance], found: Collection[str]) -> None:
    kinds = ((False, "o", 4, MAIN, "no finding"), (True, "X", 7, MARK, "finding"))
    for is_found, mark, size, colour, label in kinds:
        at = [i for i, one in enumerate(layers) if (one.layer in found) == is_found]
        if at:
            values = [panel.values[i] for i in at]
            (line,) = axes.plot(values, at, mark, color=colour, markersize=size, label=label)
            tell(line, [f"{layers[i].layer or '(model)'}: {v:.3g} {panel.unit}" for i, v in
                        zip(at, values, strict=True)])  # fmt: skip
    for i, limit in enumerate(panel.limits):  # a label that begins so is no legend's
        told = "_limit" if i else "limit"
        axes.axvline(limit, color=QUIET, linewidth=1, linestyle="--", label=told)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set(xlabel=panel.unit, ylim=(len(layers) - 0.5, -0.5))
    axes.set_title(panel.title, loc="left")
