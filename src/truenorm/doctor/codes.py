"""The codes and their pages, read from the documentation: no torch, so that --list is quick."""

from __future__ import annotations

import difflib
import functools
import re
from importlib import resources
from typing import NamedTuple

from truenorm.errors import InputError

_ROW = re.compile(r"^\| \[(TN\d+)\]\(\1\.md\) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.M)


class Code(NamedTuple):
    """One fault that is looked for.

    Attributes:
        code: its stable name.
        title: the fault in a few words.
        passed: what is well where it is not found.
        needs: what must be given to look for it.
        severities: of its findings, the worst first.
    """

    code: str
    title: str
    passed: str
    needs: str
    severities: tuple[str, ...]


@functools.cache
def codes() -> tuple[Code, ...]:
    """All codes, in order."""
    rows = _ROW.findall(_read("README"))
    return tuple(
        Code(code, title, passed, needs, tuple(severities.split(", ")))
        for code, title, passed, needs, severities in rows
    )


def page(code: str) -> str:
    """The page of one code, in Markdown.

    Raises:
        InputError: no such code.
    """
    known = [one.code for one in codes()]
    if code.upper() not in known:
        near = difflib.get_close_matches(code.upper(), known, 1)
        asked = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown code {code!r}; {asked}truenorm doctor --list names all.")
    return _read(code.upper())


def _read(name: str) -> str:
    # A link to docs/doctor in the repository, a folder in an installed package.
    return (resources.files(__package__) / "pages" / f"{name}.md").read_text("utf-8")
