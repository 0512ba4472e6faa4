"""One style for all drawings: SVG that says what it shows and follows the page's colours."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

# Of a backend that is not there, as MPLBACKEND names outside of its notebook, the import fails.
_first = "matplotlib" not in sys.modules
_backend = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402
from matplotlib import ticker as ticker  # noqa: E402, PLC0414  # drawings take these from here
from matplotlib.artist import Artist  # noqa: E402
from matplotlib.axes import Axes as Axes  # noqa: E402, PLC0414
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    if _first:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = _backend

# Stand-ins that matplotlib can draw with; the finished SVG names the page's variables instead.
INK, QUIET, MAIN, MARK = "#010203", "#070809", "#0a0b0c", "#0d0e0f"
SERIES = tuple(f"#1a2b3{i}" for i in range(1, 9))  # one for each norm of a study
# Lines and marks of the series, which differ also where colours are not seen.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)), (0, (3, 5)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
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
_TOLD = "truenorm_told"  # an artist's attribute
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def style_of(number: int) -> dict[str, Any]:
    """Colour, dashes and marks of a study's series, by its number."""
    at = number % len(SERIES)
    return {"color": SERIES[at], "linestyle": DASHES[at], "marker": MARKS[at]}


@contextlib.contextmanager
def drawing(
    name: str,
    panels: int,
    *,
    columns: int = 1,
    sharex: bool = False,
    sharey: bool = False,
    width: float = 4.6,
    height: float = 2.8,
) -> Iterator[Figure]:
    """A figure with ``panels`` axes, drawn in the page's style inside the body.

    ``name`` is the drawing's own on its page: identifiers begin with it.
    """
    # Marks and clips are named by a hash; a salt of its own keeps two drawings apart.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.set_label(name)
        FigureCanvasSVG(figure)
        columns = min(columns, panels)
        for i in range(panels):
            first = figure.axes[0] if i else None
            figure.add_subplot(
                *(-(-panels // columns), columns, i + 1),
                sharex=first if sharex else None,
                sharey=first if sharey else None,
            )
        yield figure


def tell(artist: Artist, texts: Sequence[str]) -> None:
    """Let a line's marks, or one bar, say their values to whoever points at them."""
    artist.set_gid(f"told-{id(artist)}")
    setattr(artist, _TOLD, list(texts))


def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an <svg> element that scales with the page.

    Args:
        figure: of :func:`drawing`.
        title: what it is, a few words.
        description: what it shows, with its main numbers, for who cannot see it.
    """
    told = {
        artist.get_gid(): getattr(artist, _TOLD)
        for artist in figure.findobj(lambda artist: hasattr(artist, _TOLD))
    }
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    for part in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(part)
    for group in root.iter(f"{{{_SVG}}}g"):
        _say(group, told.get(group.get("id", ""), []))
    prefix = re.sub(r"\W+", "-", str(figure.get_label()).lower())
    _own_names(root, prefix)
    _describe(root, prefix, title, description)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _say(group: ElementTree.Element, texts: Sequence[str]) -> None:
    """Give each mark of a line its text, or a bar its only one."""
    marks = list(group.iter(f"{{{_SVG}}}use")) or group.findall(f"{{{_SVG}}}path")
    if len(marks) != len(texts):
        return
    for mark, text in zip(marks, texts, strict=True):
        ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = text


def _own_names(root: ElementTree.Element, prefix: str) -> None:
    """Begin all identifiers with ``prefix``; matplotlib's are the same in every drawing."""
    known = [e.get("id") for e in root.iter() if e.get("id") is not None]
    fresh = {name: f"{prefix}-{i}" for i, name in enumerate(known)}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, fresh[value])
            elif key == _LINK:
                element.set(key, "#" + fresh[value.removeprefix("#")])
            elif "url(#" in value:
                element.set(key, re.sub(r"url\(#(.*?)\)", _renamed(fresh), value))


def _renamed(fresh: dict[str | None, str]) -> Any:
    return lambda found: f"url(#{fresh[found.group(1)]})"


def _describe(root: ElementTree.Element, prefix: str, title: str, description: str) -> None:
    for kind, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{_SVG}}}{kind}", {"id": f"{prefix}-{kind}"})
        element.text = text
        root.insert(0, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-desc")
    # Without a size of its own the drawing takes its card's width.
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
