"""What every reader returns: arrays, a part of the data, and the parts of one source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pool:
    """Examples as read, before they are checked: arrays, labels or None, column names or None."""

    x: Array
    y: Array | None
    name: str
    features: tuple[str, ...] | None = None
    order: tuple[Any, ...] | None = None  # all classes, where the source itself names them


class Source(NamedTuple):
    """What a source holds: its examples, and its own test and validation parts if it has any."""

    train: Pool
    test: Pool | None
    valid: Pool | None = None
