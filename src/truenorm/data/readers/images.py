"""A folder of images per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from truenorm.data.readers.examples import Array, Examples, Source
from truenorm.errors import InputError

_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "valid": ("val", "valid", "validation"),
}
# Modes of 8 bits a channel: what Pillow turns into grey or RGB without loss of range.
_GREY_MODES, _COLOUR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")


def read_image_folder(folder: Path, labels_needed: bool, grey: bool | None) -> Source:
    """Read a folder with a folder of images for each class, in parts or not.

    Raises:
        InputError: it does not parse; the text tells the file, the place and the rule.
    """
    below = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    parts = {
        part: next((below[n] for n in names if n in below), None) for part, names in _PARTS.items()
    }
    if parts["train"] is None:
        return Source(_image_part(folder, labels_needed, grey), None)
    train = _image_part(parts["train"], labels_needed, grey)
    test, valid = (
        None if path is None else _image_part(path, labels_needed, grey=train.x.ndim == 3)
        for path in (parts["test"], parts["valid"])
    )
    return Source(train, test, valid)


def _image_part(folder: Path, labels_needed: bool, grey: bool | None) -> Examples:
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
    return Examples(x, labels, str(folder), order=names or None)


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
