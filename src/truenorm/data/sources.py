"""Names and files -> data sets: embedded sets, IDX, image folders, npz, CSV and Parquet.

Each reader returns training :class:`Examples` and, where the source brings them, others for
test and validation.
What does not parse raises InputError with the file, the place, the rule and the next step.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from truenorm.data.datasets import (
    Dataset,
    Splits,
    Uncut,
    dataset,
    examples,
)
from truenorm.data.readers.examples import Array, Examples, Source
from truenorm.data.readers.idx import is_idx_name, read_idx_folder
from truenorm.data.readers.images import read_image_folder
from truenorm.data.readers.npz import read_npz
from truenorm.data.readers.tables import read_table
from truenorm.errors import InputError


def load(
    source: Any, *, target: str | None = None, seed: int = 0, valid: float = 0.2, test: float = 0.2
) -> Splits:
    """Load a data source and cut it into training, validation and test parts.

    Args:
        source: ``mnist``, ``digits``, ``breast_cancer``, ``wine`` or ``iris`` (embedded); a
            folder of IDX files (gzipped or not); a folder of images per class; a ``.npz``,
            ``.csv`` or ``.parquet`` file; or, from Python, a pair (x, y) of arrays or tensors.
        target: the label's column, for ``.csv`` and ``.parquet``.
        seed: of the permutation that cuts the parts.
        valid: the share of the training examples held out for validation.
        test: the share held out for the final test where the source has no test set itself.
            A source that brings a validation part but no test part is used as it is, untested.

    Raises:
        InputError: nothing such exists, or it does not parse.
    """
    return uncut(source, target=target).cut(seed, valid=valid, test=test)


def uncut(source: Any, *, target: str | None = None) -> Uncut:
    """Load a data source as :func:`load` does, without cutting it.

    Raises:
        InputError: nothing such exists, or it does not parse.
    """
    if isinstance(source, tuple):
        return Uncut(dataset(*source))
    found = read(source, target=target)
    labelled = _labelled(found.train, found.train.order)
    test = None if found.test is None else _labelled(found.test, labelled.classes)
    valid = None if found.valid is None else _labelled(found.valid, labelled.classes)
    return Uncut(labelled, test, valid)


def load_for_prediction(
    source: Any,
    *,
    features: tuple[str, ...] | None,
    target: str | None,
    grey: bool | None = None,
) -> tuple[torch.Tensor, Array | None]:
    """Load what a trained model is to judge: examples, and their labels if they are known.

    A source that brings its own test set gives that; any other gives all its examples.
    ``features`` are the columns the model was trained on; they are taken by name. ``grey``
    says whether images of a folder become grey or colour; by default as most files need.

    Raises:
        InputError: nothing such exists, it does not parse, or a column is missing.
    """
    found = read(source, target=target, features=features, labels_needed=False, grey=grey)
    part = found.train if found.test is None else found.test
    return examples(part.x, part.name), part.y


def _labelled(part: Examples, classes: tuple[Any, ...] | None) -> Dataset:
    assert part.y is not None, "readers give labels unless told that none are needed"
    return dataset(part.x, part.y, classes=classes, features=part.features, name=part.name)


def read(
    source: Any,
    *,
    target: str | None = None,
    features: tuple[str, ...] | None = None,
    labels_needed: bool = True,
    grey: bool | None = None,
) -> Source:
    """Find the reader of ``source`` by its name or by what lies at its path, and read it.

    Raises:
        InputError: nothing such exists, or it does not parse.
    """
    if str(source) in EMBEDDED:
        return EMBEDDED[str(source)]()
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"data {str(source)!r} is neither a file or folder nor an embedded data set "
            f"({', '.join(EMBEDDED)}); correct the path."
        )
    if path.is_dir():
        if any(is_idx_name(p.name) for p in path.iterdir()):
            return read_idx_folder(path, labels_needed)
        return read_image_folder(path, labels_needed, grey)
    if path.suffix == ".npz":
        return read_npz(path, labels_needed)
    if path.suffix in (".csv", ".parquet"):
        return Source(read_table(path, target, features, labels_needed), None)
    raise InputError(
        f"{path}: cannot tell what this is from {path.suffix or 'a name without an ending'!r}; "
        "give a .npz, .csv or .parquet file, a folder of IDX files or a folder of images per class."
    )


def _read_mnist() -> Source:
    with importlib.resources.as_file(importlib.resources.files("truenorm") / "mnist") as folder:
        return read_idx_folder(folder, labels_needed=True, name="mnist")


def _from_sklearn(name: str) -> Callable[[], Source]:
    def read_it() -> Source:
        import sklearn.datasets

        bunch = getattr(sklearn.datasets, f"load_{name}")()
        if name == "digits":
            return Source(Examples(bunch.images.astype(np.float32), bunch.target, name), None)
        features = tuple(str(f) for f in bunch.feature_names)
        labels = np.asarray(bunch.target_names)[bunch.target]
        return Source(Examples(bunch.data.astype(np.float32), labels, name, features), None)

    return read_it


EMBEDDED: dict[str, Callable[[], Source]] = {
    "mnist": _read_mnist,
    **{name: _from_sklearn(name) for name in ("digits", "breast_cancer", "wine", "iris")},
}
