"""Names and files -> data sets: embedded sets, IDX, image folders, npz, CSV and Parquet.

Each reader returns a training :class:`Pool` and, where the source brings one, a test pool.
What does not parse raises InputError with the file, the place, the rule and the next step.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from truenorm.data.datasets import (
    Dataset,
    Scaling,
    Splits,
    dataset,
    examples,
    refuse_non_finite,
    split,
)
from truenorm.errors import InputError

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


@dataclass(frozen=True)
class Uncut:
    """Checked, labelled data that many seeds can cut; parts it brings itself stay as they are.

    ``scaling`` is None for the one that each cut's training part suggests.
    """

    train: Dataset
    test: Dataset | None = None
    valid: Dataset | None = None
    scaling: Scaling | None = None

    def cut(self, seed: int, *, valid: float = 0.2, test: float = 0.2) -> Splits:
        """Training, validation and test parts by the permutation of ``seed``."""
        if self.valid is not None:
            return Splits(self.train, self.valid, self.test, self.scaling)  # type: ignore[arg-type]
        return split(
            self.train, test=test if self.test is None else self.test, valid=valid, seed=seed
        )

    def fingerprint(self) -> str:
        """One digest over all parts: equal data, equal fingerprint."""
        parts = (self.train, self.test, self.valid)
        digests = [None if p is None else p.fingerprint() for p in parts]
        scaling = None if self.scaling is None else self.scaling.to_json()
        return hashlib.sha256(repr((digests, scaling)).encode()).hexdigest()


def uncut(source: Any, *, target: str | None = None) -> Uncut:
    """Load a data source as :func:`load` does, without cutting it.

    Raises:
        InputError: nothing such exists, or it does not parse.
    """
    if isinstance(source, tuple):
        return Uncut(dataset(*source))
    found = read(source, target=target)
    labelled = _labelled(found.train, found.train.order)
    held = None if found.test is None else _labelled(found.test, labelled.classes)
    valid = None if found.valid is None else _labelled(found.valid, labelled.classes)
    return Uncut(labelled, held, valid)


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
    pool = found.train if found.test is None else found.test
    return examples(pool.x, pool.name), pool.y


def _labelled(pool: Pool, classes: tuple[Any, ...] | None) -> Dataset:
    assert pool.y is not None, "readers give labels unless told that none are needed"
    return dataset(pool.x, pool.y, classes=classes, features=pool.features, name=pool.name)


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
        if any(_is_idx_name(p.name) for p in path.iterdir()):
            return _read_idx_folder(path, labels_needed)
        return _read_image_folder(path, labels_needed, grey)
    if path.suffix == ".npz":
        return _read_npz(path, labels_needed)
    if path.suffix in (".csv", ".parquet"):
        return Source(_read_table(path, target, features, labels_needed), None)
    raise InputError(
        f"{path}: cannot tell what this is from {path.suffix or 'a name without an ending'!r}; "
        "give a .npz, .csv or .parquet file, a folder of IDX files or a folder of images per class."
    )


# Embedded ------------------------------------------------------------------------------------


def _read_mnist() -> Source:
    with importlib.resources.as_file(importlib.resources.files("truenorm") / "mnist") as folder:
        return _read_idx_folder(folder, labels_needed=True, name="mnist")


def _from_sklearn(name: str) -> Callable[[], Source]:
    def read_it() -> Source:
        import sklearn.datasets

        bunch = getattr(sklearn.datasets, f"load_{name}")()
        if name == "digits":
            return Source(Pool(bunch.images.astype(np.float32), bunch.target, name), None)
        features = tuple(str(f) for f in bunch.feature_names)
        labels = np.asarray(bunch.target_names)[bunch.target]
        return Source(Pool(bunch.data.astype(np.float32), labels, name, features), None)

    return read_it


EMBEDDED: dict[str, Callable[[], Source]] = {
    "mnist": _read_mnist,
    **{name: _from_sklearn(name) for name in ("digits", "breast_cancer", "wine", "iris")},
}


# IDX -----------------------------------------------------------------------------------------

_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
# MNIST's own names begin "train-" and "t10k-"; EMNIST's "emnist-letters-train-" and "...-test-".
_TEST_WORDS = ("t10k", "test")


def _is_idx_name(name: str) -> bool:
    return "-idx" in name.removesuffix(".gz") or ".idx" in name.removesuffix(".gz")


def read_idx(path: Path) -> Array:
    """Read one IDX file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises:
        InputError: not gzip though named so, wrong magic, or fewer or more bytes than the
            header promises.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(
                f"{path}: the gzip stream is cut short or damaged ({error}); fetch it again."
            ) from error
    elif path.suffix == ".gz":
        raise InputError(f"{path}: is named .gz but is not gzip; unpack or rename it.")
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or raw[3] == 0:
        raise InputError(
            f"{path}: the IDX magic at byte 0 must be 00 00, a type of "
            f"{', '.join(f'{k:02x}' for k in _IDX_TYPES)}, and a number of axes, got "
            f"{raw[:4].hex(' ') or 'an empty file'}; this is no IDX file."
        )
    axes = raw[3]
    header = 4 + 4 * axes
    if len(raw) < header:
        raise InputError(f"{path}: ends inside its header, at byte {len(raw)} of {header}.")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    kind = np.dtype(_IDX_TYPES[raw[2]])
    promised = header + math.prod(shape) * kind.itemsize
    if len(raw) != promised:
        raise InputError(
            f"{path}: the header promises shape {shape}, so {promised} bytes, got {len(raw)}; "
            "the file is truncated or damaged: fetch it again."
        )
    return np.frombuffer(raw, kind, offset=header).reshape(shape)


def _read_idx_folder(folder: Path, labels_needed: bool, name: str | None = None) -> Source:
    files = sorted(p for p in folder.iterdir() if _is_idx_name(p.name))
    parts: dict[tuple[bool, str], Path] = {}
    for path in files:
        kind = "images" if "images" in path.name else "labels" if "labels" in path.name else None
        if kind is None:
            continue
        key = (any(word in path.name for word in _TEST_WORDS), kind)
        if key in parts and parts[key].name.removesuffix(".gz") != path.name.removesuffix(".gz"):
            raise InputError(
                f"{folder}: both {parts[key].name} and {path.name} could be the {kind}; "
                "leave one data set in the folder."
            )
        parts[key] = path
    pools = [_idx_pool(folder, parts, test, labels_needed, name) for test in (False, True)]
    train, test = pools if pools[0] is not None else (pools[1], None)
    if train is None:
        raise InputError(
            f"{folder}: holds IDX files but none with 'images' in its name; expected names like "
            "train-images-idx3-ubyte.gz."
        )
    return Source(train, test)


def _idx_pool(
    folder: Path,
    parts: dict[tuple[bool, str], Path],
    test: bool,
    labels_needed: bool,
    name: str | None,
) -> Pool | None:
    images, labels = parts.get((test, "images")), parts.get((test, "labels"))
    if images is None:
        return None
    x = read_idx(images)
    if labels is None:
        if labels_needed:
            raise InputError(
                f"{images}: no labels beside it; expected a file like "
                f"{images.name.replace('images', 'labels').replace('idx3', 'idx1')}."
            )
        return Pool(x, None, name or str(images))
    y = read_idx(labels)
    if y.ndim != 1 or len(y) != len(x):
        raise InputError(
            f"{labels}: {y.shape} labels for {x.shape} images of {images.name}; needs one each."
        )
    return Pool(x, y, name or str(images))


# Images --------------------------------------------------------------------------------------

_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "valid": ("val", "valid", "validation"),
}
# Modes of 8 bits a channel: what Pillow turns into grey or RGB without loss of range.
_GREY_MODES, _COLOUR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")


def _read_image_folder(folder: Path, labels_needed: bool, grey: bool | None) -> Source:
    below = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    parts = {
        part: next((below[n] for n in names if n in below), None) for part, names in _PARTS.items()
    }
    if parts["train"] is None:
        return Source(_image_pool(folder, labels_needed, grey), None)
    train = _image_pool(parts["train"], labels_needed, grey)
    test, valid = (
        None if path is None else _image_pool(path, labels_needed, grey=train.x.ndim == 3)
        for path in (parts["test"], parts["valid"])
    )
    return Source(train, test, valid)


def _image_pool(folder: Path, labels_needed: bool, grey: bool | None) -> Pool:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(f, c.name) for c in classes for f in _images_in(c)]
    if not files and not labels_needed:
        files = [(f, "") for f in _images_in(folder)]
    if not files:
        raise InputError(
            f"{folder}: no images found; expected one folder per class, with files ending in "
            f"{', '.join(sorted(_IMAGE_ENDINGS))}."
        )
    x = _decode([f for f, _ in files], grey)
    names = tuple(c.name for c in classes if any(_images_in(c)))
    labels = np.array([c for _, c in files]) if names else None
    return Pool(x, labels, str(folder), order=names or None)


def _images_in(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in _IMAGE_ENDINGS]


def _decode(files: list[Path], grey: bool | None) -> Array:
    """Decode into one (N, H, W) or (N, 3, H, W) byte array; grey if every image is."""
    from PIL import Image, UnidentifiedImageError

    decoded: list[Array] = []
    size: tuple[int, int] | None = None
    for path in files:
        try:
            with Image.open(path) as file:
                image: Image.Image = file
                if size is not None and image.size != size:
                    raise InputError(
                        f"{path}: is {image.size[0]} x {image.size[1]} pixels, {files[0]} is "
                        f"{size[0]} x {size[1]}; all images must have one size: resize them."
                    )
                size = image.size
                if image.mode not in _GREY_MODES + _COLOUR_MODES:
                    raise InputError(
                        f"{path}: has pixels of mode {image.mode}, which do not fit in bytes; "
                        "convert it to 8-bit grey or RGB."
                    )
                if image.mode not in ("L", "RGB"):
                    image = image.convert("L" if image.mode in _GREY_MODES else "RGB")
                decoded.append(np.asarray(image))
        except InputError:
            raise
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path}: is no readable image ({error}); remove it.") from error
    if grey if grey is not None else all(a.ndim == 2 for a in decoded):
        return np.stack([a if a.ndim == 2 else _luma(a) for a in decoded])
    colour = [a if a.ndim == 3 else np.repeat(a[..., None], 3, 2) for a in decoded]
    return np.stack(colour).transpose(0, 3, 1, 2)


def _luma(image: Array) -> Array:
    """ITU-R 601 grey of an RGB image, as Pillow converts it."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L"))


# npz -----------------------------------------------------------------------------------------

_NPZ_KEYS = (("x_train", "y_train"), ("X_train", "y_train"), ("x", "y"), ("X", "y"))
_NPZ_KEYS_MORE = (("data", "target"), ("images", "labels"), ("train_images", "train_labels"))


def _read_npz(path: Path, labels_needed: bool) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: is no readable .npz of plain arrays ({error}); write it with numpy.savez."
        ) from error
    for x, y in _NPZ_KEYS + _NPZ_KEYS_MORE:
        if x in arrays and (y in arrays or not labels_needed):
            test, valid = (_npz_part(arrays, x, y, part, path) for part in ("test", "val"))
            return Source(Pool(arrays[x], arrays.get(y), str(path)), test, valid)
    pairs = ", ".join(f"{x}/{y}" for x, y in _NPZ_KEYS + _NPZ_KEYS_MORE)
    raise InputError(
        f"{path}: needs examples and labels under one of the names {pairs}, got "
        f"{', '.join(arrays) or 'no arrays'}; rename them."
    )


def _npz_part(arrays: dict[str, Array], x: str, y: str, part: str, path: Path) -> Pool | None:
    x, y = x.replace("train", part), y.replace("train", part)
    wanted = x.endswith(part) or x.startswith(part)
    return Pool(arrays[x], arrays[y], str(path)) if wanted and {x, y} <= arrays.keys() else None


# Tables --------------------------------------------------------------------------------------


def _read_table(
    path: Path, target: str | None, features: tuple[str, ...] | None, labels_needed: bool
) -> Pool:
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
    x = np.stack([_numbers(table.column(c), c, path) for c in wanted], axis=1)
    refuse_non_finite(torch.from_numpy(x), str(path), wanted)
    known = target is not None and target in columns
    y = _label_column(table.column(target), str(target), path) if known else None
    return Pool(x, y, str(path), wanted)


def _numbers(column: Any, name: str, path: Path) -> Array:
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
