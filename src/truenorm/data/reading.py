"""How data are read, where there is a choice.

Imports no numpy, so that ``truenorm --help`` is quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from truenorm.errors import InputError, choose

MISSING = ("fill", "refuse")


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read, where there is a choice.

    Raises:
        InputError: a value lies outside its range.
    """

    image_size: int | None = _option(
        None,
        "Read images at this height and width: the short side is resized, the centre cropped. "
        "By default as they are, or, where sizes differ, as told.",
    )
    skip_unreadable: bool = _option(False, "Leave out image files that cannot be read.")
    id: str | None = _option(None, "The column of a table that names each row; no feature.")
    missing: str = _option(
        "fill", "Empty cells of a table: fill (median and an indicator), or refuse."
    )
    encoding: str | None = _option(None, "Of a text file, like gb18030; by default found.")

    def __post_init__(self) -> None:
        choose("missing", self.missing, MISSING)
        size = self.image_size
        if size is not None and not (type(size) is int and 1 <= size <= 4096):
            raise InputError(f"image_size must be an integer from 1 to 4096, got {size!r}.")
        if self.encoding is not None:
            try:
                b"a".decode(self.encoding)
            except UnicodeError:  # half a letter of a known encoding
                pass
            except LookupError as error:
                raise InputError(
                    f"encoding {self.encoding!r} is not known; say one like utf-8, gb18030, "
                    "utf-16 or cp1252."
                ) from error

    def to_json(self) -> dict[str, Any]:
        """The choices that differ from the defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
