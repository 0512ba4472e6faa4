"""A folder of images per class, or image files without classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from truenorm.data.readers.examples import Examples, Source
from truenorm.data.readers.pictures import ENDINGS, is_image_name, read_pictures
from truenorm.data.reading import Reading
from truenorm.errors import InputError

_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "valid": ("val", "valid", "validation"),
}
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders
_NAMED = 5  # files or folders that a message names


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
    below = {p.name.lower(): p for p in _folders_in(folder)}
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
    if others := [p.name for p in below.values() if p not in parts.values()]:
        note = f"{folder}: folders that are no part are left out: {_some(others)}"
        train = dataclasses.replace(train, notes=(*train.notes, note))
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
        if path.is_dir() or not is_image_name(path.name):
            raise InputError(
                f"{path}: of several files each must be an image, ending in one of "
                f"{', '.join(ENDINGS)}."
            )
    pictures = read_pictures(files, None, image, reading)
    names = np.array([str(files[i]) for i in pictures.kept])
    return Source(Examples(pictures.x, None, "images", ids=names, notes=pictures.notes), None)


def _part(
    folder: Path, root: Path, labels_needed: bool, image: tuple[int, ...] | None, reading: Reading
) -> Examples:
    images = {c.name: _images_in(c) for c in _folders_in(folder)}
    classes = tuple(name for name, own in images.items() if own)
    loose = [p for p in sorted(folder.iterdir()) if is_image_name(p.name) and not p.is_dir()]
    labelled = [(path, name) for name in classes for path in images[name]]
    if not labelled and not labels_needed:
        labelled = [(path, "") for path in loose]
    if not labelled:
        raise _no_images(folder, loose)
    if labels_needed and len(classes) == 1:
        _refuse_nested(folder / classes[0])
    pictures = read_pictures([path for path, _ in labelled], folder, image, reading)
    kept = [labelled[i] for i in pictures.kept]
    for name in classes:
        if name not in (label for _, label in kept):
            raise InputError(
                f"{folder / name}: none of its images can be read; mend them, or remove the folder."
            )
    notes = pictures.notes
    if classes:
        empty = [name for name, own in images.items() if not own]
        notes += tuple(f"{folder}: {note}" for note in _left_out(folder, loose, empty))
    return Examples(
        pictures.x,
        np.array([label for _, label in kept]) if classes else None,
        str(folder),
        order=classes or None,
        ids=np.array([path.relative_to(root).as_posix() for path, _ in kept]),
        notes=notes,
    )


def _folders_in(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _files_in(folder: Path) -> list[Path]:
    """All files below, but for hidden ones and those in hidden folders."""
    found = (p for p in sorted(folder.rglob("*")) if not p.is_dir())
    return [p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def _images_in(folder: Path) -> list[Path]:
    return [p for p in _files_in(folder) if is_image_name(p.name)]


def _no_images(folder: Path, loose: list[Path]) -> InputError:
    if loose:
        return InputError(
            f"{folder}: holds {len(loose):,} images, such as {loose[0].name}, but no folder of "
            "images for each class; move them into folders named after their classes."
        )
    return InputError(
        f"{folder}: no images found; expected one folder per class, with files ending in "
        f"{', '.join(ENDINGS)}."
    )


def _refuse_nested(lone: Path) -> None:
    """Refuse a folder that holds the class folders in the place of a class."""
    nested = [p.name for p in _folders_in(lone) if _images_in(p)]
    if len(nested) > 1:
        raise InputError(
            f"{lone.parent}: needs at least two classes to tell apart, got only {lone.name!r}, "
            f"whose own folders are {_some(nested)}; give {lone} if these are the classes."
        )


def _left_out(folder: Path, loose: list[Path], empty: list[str]) -> Iterator[str]:
    """What lies beside the images that are read, and may have been meant."""
    if loose:
        yield (
            f"images outside the class folders are left out, {len(loose):,} in all: "
            f"{_some([p.name for p in loose])}"
        )
    if empty:
        yield f"folders without images are no classes: {_some(empty)}"
    others = [p for p in _files_in(folder) if not is_image_name(p.name)]
    if others := [p for p in others if p.name.lower() not in _OF_SYSTEMS]:
        kinds = sorted({p.suffix.lower() or "no ending" for p in others})
        yield f"files that are no images are left out, {len(others):,} in all: {_some(kinds)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
