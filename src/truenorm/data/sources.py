"""Names, files and what Python hands over -> data sets.

Each reader returns training :class:`Examples` and, where the source brings them, others for
test and validation.
What does not parse raises InputError with the file, the place, the rule and the next step.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from truenorm.data.datasets import (
    Dataset,
    Splits,
    Uncut,
    dataset,
    examples,
    prepared,
)
from truenorm.data.preparation import Preparation
from truenorm.data.readers.examples import Array, Examples, Source
from truenorm.data.readers.handed import handed
from truenorm.data.readers.idx import is_idx_name, read_idx_folder
from truenorm.data.readers.images import read_image_files, read_image_folder
from truenorm.data.readers.npz import read_npz
from truenorm.data.readers.pictures import is_image_name
from truenorm.data.readers.tables import TEXT_ENDINGS, Asked, is_table_name, read_table
from truenorm.data.reading import Reading
from truenorm.errors import InputError

# Fields of Reading that change how data of a kind are read.
_CONCERNS = {
    "text tables": {"id", "missing", "encoding"},
    "tables": {"id", "missing"},
    "images": {"image_size", "skip_unreadable"},
    "arrays": set[str](),
}


class Unlabelled(NamedTuple):
    """What a trained model is to judge."""

    x: torch.Tensor  # (N, ...) as the model takes it before scaling
    labels: Array | None  # (N,) where they are known
    ids: Array | None  # (N,) what each is called
    notes: tuple[str, ...]


def load(
    source: Any,
    *,
    target: str | None = None,
    seed: int = 0,
    valid: float = 0.2,
    test: float = 0.2,
    **reading: Any,
) -> Splits:
    """Load a data source and cut it into training, validation and test parts.

    Args:
        source: ``mnist``, ``digits``, ``breast_cancer``, ``wine`` or ``iris`` (embedded); a
            folder of IDX files (gzipped or not); a folder of images per class; a ``.npz``,
            ``.csv``, ``.tsv`` (gzipped or not) or ``.parquet`` file; or, from Python, a pair
            (x, y) of arrays or tensors, a torch data set or loader of such pairs, or a data
            frame.
        target: the label's column, for tables.
        seed: of the permutation that cuts the parts.
        valid: the share of the training examples held out for validation.
        test: the share held out for the final test where the source has no test set itself.
            A source that brings a validation part but no test part is used as it is, untested.
        reading: fields of :class:`truenorm.data.reading.Reading`: ``image_size`` and
            ``skip_unreadable`` for images; ``id``, ``missing`` and ``encoding`` for tables.

    Raises:
        InputError: nothing such exists, or it does not parse.
    """
    return uncut(source, target=target, reading=reading_of(reading)).cut(
        seed, valid=valid, test=test
    )


def reading_of(fields: dict[str, Any]) -> Reading:
    """The Reading with these fields.

    Raises:
        InputError: there is no such field, or a value lies outside its range.
    """
    known = [f.name for f in dataclasses.fields(Reading)]
    for name in fields:
        if name not in known:
            raise InputError(f"load has no argument {name!r}; choose from {', '.join(known)}.")
    return Reading(**fields)


def uncut(
    source: Any,
    *,
    target: str | None = None,
    reading: Reading | None = None,
    preparation: Preparation | None = None,
    image: tuple[int, ...] | None = None,
) -> Uncut:
    """Load a data source as :func:`load` does, without cutting it.

    ``preparation`` and ``image``, (C, H, W), are those of a model, to which the data are brought;
    by default they are what suits the data.

    Raises:
        InputError: nothing such exists, or it does not parse.
    """
    reading = reading or Reading()
    if not isinstance(source, str | Path):
        found = handed(source, target, reading)
        _refuse_ignored(reading, "tables" if found.columns else "arrays", found.name)
        return Uncut(_labelled(found, None), notes=found.notes)
    parts = read(source, Asked(target, preparation), reading, image)
    labelled = _labelled(parts.train, parts.train.order)
    test = None if parts.test is None else _labelled(parts.test, labelled.classes)
    valid = None if parts.valid is None else _labelled(parts.valid, labelled.classes)
    if preparation is not None:
        labelled = prepared(labelled, preparation)
    notes = [n for part in parts if part is not None for n in part.notes]
    return Uncut(labelled, test, valid, notes=tuple(dict.fromkeys(notes)))


def load_for_prediction(
    source: Any,
    *,
    features: tuple[str, ...] | None,
    preparation: Preparation | None,
    target: str | None,
    label: str | None,
    image: tuple[int, ...] | None,
    reading: Reading | None = None,
) -> Unlabelled:
    """Load what a trained model is to judge: examples, and their labels if they are known.

    A source that brings its own test set gives that; any other gives all its examples. One image
    or a list of image files will do where the model was trained on images.

    Args:
        source: as for :func:`load`.
        features: the columns the model was trained on; they are taken by name.
        preparation: what the model's training made of a table's columns.
        target: the label's column as the user named it; it must be there.
        label: the label's column in training; it may be there.
        image: (C, H, W) of the images that the model was trained on.
        reading: how.

    Raises:
        InputError: nothing such exists, it does not parse, or a column is missing.
    """
    old = features if preparation is None else None
    asked = Asked(target or label, preparation, old, False, target is not None)
    found = read(source, asked, reading or Reading(), image=image)
    part = found.train if found.test is None else found.test
    x = part.x
    if preparation is not None and part.columns is not None:
        x = preparation.apply(x, part.columns)
    return Unlabelled(examples(x, part.name), part.y, part.ids, part.notes)


def _labelled(part: Examples, classes: tuple[Any, ...] | None) -> Dataset:
    if part.y is None:
        raise InputError(f"{part.name}: has no labels to learn from; give them.")
    held = dataset(
        part.x,
        part.y,
        classes=classes,
        features=part.features,
        name=part.name,
        ids=part.ids,
        columns=part.columns,
    )
    return dataclasses.replace(held, left_out=part.left_out)


def read(
    source: Any, asked: Asked, reading: Reading, image: tuple[int, ...] | None = None
) -> Source:
    """Find the reader of ``source`` by its name or by what lies at its path, and read it.

    Raises:
        InputError: nothing such exists, it does not parse, or a column is asked of what is no
            table.
    """
    if isinstance(source, list | tuple):
        return read_image_files([Path(p) for p in source], image, reading)
    name, path = str(source), Path(source)
    if name not in EMBEDDED and not path.exists():
        raise InputError(
            f"data {name!r} is neither a file or folder nor an embedded data set "
            f"({', '.join(EMBEDDED)}); correct the path."
        )
    if name not in EMBEDDED and path.is_file() and is_table_name(path.name):
        as_text = path.name.lower().endswith(TEXT_ENDINGS)
        _refuse_ignored(reading, "text tables" if as_text else "tables", name)
        return Source(read_table(path, asked, reading), None)
    named = asked.target if asked.label_known else None
    for option, value in (("target", named), ("id", reading.id)):
        if value is not None:
            raise InputError(
                f"{name}: is no table, so it has no column {value!r}; leave --{option} out."
            )
    if name in EMBEDDED:
        _refuse_ignored(reading, "arrays", name)
        return EMBEDDED[name]()
    return _of_path(path, asked.labels_needed, reading, image)


def _of_path(
    path: Path, labels_needed: bool, reading: Reading, image: tuple[int, ...] | None
) -> Source:
    """What lies at a path and is no table."""
    if path.is_dir():
        if any(is_idx_name(p.name) for p in path.iterdir()):
            _refuse_ignored(reading, "arrays", str(path))
            return read_idx_folder(path, labels_needed)
        _refuse_ignored(reading, "images", str(path))
        return read_image_folder(path, labels_needed, image, reading)
    if path.suffix.lower() == ".npz":
        _refuse_ignored(reading, "arrays", str(path))
        return read_npz(path, labels_needed)
    if is_image_name(path.name):
        if labels_needed:
            raise InputError(f"{path}: is one image; give a folder of images for each class.")
        _refuse_ignored(reading, "images", str(path))
        return read_image_files([path], image, reading)
    raise InputError(
        f"{path}: cannot tell what this is from {path.suffix or 'a name without an ending'!r}; "
        f"give a .npz, {', '.join(TEXT_ENDINGS)} or .parquet file, a folder of IDX files or a "
        "folder of images per class."
    )


def _refuse_ignored(reading: Reading, kind: str, name: str) -> None:
    """Refuse a choice that does not concern this kind of data."""
    for option in reading.to_json():
        if option not in _CONCERNS[kind]:
            raise InputError(
                f"{name}: {option} has no meaning for {kind}; leave "
                f"--{option.replace('_', '-')} out."
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
