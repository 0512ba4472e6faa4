"""What the doctor's codes mean, printed."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from truenorm.doctor.codes import codes, page


def listed(*, as_json: bool) -> None:
    """Print a table of all codes."""
    if as_json:
        print(json.dumps({"codes": [code._asdict() for code in codes()]}))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("code", "fault", "needs", "severity"):
        table.add_column(name)
    for code in codes():
        table.add_row(code.code, code.title, code.needs, ", ".join(code.severities))
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console.width = 120  # a line for each code, whatever reads it
    with console.capture() as caught:
        console.print(table)
    print("\n".join(line.rstrip() for line in caught.get().splitlines()))


def explained(code: str, *, as_json: bool) -> None:
    """Print the page of one code: formatted in a terminal, else as it is written.

    Raises:
        InputError: no such code.
    """
    text = page(code)
    console = Console()
    if as_json:
        print(json.dumps({"code": code.upper(), "page": text}))
    elif console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, end="")
