"""The one exception that says: the caller can mend this; and how others are told in it."""

from __future__ import annotations


class InputError(ValueError):
    """Something the caller gave is wrong: its name, the rule, the value received, the next step.

    A ``ValueError``, so Python code may catch either. The command line prints its text,
    without a traceback, and exits with 2.
    """


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        InputError: it is not; the text lists what is.
    """
    if value not in allowed:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}.")
    return value


def one_line(error: BaseException) -> str:
    """What ``error`` says, on one line, to stand in another text."""
    return " ".join(str(error).split())
