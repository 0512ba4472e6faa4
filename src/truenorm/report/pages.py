"""What every report does alike: a page from its template, and a file in its suffix's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from truenorm.errors import InputError
from truenorm.files import write_atomically
from truenorm.templates import render

T = TypeVar("T")
Writers = Mapping[str, Callable[[T], str]]  # by suffix


def page(template: str, **values: Any) -> str:
    """One page that opens offline, in light and in dark."""
    return render(f"report/{template}", **values)


def kind_of(out: Path | None, writers: Mapping[str, object]) -> str:
    """What the suffix of ``out`` asks for.

    Raises:
        InputError: nothing that can be written.
    """
    kind = ".html" if out is None else out.suffix.lower()
    if kind not in writers:
        raise InputError(f"{out}: --out must end in {', '.join(writers)}.")
    return kind


def write(reported: T, out: Path, writers: Writers[T]) -> None:
    """Write a report in the format of its suffix.

    Raises:
        InputError: another suffix, or ``out`` cannot be written.
    """
    text = writers[kind_of(out, writers)](reported)
    write_atomically(out, lambda path: path.write_text(text, "utf-8"))
