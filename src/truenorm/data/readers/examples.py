"""What every reader returns: examples as they were read, and the parts of one source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Examples:
    """Examples as read, before they are checked: arrays, labels or None, column names or None."""

    x: Array
    y: Array | None
    name: str
    features: tuple[str, ...] | None = None
    order: tuple[Any, ...] | None = None  # all classes, where the source itself names them


class Source(NamedTuple):
    """What a source holds: its examples, and its own test and validation parts if it has any."""

    train: Examples
    test: Examples | None
    valid: Examples | None = None
