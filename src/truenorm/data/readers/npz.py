"""NumPy archives."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

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
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: is no readable .npz of plain arrays ({error}); write it with numpy.savez."
        ) from error
    for x, y in _KEYS:
        if x in arrays and (y in arrays or not labels_needed):
            test, valid = (_part(arrays, x, y, part, path) for part in ("test", "val"))
            return Source(Examples(arrays[x], arrays.get(y), str(path)), test, valid)
    pairs = ", ".join(f"{x}/{y}" for x, y in _KEYS)
    raise InputError(
        f"{path}: needs examples and labels under one of the names {pairs}, got "
        f"{', '.join(arrays) or 'no arrays'}; rename them."
    )


def _part(arrays: dict[str, Array], x: str, y: str, part: str, path: Path) -> Examples | None:
    x, y = x.replace("train", part), y.replace("train", part)
    wanted = x.endswith(part) or x.startswith(part)
    return Examples(arrays[x], arrays[y], str(path)) if wanted and {x, y} <= arrays.keys() else None
