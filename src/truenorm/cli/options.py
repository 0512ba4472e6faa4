"""Options that several commands share, their parsing, and the exit statuses."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from truenorm.data.reading import Reading
from truenorm.errors import InputError
from truenorm.training.config import TrainConfig, config_help

DONE, FOUND, MENDABLE, UNEXAMINED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 130, 141
OUTCOMES = {"interrupted": INTERRUPTED, "nan": MENDABLE}  # of a training

OUT = Parameter(name=["--out", "-o"])
Flag = Annotated[bool, Parameter(negative="")]  # without a --no- beside it
Json = Annotated[bool, Parameter(help="Print one JSON object on stdout.", negative="")]
LABEL = Parameter(name=["--target", "--label"], help="The label's column of a table.")
Label = Annotated[str | None, LABEL]
Model = Annotated[str, Parameter(help="A run folder, or package.module:factory.")]


def options_class(name: str, module: str, fields: Iterable[tuple[str, Any, Any]]) -> type[Any]:
    """A frozen dataclass of options, whose ``fields`` are name, annotation and field.

    It belongs to ``module``: else to "types", whose classes cyclopts takes for plain values.
    """
    # Every start makes these: methods that nothing calls would cost it milliseconds.
    options = dataclasses.make_dataclass(
        name, fields, frozen=True, kw_only=True, eq=False, repr=False
    )
    options.__module__ = module
    return options


def _settings(*without: str) -> type[Any]:
    """TrainConfig with every field optional: what is not said is the recipe's choice."""
    hints, help_of = typing.get_type_hints(TrainConfig), config_help()
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(TrainConfig):
        if f.name in without:
            continue
        kind = hints[f.name]
        optional: Any = kind if isinstance(kind, types.UnionType) else kind | None
        negative: dict[str, Any] = {} if kind is bool else {"negative": ""}
        option = Annotated[optional, Parameter(help=help_of[f.name], **negative)]
        fields.append((f.name, option, dataclasses.field(default=None)))
    name = "StudySettings" if without else "Settings"
    return options_class(name, __name__, fields)


Settings = _settings()
# Of a study these are variants, seeds and the tuner's; each of its runs has one thread.
StudySettings = _settings("batch_size", "lr", "seed", "threads")


def _reading(*without: str) -> type[Any]:
    """Reading's fields as options."""
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(Reading):
        if f.name not in without:
            negative: dict[str, Any] = {"negative": ""} if f.default is False else {}
            kind: Any = typing.get_type_hints(Reading)[f.name]
            option = Annotated[kind, Parameter(help=f.metadata["help"], **negative)]
            fields.append((f.name, option, dataclasses.field(default=f.default)))
    return options_class("Rereading" if without else "ReadingOptions", __name__, fields)


ReadingOptions = _reading()
Rereading = _reading("image_size")  # for a model that was trained on images of a size


def reading_of(options: Any) -> Reading:
    """What the options say of how data are read.

    Raises:
        InputError: a value lies outside its range.
    """
    return Reading(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)})


def check_file(out: Path | None) -> None:
    """Refuse at once what could not be written after the work; tell of folders it will make."""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"{out}: is a folder; --out names a file.")
    if not out.parent.exists():
        print(f"{out.parent}: is not there, and is made for {out.name}", file=sys.stderr)


def widths_of(text: str | None) -> tuple[int, ...] | None:
    """Layer widths, or None for the architecture's own."""
    return None if text is None else integers("widths", text)


def listed(text: str) -> tuple[str, ...]:
    """The parts between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def integers(name: str, text: str) -> tuple[int, ...]:
    """Comma-separated integers.

    Raises:
        InputError: one is none; the text tells the option.
    """
    try:
        return tuple(int(part) for part in listed(text))
    except ValueError as error:
        raise InputError(f"{name} must be integers like 256,128, got {text!r}.") from error


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers, at least one.

    Raises:
        InputError: one is none, or there is none; the text tells the option.
    """
    refusal = f"{name} must be numbers like 0.01,0.1, got {text!r}."
    try:
        parsed = tuple(float(part) for part in listed(text))
    except ValueError as error:
        raise InputError(refusal) from error
    if not parsed:
        raise InputError(refusal)
    return parsed


def rate(text: str) -> float | str:
    """A learning rate, or the word that stands for a way to choose one."""
    try:
        return float(text)
    except ValueError:
        return text
