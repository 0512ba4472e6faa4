"""Images: a folder of them per class, or files, read upright and at one size."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from truenorm.data.readers.examples import Array, Examples, Source
from truenorm.data.reading import Reading
from truenorm.errors import InputError, one_line

_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"),
)
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "valid": ("val", "valid", "validation"),
}
# Modes of 8 bits a channel: what Pillow turns into grey or RGB without loss of range.
_GREY_MODES, _COLOUR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # grey of 16 bits, which is scaled to 8
_LARGEST = 512 * 512  # pixels of an image that is read as it is
_USUAL = 128  # the largest size chosen here: on two cores a ResNet's epoch of 1,000 takes a minute
_ORIENTATION, _TURNED = 0x0112, 5  # the EXIF tag, and the first value that swaps the sides
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, OverflowError, IndexError)


class _Seen(NamedTuple):
    """What an image's header says: width and height as it is looked at, and what is special."""

    size: tuple[int, int]
    grey: bool
    deep: bool = False
    several: bool = False


class _Unreadable(Exception):
    """An image that cannot be read, with the reason."""


def is_image_name(name: str) -> bool:
    """Whether a file so named is taken for an image."""
    return name.lower().endswith(_ENDINGS) and not name.startswith(".")


def read_image_folder(
    folder: Path, labels_needed: bool, image: tuple[int, ...] | None, reading: Reading
) -> Source:
    """Read a folder with a folder of images for each class, in parts or not.

    Args:
        folder: where they lie.
        labels_needed: whether images that lie in no class folder are refused.
        image: (C, H, W) that they must become; by default what suits them.
        reading: the size in place of what suits, and whether to leave out what is unreadable.

    Raises:
        InputError: it does not parse; the text tells the files, the place and the rule.
    """
    below = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    parts = {
        part: next((below[n] for n in names if n in below), None) for part, names in _PARTS.items()
    }
    if parts["train"] is None:
        return Source(_part(folder, folder, labels_needed, image, reading), None)
    train = _part(parts["train"], folder, labels_needed, image, reading)
    shape = train.x.shape[1:] if train.x.ndim == 4 else (1, *train.x.shape[1:])
    test, valid = (
        None if path is None else _part(path, folder, labels_needed, shape, reading)
        for path in (parts["test"], parts["valid"])
    )
    return Source(train, test, valid)


def read_image_files(files: list[Path], image: tuple[int, ...] | None, reading: Reading) -> Source:
    """Read image files, which have no labels, in their order.

    Raises:
        InputError: one is missing or cannot be read, or the model takes no images.
    """
    if image is None:
        raise InputError(f"{files[0] if files else 'data'}: is an image; the model takes none.")
    for path in files:
        if not path.exists():
            raise InputError(f"{path}: is not there; correct the path.")
        if not is_image_name(path.name):
            raise InputError(
                f"{path}: of several files each must be an image, ending in one of "
                f"{', '.join(_ENDINGS)}."
            )
    read, notes, kept = _read(files, str(files[0].parent), image, reading)
    names = np.array([str(files[i]) for i in kept])
    return Source(Examples(read, None, "images", ids=names, notes=notes), None)


def _part(
    folder: Path, root: Path, labels_needed: bool, image: tuple[int, ...] | None, reading: Reading
) -> Examples:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    labelled = [(f, c.name) for c in classes for f in _images_in(c)]
    if not labelled and not labels_needed:
        labelled = [(f, "") for f in _images_in(folder)]
    if not labelled:
        raise InputError(
            f"{folder}: no images found; expected one folder per class, with files ending in "
            f"{', '.join(_ENDINGS)}."
        )
    files = [f for f, _ in labelled]
    x, notes, kept = _read(files, str(folder), image, reading)
    names = tuple(c.name for c in classes if any(_images_in(c)))
    left = {labelled[i][1] for i in kept}
    if names and (gone := [n for n in names if n not in left]):
        raise InputError(
            f"{folder / gone[0]}: none of its images can be read; mend them, or remove the folder."
        )
    labels = np.array([labelled[i][1] for i in kept]) if names else None
    ids = np.array([files[i].relative_to(root).as_posix() for i in kept])
    return Examples(x, labels, str(folder), order=names or None, ids=ids, notes=notes)


def _images_in(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if is_image_name(p.name) and not p.is_dir()]


# -- reading --------------------------------------------------------------------------------------


def _read(
    files: list[Path], where: str, image: tuple[int, ...] | None, reading: Reading
) -> tuple[Array, tuple[str, ...], list[int]]:
    """(N, H, W) or (N, 3, H, W) bytes, what to tell, and which of ``files`` they are of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on large images and odd metadata
        seen = _each(_look, files)
        good = [s for s in seen if isinstance(s, _Seen)]
        grey = image[0] == 1 if image is not None else all(s.grey for s in good)
        size, told = _size([s.size for s in good], where, image, reading)
        found: list[Any] = _each(
            lambda i: (
                seen[i] if isinstance(seen[i], _Unreadable) else _decode(files[i], size, grey)
            ),
            list(range(len(files))),
        )
    broken = [(f, x) for f, x in zip(files, found, strict=True) if isinstance(x, _Unreadable)]
    kept = [i for i, x in enumerate(found) if not isinstance(x, _Unreadable)]
    skipped = _skipped(broken, len(files), where, reading) if broken else ()
    notes = (*told, *skipped, *_specials(good, where))
    if not kept:
        raise InputError(f"{where}: none of {len(files)} images can be read; mend them.")
    x = np.stack([found[i] for i in kept])
    return (x if grey else x.transpose(0, 3, 1, 2)), notes, kept


def _each(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """``work`` of each item in order, or the _Unreadable that it raised; Pillow uses all cores."""

    def safely(item: Any) -> Any:
        try:
            return work(item)
        except _Unreadable as error:
            return error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(safely, items))


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _Unreadable(one_line(error).replace(f" {str(path)!r}", "")) from error


def _look(path: Path) -> _Seen:
    with _opened(path) as image:
        mode = image.mode
        if mode not in (*_GREY_MODES, *_COLOUR_MODES, *_DEEP_MODES):
            raise _Unreadable(
                f"pixels of mode {mode} do not fit in bytes; convert it to 8-bit grey or RGB"
            )
        try:
            turned = image.getexif().get(_ORIENTATION, 1) >= _TURNED
            several = bool(getattr(image, "is_animated", False))
        except (*_BROKEN, TypeError):
            turned = several = False  # metadata that do not parse; the pixels may
        size = image.size[::-1] if turned else image.size
        deep = mode in _DEEP_MODES
        return _Seen(size, deep or mode in _GREY_MODES, deep, several)


def _size(
    sizes: list[tuple[int, int]], where: str, image: tuple[int, ...] | None, reading: Reading
) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """Width and height to read at, None for those that the images have, and what to tell."""
    if image is not None:
        return (image[2], image[1]), ()
    if reading.image_size is not None:
        return (reading.image_size,) * 2, ()
    kinds = set(sizes)
    if not kinds or (len(kinds) == 1 and sizes[0][0] * sizes[0][1] <= _LARGEST):
        return None, ()
    short = int(min(statistics.median(min(s) for s in sizes), _USUAL))
    side = short // 32 * 32 if short >= 32 else max(short, 8)
    least, most = min(kinds, key=_area), max(kinds, key=_area)
    span = f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if len(kinds) > 1 else "")
    many = "one size" if len(kinds) == 1 else f"{len(kinds)} sizes"
    told = (
        f"{where}: {len(sizes):,} images of {many}, {span} pixels, are read at {side} x {side}: "
        "short side resized, centre cropped; --image-size chooses another"
    )
    return (side, side), (told,)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _decode(path: Path, size: tuple[int, int] | None, grey: bool) -> Array:
    """(H, W) or (H, W, 3) bytes of an image, upright, at ``size``."""
    from PIL import Image, ImageOps

    with _opened(path) as image:
        try:
            if size is not None and image.mode in ("L", "RGB"):
                image.draft(None, (2 * max(size), 2 * max(size)))  # of a JPEG: fewer pixels
            upright = ImageOps.exif_transpose(image)
            if upright.mode in _DEEP_MODES:
                upright = _eight_bits(upright)
            plain = upright.convert("L" if upright.mode in _GREY_MODES else "RGB")
            plain = plain.convert("L" if grey else "RGB")
            if size is not None and plain.size != size:
                plain = ImageOps.fit(plain, size, Image.Resampling.BICUBIC)
            return np.asarray(plain)
        except (*_BROKEN, TypeError, Image.DecompressionBombError) as error:
            raise _Unreadable(one_line(error)) from error


def _eight_bits(image: Any) -> Any:
    """A grey image of 16 bits in 8: 65,535 becomes 255."""
    from PIL import Image

    deep = np.asarray(image).astype(np.int64)
    if deep.min() < 0 or deep.max() > 65_535:
        raise _Unreadable("pixels of 32 bits do not fit in bytes; convert it to 8-bit grey")
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8))


def _skipped(
    broken: list[tuple[Path, _Unreadable]], count: int, where: str, reading: Reading
) -> tuple[str, ...]:
    """What to tell of unreadable images that are left out.

    Raises:
        InputError: they are not to be left out.
    """
    listed = "; ".join(f"{path.name} ({error})" for path, error in broken[:5])
    more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    if reading.skip_unreadable:
        return (
            f"{where}: {len(broken)} of {count:,} images cannot be read and are left out: "
            f"{listed}{more}",
        )
    at = broken[0][0] if len(broken) == 1 else where
    what = (
        "is no readable image"
        if len(broken) == 1
        else (f"{len(broken)} of {count:,} images cannot be read")
    )
    raise InputError(
        f"{at}: {what}: {listed}{more}. Mend or remove them, or leave them out with "
        "--skip-unreadable."
    )


def _specials(seen: list[_Seen], where: str) -> tuple[str, ...]:
    notes = []
    if deep := sum(s.deep for s in seen):
        notes.append(f"{where}: {deep} images of 16 bits are scaled to 8")
    if several := sum(s.several for s in seen):
        notes.append(f"{where}: of {several} images with several pictures the first is read")
    return tuple(notes)
