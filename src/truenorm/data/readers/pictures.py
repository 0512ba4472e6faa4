"""Image files decoded upright and at one size, into one array of bytes."""

from __future__ import annotations

import functools
import os
import statistics
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from truenorm.data.readers.examples import Array
from truenorm.data.reading import Reading
from truenorm.errors import InputError, one_line

_PHONES = (".heic", ".heif")  # what Pillow reads with a plug-in only; no reason to pass them over
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".pgm", ".ppm"),
)
# Modes of 8 bits a channel: what Pillow turns into grey or RGB without loss of range.
_GREY_MODES, _COLOUR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # grey of 16 bits, which is scaled to 8
_LARGEST = 512 * 512  # pixels of an image that is read as it is
_USUAL = 128  # the largest size chosen here: on two cores a ResNet's epoch of 1,000 takes a minute
_STEP = 32  # of sizes: the networks halve images, and transformers cut them into patches
_ORIENTATION, _TURNED = 0x0112, 5  # the EXIF tag, and the first value that swaps the sides
_NAMED = 5  # files that a message names

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Pictures(NamedTuple):
    """Decoded images: (N, H, W) or (N, 3, H, W) bytes, of which files, and what to tell."""

    x: Array
    kept: list[int]
    notes: tuple[str, ...]


class _Head(NamedTuple):
    """What an image's header says: width and height as it is looked at, and what is special."""

    size: tuple[int, int]
    grey: bool
    deep: bool = False
    several: bool = False


class _Plan(NamedTuple):
    """What all images become: width and height, and whether grey."""

    size: tuple[int, int]
    grey: bool


class _Unreadable(Exception):
    """An image that cannot be read, with the reason."""


def is_image_name(name: str) -> bool:
    """Whether a file so named is taken for an image; "._x.jpg" is macOS's note on one."""
    return name.lower().endswith(ENDINGS + _PHONES) and not name.startswith(".")


def read_pictures(
    files: list[Path], folder: Path | None, image: tuple[int, ...] | None, reading: Reading
) -> Pictures:
    """Decode ``files``, upright by their EXIF orientation, in their order.

    At most as many whole images as there are cores are in memory at once.

    Args:
        files: one at least.
        folder: where they lie, from which messages name them; None for as they are given.
        image: (C, H, W) that they must become; by default grey if all are, and of the size that
            they have, or that suits them where it differs or is large.
        reading: the size in place of what suits, and whether to leave out what is unreadable.

    Raises:
        InputError: files cannot be read, and are not to be left out or none is left.
    """
    told = "" if folder is None else f"{folder}: "
    broken: dict[int, _Unreadable] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on large images and odd metadata
        heads: dict[int, _Head] = {}
        for i, head in enumerate(_each(_look, files)):
            if isinstance(head, _Unreadable):
                broken[i] = head
            else:
                heads[i] = head
        x, heads, plan = _decoded(files, heads, broken, image, reading)
    if broken and not (reading.skip_unreadable and heads):
        raise _refusal(files, broken, folder, told)
    notes = [_sizes(heads.values(), plan, image, reading), *_specials(heads.values())]
    if broken:
        left_out = f"{_are(len(broken))} left out: {_listed(files, broken, folder)}"
        notes.append(f"{_cannot(files, broken)} and {left_out}")
    return Pictures(x, list(heads), tuple(told + note for note in notes if note))


def _each(work: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made | _Unreadable]:
    """``work`` of each item in order, or why it cannot be done; Pillow uses all cores."""

    def safely(item: _Item) -> _Made | _Unreadable:
        try:
            return work(item)
        except _Unreadable as error:
            return error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(safely, items)


# -- one file -------------------------------------------------------------------------------------


def _look(path: Path) -> _Head:
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, size, format = image.mode, image.size, image.format
            turned, several = _metadata(image)
    except Exception as error:  # a damaged file may raise anything in Pillow's readers
        raise _Unreadable(_reason(path, error)) from error
    if mode not in (*_GREY_MODES, *_COLOUR_MODES, *_DEEP_MODES):
        raise _Unreadable(
            f"pixels of mode {mode} do not fit in bytes; convert it to 8-bit grey or RGB"
        )
    if turned and format != "TIFF":  # of which Pillow itself gives the upright size
        size = size[::-1]
    deep = mode in _DEEP_MODES
    return _Head(size, deep or mode in _GREY_MODES, deep, several)


def _metadata(image: Any) -> tuple[bool, bool]:
    """Whether an image's sides are swapped, and whether its file holds several."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) >= _TURNED
        return turned, bool(getattr(image, "is_animated", False))
    except Exception:  # metadata that do not parse; the pixels may
        return False, False


def _decode(path: Path, plan: _Plan) -> Array:
    """(H, W) or (3, H, W) bytes of an image, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode in ("L", "RGB"):
                image.draft(None, (2 * max(plan.size),) * 2)  # of a JPEG: fewer pixels
            upright = ImageOps.exif_transpose(image)
            if upright.mode in _DEEP_MODES:
                upright = _eight_bits(upright)
            plain = upright.convert("L" if upright.mode in _GREY_MODES else "RGB")
            plain = plain.convert("L" if plan.grey else "RGB")
            if plain.size != plan.size:
                plain = ImageOps.fit(plain, plan.size, Image.Resampling.BICUBIC)
            pixels = np.asarray(plain)
            return pixels if plan.grey else pixels.transpose(2, 0, 1)
    except _Unreadable:
        raise
    except Exception as error:
        raise _Unreadable(_reason(path, error)) from error


def _eight_bits(image: Any) -> Any:
    """A grey image of 16 bits in 8: 65,535 becomes 255."""
    from PIL import Image

    deep = np.asarray(image).astype(np.int64)
    if deep.min() < 0 or deep.max() > 65_535:
        raise _Unreadable("pixels of 32 bits do not fit in bytes; convert it to 8-bit grey")
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8))


def _reason(path: Path, error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "an empty file"
        heic = path.name.lower().endswith(_PHONES)
        kind = "HEIC, which Pillow does not read; convert it to JPEG"
        return kind if heic else "no image, or of a kind that Pillow does not read"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow opens, against decompression bombs; make it smaller"
    if isinstance(error, FileNotFoundError):
        return "a link to nothing" if path.is_symlink() else "not there"
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


# -- all of them ----------------------------------------------------------------------------------


def _decoded(
    files: list[Path],
    heads: dict[int, _Head],
    broken: dict[int, _Unreadable],
    image: tuple[int, ...] | None,
    reading: Reading,
) -> tuple[Array, dict[int, _Head], _Plan]:
    """The images, and the heads of those that could be decoded; others are added to ``broken``."""
    x, plan = np.empty(0, np.uint8), _Plan((0, 0), True)
    # Those that are left when some cannot be decoded may all be grey, or of one size.
    while heads and plan != (plan := _plan(heads.values(), image, reading)):
        width, height = plan.size
        x = np.empty((len(heads), *(() if plan.grey else (3,)), height, width), np.uint8)
        good: dict[int, _Head] = {}
        decode = functools.partial(_decode, plan=plan)
        for i, made in zip(heads, _each(decode, [files[i] for i in heads]), strict=True):
            if isinstance(made, _Unreadable):
                broken[i] = made
            else:
                x[len(good)] = made
                good[i] = heads[i]
        x, heads = x[: len(good)], good
    return x, heads, plan


def _plan(heads: Collection[_Head], image: tuple[int, ...] | None, reading: Reading) -> _Plan:
    """What the images become; ``image`` is (C, H, W) of a model that they are for, if any."""
    if image is not None:
        return _Plan((image[2], image[1]), image[0] == 1)
    grey = all(head.grey for head in heads)
    if reading.image_size is not None:
        return _Plan((reading.image_size,) * 2, grey)
    sizes = {head.size for head in heads}
    if len(sizes) == 1:
        (size,) = sizes
        if size[0] * size[1] <= _LARGEST:
            return _Plan(size, grey)
    short = min(int(statistics.median(min(head.size) for head in heads)), _USUAL)
    side = short // _STEP * _STEP if short >= _STEP else max(short, 8)
    return _Plan((side, side), grey)


def _sizes(
    heads: Collection[_Head], plan: _Plan, image: tuple[int, ...] | None, reading: Reading
) -> str:
    """Which size was chosen of several, or of large images; empty where none was."""
    sizes = {head.size for head in heads}
    if image is not None or reading.image_size is not None or sizes == {plan.size}:
        return ""
    least, most = (of(sizes, key=lambda size: size[0] * size[1]) for of in (min, max))
    span = " to ".join(f"{w} x {h}" for w, h in dict.fromkeys((least, most)))
    many = "one size" if len(sizes) == 1 else f"{len(sizes)} sizes"
    return (
        f"{_counted(len(heads))} of {many}, {span} pixels, are read at "
        f"{plan.size[0]} x {plan.size[1]}: short side resized, centre cropped; --image-size "
        "chooses another"
    )


def _specials(heads: Collection[_Head]) -> list[str]:
    notes = []
    if deep := sum(head.deep for head in heads):
        notes.append(f"{_counted(deep)} of 16 bits {_are(deep)} scaled to 8")
    if several := sum(head.several for head in heads):
        notes.append(f"of {_counted(several, 'file')} with several pictures the first is read")
    return notes


def _refusal(
    files: list[Path], broken: dict[int, _Unreadable], folder: Path | None, told: str
) -> InputError:
    them = "it" if len(broken) == 1 else "them"
    ways = f"end or remove {them}, or leave {them} out with --skip-unreadable."
    if len(broken) == len(files):
        ways = f"end {them}."
    if len(broken) == 1:
        ((i, reason),) = broken.items()
        return InputError(f"{files[i]}: is no readable image ({reason}); m{ways}")
    return InputError(f"{told}{_cannot(files, broken)}: {_listed(files, broken, folder)}. M{ways}")


def _cannot(files: list[Path], broken: dict[int, _Unreadable]) -> str:
    return f"{len(broken)} of {_counted(len(files))} cannot be read"


def _listed(files: list[Path], broken: dict[int, _Unreadable], folder: Path | None) -> str:
    """The first of the unreadable files, each with the reason."""
    named = [
        f"{files[i] if folder is None else files[i].relative_to(folder).as_posix()} ({broken[i]})"
        for i in sorted(broken)[:_NAMED]
    ]
    return "; ".join(named) + (f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else "")


def _counted(count: int, noun: str = "image") -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
