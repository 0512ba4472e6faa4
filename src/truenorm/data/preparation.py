"""What is made of a table's columns: learned from the training part, kept with the model.

Numbers stay what they are; an empty cell becomes the column's median, and where training has
empty cells an indicator tells them. Text becomes one column of zeros and ones for each category.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_EMPTY = "(empty)"
_MOST_LETTERS = 30  # of a category in a table


@dataclass(frozen=True)
class Column:
    """A column of a table as it was read.

    Attributes:
        name: its name.
        kind: "number", "boolean" or "category".
        categories: of a category, its texts in order, at whose places the values point.
    """

    name: str
    kind: str
    categories: tuple[str, ...] = ()


def columns_of(stored: list[dict[str, Any]] | None) -> tuple[Column, ...] | None:
    """Columns of plain values, as ``dataclasses.asdict`` makes of each, or None."""
    if stored is None:
        return None
    return tuple(Column(c["name"], c["kind"], tuple(c["categories"])) for c in stored)


@dataclass(frozen=True)
class Prepared:
    """What became of one column.

    Attributes:
        name, kind: as of :class:`Column`.
        fill: what an empty cell of numbers becomes; None for categories.
        indicator: whether a further column of zeros and ones tells empty cells.
        categories: that each have a column.
        constant: whether all training rows hold the same.
    """

    name: str
    kind: str
    fill: float | None = None
    indicator: bool = False
    categories: tuple[str, ...] = ()
    constant: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the columns made of it."""
        empty = (f"{self.name}={_EMPTY}",) if self.indicator else ()
        if self.kind == "category":
            return (*(f"{self.name}={c}" for c in self.categories), *empty)
        return (self.name, *empty)

    @property
    def made(self) -> str:
        """What became of it, in words."""
        if self.kind == "category":
            shown = ", ".join(map(short, self.categories[:4]))
            shown += ", ..." if len(self.categories) > 4 else ""
            empty = "; empty cells a category of their own" if self.indicator else ""
            return f"one of {len(self.categories)}: {shown}{empty}"
        if self.indicator:
            return (
                f"as it is; empty cells become the median {self.fill:.6g}, and a column marks them"
            )
        if self.constant:
            return "as it is; the same in every training row, so it tells nothing"
        return "0 or 1" if self.kind == "boolean" else "as it is"


@dataclass(frozen=True)
class Preparation:
    """What was learned of a table's columns, and how rows become numbers by it.

    Attributes:
        columns: what became of each column that is used.
        left_out: names of the columns that are not, with the reasons.
    """

    columns: tuple[Prepared, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def learn(
        cls, x: Array, columns: tuple[Column, ...], left_out: dict[str, str] | None = None
    ) -> Preparation:
        """Learn from training rows ``x`` (N, F), as :class:`Examples` hold a table's, alone.

        A category that no training row has gets no column.
        """
        return cls(tuple(_learned(x[:, i], c) for i, c in enumerate(columns)), dict(left_out or {}))

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the columns of prepared rows."""
        return tuple(name for column in self.columns for name in column.features)

    def apply(self, x: Array, columns: tuple[Column, ...]) -> Array:
        """Prepared rows (N, P) float32 of ``x`` (N, F), whose columns stand in the same order.

        An unknown category is a row of zeros among its column's.
        """
        parts = [
            _applied(x[:, i], read, learned)
            for i, (read, learned) in enumerate(zip(columns, self.columns, strict=True))
        ]
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def unknown(self, x: Array, columns: tuple[Column, ...]) -> list[str]:
        """What rows ``x`` hold that training never saw, a sentence a column."""
        told = []
        for i, (read, learned) in enumerate(zip(columns, self.columns, strict=True)):
            empty = np.isnan(x[:, i])
            if learned.kind == "category":
                new = [c for c in read.categories if c not in learned.categories]
                rows = int(np.isin(x[:, i], [read.categories.index(c) for c in new]).sum())
                if rows:
                    shown = ", ".join(repr(c) for c in new[:4]) + (", ..." if new[4:] else "")
                    told.append(
                        f"column {learned.name!r}: {_rows(rows)} {shown}, unknown to the "
                        "model; each counts as none of its categories"
                    )
            if empty.any() and not learned.indicator:
                fill = learned.fill
                became = "none of its categories" if fill is None else f"the median {fill:.6g}"
                told.append(
                    f"column {learned.name!r}: {_rows(int(empty.sum()))} nothing, as no row did "
                    f"in training; each becomes {became}"
                )
        return told

    def table(self) -> list[tuple[str, str, str]]:
        """A row for each column of the source: its name, its kind, what became of it."""
        used = [(c.name, c.kind, c.made) for c in self.columns]
        return [*used, *((name, "left out", why) for name, why in self.left_out.items())]

    @property
    def plain(self) -> bool:
        """Whether prepared rows are the numbers as read."""
        return not self.left_out and all(
            c.kind == "number" and not c.indicator and not c.constant for c in self.columns
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; a float64 survives the decimal form Python prints."""
        columns = [
            {
                "name": c.name,
                "kind": c.kind,
                "fill": c.fill,
                "indicator": c.indicator,
                "categories": list(c.categories),
                "constant": c.constant,
            }
            for c in self.columns
        ]
        return {"columns": columns, "left_out": self.left_out}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Preparation:
        """Undo :meth:`to_json`."""
        columns = (
            Prepared(**{**c, "categories": tuple(c["categories"])}) for c in stored["columns"]
        )
        return cls(tuple(columns), stored["left_out"])


def _learned(values: Array, column: Column) -> Prepared:
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OneHotEncoder

    empty = bool(np.isnan(values).any())
    if column.kind == "category":
        seen = values[~np.isnan(values)].astype(np.int64)
        codes = OneHotEncoder().fit(seen[:, None]).categories_[0] if len(seen) else ()
        return Prepared(
            column.name, "category", None, empty, tuple(column.categories[i] for i in codes)
        )
    imputer = SimpleImputer(strategy="median", keep_empty_features=True)
    fill = float(imputer.fit(values[:, None]).statistics_[0])
    constant = not empty and bool((values == values[0]).all())
    return Prepared(column.name, column.kind, fill, empty, constant=constant)


def _rows(count: int) -> str:
    return "1 row holds" if count == 1 else f"{count:,} rows hold"


def short(text: str) -> str:
    """A text from a table, as a message or a page shows it."""
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 3] + "..."


def _applied(values: Array, read: Column, learned: Prepared) -> Array:
    empty = np.isnan(values)
    indicator = [empty[:, None]] if learned.indicator else []
    if learned.kind != "category":
        assert learned.fill is not None, "numbers have a median"
        return np.concatenate([np.where(empty, learned.fill, values)[:, None], *indicator], axis=1)
    place = {c: i for i, c in enumerate(learned.categories)}
    # The last place, past all categories, is of what is unknown or empty.
    places = np.array([*(place.get(c, len(place)) for c in read.categories), len(place)])
    at = places[np.where(empty, len(read.categories), values).astype(np.int64)]
    return np.concatenate([np.eye(len(place) + 1, len(place), dtype=bool)[at], *indicator], axis=1)
