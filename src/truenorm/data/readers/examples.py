"""What every reader takes and returns: how to read, examples as read, the parts of one source."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from truenorm.data.preparation import Column
from truenorm.errors import InputError, choose

Array = np.ndarray[Any, Any]
MISSING = ("fill", "refuse")


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read, where there is a choice.

    Raises:
        InputError: a value lies outside its range.
    """

    image_size: int | None = _option(
        None,
        "Read images at this height and width: the short side is resized, the centre cropped. "
        "By default as they are, or, where sizes differ, as told.",
    )
    skip_unreadable: bool = _option(False, "Leave out image files that cannot be read.")
    id: str | None = _option(None, "The column of a table that names each row; no feature.")
    missing: str = _option(
        "fill", "Empty cells of a table: fill (median and an indicator), or refuse."
    )
    encoding: str | None = _option(None, "Of a text file, like gb18030; by default found.")

    def __post_init__(self) -> None:
        choose("missing", self.missing, MISSING)
        size = self.image_size
        if size is not None and not (type(size) is int and 1 <= size <= 4096):
            raise InputError(f"image_size must be an integer from 1 to 4096, got {size!r}.")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError as error:
                raise InputError(
                    f"encoding {self.encoding!r} is not known; say one like utf-8, gb18030, "
                    "utf-16 or cp1252."
                ) from error

    def to_json(self) -> dict[str, Any]:
        """The choices that differ from the defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }


@dataclass(frozen=True)
class Examples:
    """Examples as read, before they are checked.

    Attributes:
        x: numbers; of a table with ``columns`` (N, F) float32, NaN where a cell is empty and
            the place in a column's categories where it holds text.
        y: labels, or None.
        name: where they came from.
        features: column names, or None.
        order: all classes, where the source itself names them.
        ids: (N,) what each example is called, or None.
        columns: what each column of a table holds, or None.
        left_out: names of a table's columns that are not used, with the reasons.
        notes: what the user should know of the reading.
    """

    x: Array
    y: Array | None
    name: str
    features: tuple[str, ...] | None = None
    order: tuple[Any, ...] | None = None
    ids: Array | None = None
    columns: tuple[Column, ...] | None = None
    notes: tuple[str, ...] = ()
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


class Source(NamedTuple):
    """What a source holds: its examples, and its own test and validation parts if it has any."""

    train: Examples
    test: Examples | None
    valid: Examples | None = None
