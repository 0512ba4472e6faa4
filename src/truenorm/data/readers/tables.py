"""Tables: csv and parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from truenorm.data.datasets import refuse_non_finite
from truenorm.data.readers.examples import Array, Examples
from truenorm.errors import InputError


def read_table(
    path: Path, target: str | None, features: tuple[str, ...] | None, labels_needed: bool
) -> Examples:
    """Read a .csv or .parquet file; ``target`` names the label's column.

    Raises:
        InputError: it does not parse; the text tells the file, the place and the rule.
    """
    import pyarrow as arrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".csv":
            table = pyarrow.csv.read_csv(path)
        else:
            table = pyarrow.parquet.read_table(path)
    except (arrow.ArrowInvalid, arrow.ArrowKeyError, OSError) as error:
        raise InputError(f"{path}: does not parse: {error}; mend the file.") from error
    columns: list[str] = table.column_names
    twice = [c for i, c in enumerate(columns) if c in columns[:i]]
    if twice:
        raise InputError(f"{path}: has two columns named {twice[0]!r}; rename one.")
    if target is None and labels_needed:
        raise InputError(
            f"{path}: which column is the label? Say --target NAME with one of "
            f"{', '.join(columns)}."
        )
    if target is not None and target not in columns and labels_needed:
        raise InputError(
            f"{path}: has no column {target!r} for the label; choose one of {', '.join(columns)}."
        )
    wanted = features or tuple(c for c in columns if c != target)
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise InputError(
            f"{path}: lacks the column {missing[0]!r} that the model was trained on; "
            f"it has {', '.join(columns)}."
        )
    if not wanted:
        raise InputError(f"{path}: has no column beside the label {target!r}.")
    x = np.stack([_features(table.column(c), c, path) for c in wanted], axis=1)
    refuse_non_finite(torch.from_numpy(x), str(path), wanted)
    known = target is not None and target in columns
    y = _label_column(table.column(target), str(target), path) if known else None
    return Examples(x, y, str(path), wanted)


def _features(column: Any, name: str, path: Path) -> Array:
    from pyarrow import types

    if column.null_count:
        raise InputError(
            f"{path}: row {_first_null(column)} (counted from 0), column {name!r} is empty; "
            "every cell must hold a number. Fill it or drop the row."
        )
    if types.is_decimal(column.type):
        column = column.cast("float64")
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        first = column[0].as_py() if len(column) else None
        raise InputError(
            f"{path}: column {name!r} holds {kind}, such as {first!r}; features must be numbers. "
            "Encode the column as numbers, or remove it."
        )
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(np.float32)


def _label_column(column: Any, name: str, path: Path) -> Array:
    cells = column.to_pylist()
    missing = [i for i, value in enumerate(cells) if value is None or value == ""]
    if missing:
        raise InputError(
            f"{path}: row {missing[0]} (counted from 0), column {name!r}: the label is missing. "
            "Fill it or drop the row."
        )
    values = np.array(cells)
    return values if values.dtype.kind in "biufU" else values.astype(str)


def _first_null(column: Any) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
