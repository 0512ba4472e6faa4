"""NumPy archives."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from truenorm.data.readers.examples import Array, Examples, Source
from truenorm.errors import InputError

_KEYS = (
    *(("x_train", "y_train"), ("X_train", "y_train"), ("x", "y"), ("X", "y")),
    *(("data", "target"), ("images", "labels"), ("train_images", "train_labels")),
)


def read_npz(path: Path, labels_needed: bool) -> Source:
    """Read an .npz archive by the names that its arrays have.

    Raises:
        InputError: it does not parse; the text tells the file, the place and the rule.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: _array(archive, key, path) for key in archive.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: is no readable .npz of plain arrays ({error}); write it with numpy.savez."
        ) from error
    for one in arrays:
        if other := [key for key in arrays if key != one and key.lower() == one.lower()]:
            raise InputError(
                f"{path}: holds both {one!r} and {other[0]!r}; which are meant? Leave one out."
            )
    for x, y in _KEYS:
        if x in arrays and (y in arrays or not labels_needed):
            test, valid = (_part(arrays, x, y, part, path) for part in ("test", "val"))
            return Source(Examples(arrays[x], arrays.get(y), str(path)), test, valid)
    return Source(_by_shape(arrays, path, labels_needed), None)


def _array(archive: Any, key: str, path: Path) -> Array:
    try:
        array: Array = archive[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(
            f"{path}: the array {key!r} holds Python objects, which only code can read; save it "
            "as numbers or text, such as y.astype(str)."
        ) from error
    return array


def _by_shape(arrays: dict[str, Array], path: Path, labels_needed: bool) -> Examples:
    """Examples and labels under other names, where their shapes leave no doubt."""
    many = [k for k, a in arrays.items() if a.ndim in (2, 3, 4) and a.shape[1:] != (1,)]
    flat = [k for k, a in arrays.items() if a.ndim == 1 or a.shape[1:] == (1,)]
    if len(many) == 1 and len(flat) == 1 and len(arrays[many[0]]) == len(arrays[flat[0]]):
        note = f"{path}: examples are taken from {many[0]!r}, labels from {flat[0]!r}"
        return Examples(arrays[many[0]], arrays[flat[0]], str(path), notes=(note,))
    if len(many) == 1 and not flat and not labels_needed:
        return Examples(arrays[many[0]], None, str(path))
    pairs = ", ".join(f"{x}/{y}" for x, y in _KEYS)
    held = ", ".join(f"{k} {a.shape}" for k, a in arrays.items())
    raise InputError(
        f"{path}: needs examples and labels under one of the names {pairs}, got "
        f"{held or 'no arrays'}; rename them."
    )


def _part(arrays: dict[str, Array], x: str, y: str, part: str, path: Path) -> Examples | None:
    x, y = x.replace("train", part), y.replace("train", part)
    wanted = x.endswith(part) or x.startswith(part)
    return Examples(arrays[x], arrays[y], str(path)) if wanted and {x, y} <= arrays.keys() else None
