"""What every reader returns: examples as they were read, and the parts of one source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from truenorm.data.preparation import Column

Array = np.ndarray[Any, Any]


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
