"""The pages' templates: each opens offline, in light and in dark, in the colours of style.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The text that ``template`` makes of ``values``.

    Args:
        template: a file of this package, by its path from here, as "report/run.html".
        values: what stands for the template's variables.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("truenorm", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def table(names: Sequence[str], rows: Iterable[Sequence[object]], lines: Iterable[str] = ()) -> str:
    """What a notebook shows of a result: ``lines`` of text, and below them a table."""
    return render("table.html", names=names, rows=list(rows), lines=list(lines))
