"""IDX files, MNIST's own format, gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from truenorm.data.readers.examples import Array, Examples, Source
from truenorm.errors import InputError

_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
# MNIST's own names begin "train-" and "t10k-"; EMNIST's "emnist-letters-train-" and "...-test-".
_TEST_WORDS = ("t10k", "test")


def is_idx_name(name: str) -> bool:
    """Whether a file is named as IDX files are."""
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


def read_idx_folder(folder: Path, labels_needed: bool, name: str | None = None) -> Source:
    """Read a folder of IDX files: images and labels, for training and, if there, for the test.

    Raises:
        InputError: it does not parse; the text tells the file, the place and the rule.
    """
    files = sorted(p for p in folder.iterdir() if is_idx_name(p.name))
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
    found = [_idx_part(folder, parts, test, labels_needed, name) for test in (False, True)]
    train, test = found if found[0] is not None else (found[1], None)
    if train is None:
        raise InputError(
            f"{folder}: holds IDX files but none with 'images' in its name; expected names like "
            "train-images-idx3-ubyte.gz."
        )
    return Source(train, test)


def _idx_part(
    folder: Path,
    parts: dict[tuple[bool, str], Path],
    test: bool,
    labels_needed: bool,
    name: str | None,
) -> Examples | None:
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
        return Examples(x, None, name or str(images))
    y = read_idx(labels)
    if y.ndim != 1 or len(y) != len(x):
        raise InputError(
            f"{labels}: {y.shape} labels for {x.shape} images of {images.name}; needs one each."
        )
    return Examples(x, y, name or str(images))
