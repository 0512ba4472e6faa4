"""Files written whole or not at all, and values as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from truenorm.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it over ``path``.

    Whoever reads ``path`` sees the old content or the new, never a part, whatever happens.

    Raises:
        InputError: the disk is full or the place cannot be written; ``path`` is as it was.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error.strerror}); what was there before is intact. "
            "Free space or choose a writable folder."
        ) from error
    finally:
        # After a success the file has its new name; where removing fails, so did writing.
        if os.path.exists(beside) and os.access(beside.parent, os.W_OK):
            beside.unlink()


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
