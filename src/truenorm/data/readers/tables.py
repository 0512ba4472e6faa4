"""Tables: csv and its kin, parquet, and tables in memory."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from truenorm.data.preparation import Column, Preparation, short
from truenorm.data.readers.examples import Array, Examples
from truenorm.data.readers.text import SAMPLE, delimiter_of, encoding_of
from truenorm.data.reading import Reading
from truenorm.errors import InputError, one_line

TEXT_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_MOST_CATEGORIES = 50  # more different texts are names or sentences, from which nothing is learned
_MOST_NAMED = 30  # columns in a message
_EMPTY_WORDS = frozenset(
    ["", "?", "-", "--", ".", "na", "n/a", "#n/a", "nan", "null", "none", "missing", "unknown"]
)
_SEPARATOR = re.compile(r"\ufeff?sep=(.)\r?\n")  # as Excel writes it into the first line
_DATE = re.compile(
    r"\d{1,4}[-/.年]\d{1,2}[-/.月]\d{1,4}日?"
    r"([ T]\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?"
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?([eE][+-]?\d+)?")
_THOUSANDS_COMMA = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")


class Asked(NamedTuple):
    """What a model that was trained on a table asks of another one; without, all is learned."""

    target: str | None
    preparation: Preparation | None = None
    features: tuple[str, ...] | None = None  # of a model that keeps no preparation
    labels_needed: bool = True
    label_known: bool = True  # whether the user named the target for this very table


class _Text(NamedTuple):
    """How a text file was read."""

    table: Any
    notes: tuple[str, ...]
    decimal_comma: bool


class _Read(NamedTuple):
    """A column, its values (N,) float32, and what the user should know of it."""

    column: Column
    values: Array
    note: str = ""


def is_table_name(name: str) -> bool:
    """Whether a file so named is read as a table."""
    return name.lower().endswith((*TEXT_ENDINGS, ".parquet"))


def read_table(path: Path, asked: Asked, reading: Reading) -> Examples:
    """Read a .csv, .tsv (gzipped or not) or .parquet file.

    Raises:
        InputError: it does not parse; the text tells the file, the place and the rule.
    """
    import pyarrow as arrow
    import pyarrow.parquet

    as_text = _texts_of(asked, reading)
    try:
        if path.name.lower().endswith(".parquet"):
            found = _Text(pyarrow.parquet.read_table(path), (), False)
        else:
            found = _read_text(path, as_text, reading)
    except (arrow.ArrowInvalid, arrow.ArrowKeyError, UnicodeError, OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        if isinstance(error, UnicodeError) and reading.encoding is not None:
            raise InputError(
                f"{path}: is not {reading.encoding}: {one_line(error)}; leave --encoding out, or "
                "name another."
            ) from error
        raise InputError(f"{path}: does not parse: {one_line(error)}; mend the file.") from error
    return examples_of(
        found.table, str(path), asked, reading, found.notes, decimal_comma=found.decimal_comma
    )


def _texts_of(asked: Asked, reading: Reading) -> list[str]:
    """The columns whose cells are texts whatever they look like."""
    known = () if asked.preparation is None else asked.preparation.columns
    named = [c.name for c in known if c.kind == "category"]
    return named + ([] if reading.id is None else [reading.id])


def _read_text(path: Path, as_text: list[str], reading: Reading) -> _Text:
    import pyarrow as arrow
    import pyarrow.csv

    packed = "gzip" if path.name.lower().endswith(".gz") else None
    with arrow.input_stream(str(path), compression=packed) as stream:
        head = stream.read(SAMPLE)
    if not head.strip():
        raise InputError(f"{path}: is empty; a table needs a line of column names and rows.")
    encoding = reading.encoding or encoding_of(head, str(path))
    text = head.decode(encoding, "replace")
    said = _SEPARATOR.match(text)
    delimiter = said[1] if said else delimiter_of(text)
    lean = {"utf-8-sig": "utf-8"}.get(encoding, encoding)  # arrow takes the mark away itself
    with arrow.input_stream(str(path), compression=packed) as stream:
        table = pyarrow.csv.read_csv(
            stream,
            pyarrow.csv.ReadOptions(encoding=lean, skip_rows=int(said is not None)),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values='"' in text),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(as_text, arrow.string()), strings_can_be_null=True
            ),
        )
    broken = [field.name for field in table.schema if arrow.types.is_binary(field.type)]
    if broken:
        raise InputError(
            f"{path}: column {broken[0]!r} holds bytes that are no {encoding}; name the file's "
            "encoding with --encoding, like gb18030 or cp1252."
        )
    notes: tuple[str, ...] = ()
    if reading.encoding is None and not encoding.startswith("utf"):
        notes = (f"{path}: read as {encoding}; if that is wrong, name it with --encoding",)
    return _Text(table, notes, delimiter == ";")


def examples_of(
    table: Any,
    name: str,
    asked: Asked,
    reading: Reading,
    notes: tuple[str, ...] = (),
    *,
    decimal_comma: bool = False,
) -> Examples:
    """The examples of an Arrow ``table`` that messages call ``name``.

    ``decimal_comma`` says what "1,234" means where a column does not show it: 1.234 or 1234.

    Raises:
        InputError: a column is missing, or cannot be used as asked.
    """
    columns: list[str] = list(table.column_names)
    _refuse_shape(table, columns, name)
    target = _target(columns, name, asked)
    if reading.id is not None and reading.id not in columns:
        raise InputError(
            f"{name}: has no column {reading.id!r} to name the rows by; choose one of "
            f"{_named(columns)}."
        )
    if reading.id is not None and reading.id == target:
        raise InputError(
            f"{name}: the column {target!r} cannot be both the label and the id; name another."
        )
    ids = None if reading.id is None else _ids(table.column(reading.id))
    y = None
    if target is not None:
        y = _label_column(table.column(target), target, name, needed=asked.label_known)
        if y is None:
            notes = (*notes, f"{name}: {target!r} is not filled in every row, so nothing is scored")
        elif asked.labels_needed and y.dtype.kind in "iu":
            classes = len(np.unique(y))
            if classes > _MOST_CATEGORIES and len(y) < 5 * classes:
                notes = (
                    *notes,
                    f"{name}: {target!r} has {classes} different numbers in {len(y)} rows, each a "
                    "class of its own; if they are measurements, cut them into ranges first",
                )
    if asked.preparation is None:
        wanted = asked.features or tuple(c for c in columns if c not in (asked.target, reading.id))
        needed = asked.features or ()
    else:
        wanted = needed = tuple(c.name for c in asked.preparation.columns)
    missing = [c for c in needed if c not in columns]
    if missing:
        raise InputError(
            f"{name}: lacks the column {missing[0]!r} that the model was trained on; "
            f"it has {_named(columns)}."
        )
    if not wanted:
        raise InputError(f"{name}: has no column beside the label {target!r}.")
    read, left_out = _columns(table, wanted, name, asked, reading, decimal_comma=decimal_comma)
    if not read:
        raise InputError(
            f"{name}: no column is left to learn from: "
            + "; ".join(f"{c} {why}" for c, why in left_out.items())
            + ". Give numbers or categories."
        )
    x = np.stack([r.values for r in read], axis=1)
    kept = tuple(r.column for r in read)
    _refuse_infinite(x, kept, name)
    notes = (*notes, *(f"{name}: {r.note}" for r in read if r.note))
    if asked.preparation is not None:
        notes = (*notes, *asked.preparation.unknown(x, kept))
    return Examples(
        x, y, name, tuple(c.name for c in kept), None, ids, kept, notes, left_out=left_out
    )


def _refuse_shape(table: Any, columns: list[str], name: str) -> None:
    twice = [c for i, c in enumerate(columns) if c in columns[:i]]
    if twice:
        raise InputError(f"{name}: has two columns named {twice[0]!r}; rename one.")
    if not table.num_rows:
        raise InputError(
            f"{name}: has column names ({', '.join(columns)}) and no rows; give it some."
        )


def _target(columns: list[str], name: str, asked: Asked) -> str | None:
    """The label's column, or None where there are no labels and none are needed."""
    if asked.target is None and asked.labels_needed:
        raise InputError(
            f"{name}: which column is the label? Say --target NAME with one of {_named(columns)}."
        )
    if asked.target is None or asked.target in columns:
        return asked.target
    if asked.label_known or asked.labels_needed:
        raise InputError(
            f"{name}: has no column {asked.target!r} for the label; choose one of "
            f"{_named(columns)}."
        )
    return None


def _named(columns: list[str]) -> str:
    """Columns for a message, quoted where one could misread them."""
    shown = [c if c and c == c.strip() else repr(c) for c in columns[:_MOST_NAMED]]
    more = f", ... ({len(columns)} in all)" if columns[_MOST_NAMED:] else ""
    return ", ".join(shown) + more


def _ids(cells: Any) -> Array:
    """(N,) texts; a row without an id is called by its number."""
    texts = enumerate(cells.to_pylist())
    return np.array([f"row {i}" if c is None else str(c) for i, c in texts], dtype=object)


# -- columns --------------------------------------------------------------------------------------


def _columns(
    table: Any,
    wanted: tuple[str, ...],
    name: str,
    asked: Asked,
    reading: Reading,
    *,
    decimal_comma: bool,
) -> tuple[list[_Read], dict[str, str]]:
    """Each column with its values, and what is left out, with the reason."""
    kinds = {}
    if asked.preparation is not None:
        kinds = {c.name: c.kind for c in asked.preparation.columns}
    elif asked.features is not None:
        kinds = dict.fromkeys(asked.features, "number")
    read: list[_Read] = []
    left_out = {}
    for column in wanted:
        cells = table.column(column)
        empty = cells.is_null()
        if (reading.missing == "refuse" or asked.features is not None) and cells.null_count:
            _refuse_empty(empty, column, name)
        found = _column(cells, column, name, kinds.get(column), decimal_comma)
        if isinstance(found, str):
            left_out[column] = found
        else:
            if reading.missing == "refuse" and np.isnan(found.values).any():
                _refuse_empty(np.isnan(found.values), column, name)
            read.append(found)
    return read, left_out


def _refuse_empty(empty: Any, column: str, name: str) -> None:
    mask = empty if isinstance(empty, np.ndarray) else empty.to_numpy(zero_copy_only=False)
    raise InputError(
        f"{name}: row {int(np.flatnonzero(mask)[0])} (counted from 0), column {column!r} is empty; "
        "every cell must hold a number. Fill it or drop the row."
    )


def _column(
    cells: Any, column: str, name: str, kind: str | None, decimal_comma: bool
) -> _Read | str:
    """A column and its values, or why it is left out.

    ``kind`` is what it was in training, and so must be; None where this is training.
    """
    from pyarrow import types

    cells = _simple(cells)
    of = cells.type
    if types.is_null(of):
        return "empty in every row" if kind is None else _empty(cells, column, kind)
    if types.is_integer(of) or types.is_floating(of) or types.is_boolean(of):
        if kind == "category":
            return _category(_texts(cells), column)
        is_boolean = types.is_boolean(of)
        values = _floats(cells.cast("uint8") if is_boolean else cells)
        counts = kind is None and types.is_integer(of) and _counts_rows(values)
        note = (
            f"column {column!r} counts the rows; if it only names them, leave it out with "
            f"--id {shlex.quote(column)}"
        )
        found = Column(column, kind or ("boolean" if is_boolean else "number"))
        return _Read(found, values, note if counts else "")
    if types.is_temporal(of):
        return _dated(kind, column, name, cells)
    if not (types.is_string(of) or types.is_large_string(of)):
        if kind is None:
            return f"holds {of}, which is neither number nor text"
        raise InputError(f"{name}: column {column!r} holds {of}; the model needs a {kind}.")
    return _text_column(_texts(cells), column, name, kind, decimal_comma)


def _simple(cells: Any) -> Any:
    """Cells as numbers or strings where their type is another one for the same."""
    from pyarrow import types

    if types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if types.is_decimal(cells.type):
        return cells.cast("float64")
    return cells.cast("string") if types.is_string_view(cells.type) else cells


def _counts_rows(values: Array) -> bool:
    """Whether values are 0, 1, 2, ... or 1, 2, 3, ..."""
    first = values[0]
    return first in (0, 1) and bool((values == first + np.arange(len(values))).all())


def _text_column(
    texts: Array, column: str, name: str, kind: str | None, decimal_comma: bool
) -> _Read | str:
    """A column of texts as the numbers, dates or categories that they are."""
    if kind == "category":
        return _category(texts, column)
    distinct = [t for t in dict.fromkeys(texts.tolist()) if t is not None]
    meant = [t for t in distinct if t.strip().lower() not in _EMPTY_WORDS]
    number = _as_numbers(meant, decimal_comma)
    if number is not None and (meant or kind):
        values = _float32(np.array([number.get(t, np.nan) for t in texts.tolist()]))
        with_comma = next((t for t in meant if "," in t), None)
        note = ""
        if with_comma is not None:
            note = f"column {column!r}: {with_comma!r} is read as {number[with_comma]:.12g}"
        return _Read(Column(column, kind or "number"), values, note)
    if kind is not None:
        odd = [t for t in meant if _as_numbers([t], decimal_comma) is None]
        wrong = (odd or meant)[0]  # each may be a number, but not by the same commas
        row = int(np.flatnonzero(texts == wrong)[0])
        raise InputError(
            f"{name}: row {row} (counted from 0), column {column!r} holds {wrong!r}; the model "
            "was trained on numbers there. Correct the cell, or empty it."
        )
    return _useless(texts, distinct, meant) or _category(texts, column)


def _useless(texts: Array, distinct: list[str], meant: list[str]) -> str | None:
    """Why nothing can be learned from a column of texts, if so."""
    if not meant:
        return "empty in every row"
    if all(_DATE.fullmatch(t.strip()) for t in meant):
        return f"holds dates, such as {meant[0]!r}"
    if len(distinct) == 1 and None not in texts.tolist():
        return f"is {short(distinct[0])!r} in every row"
    if len(distinct) > min(_MOST_CATEGORIES, max(2, len(texts) // 2)):
        odd = [t for t in meant if not _NUMBER.fullmatch(t.strip())]
        if len(odd) < len(meant) / 2:
            row = int(np.flatnonzero(texts == odd[0])[0])
            return f"holds numbers, but for {short(odd[0])!r} in row {row}"
        return f"holds {len(distinct):,} different texts, such as {short(distinct[0])!r}"
    return None


def _as_numbers(texts: list[str], decimal_comma: bool) -> dict[str, float] | None:
    """Each text as a number, if all are; commas are what all texts together allow."""
    stripped = [t.strip() for t in texts]
    if all(map(_NUMBER.fullmatch, stripped)):
        return {t: float(t) for t in texts}
    thousands = all(_NUMBER.fullmatch(t) or _THOUSANDS_COMMA.fullmatch(t) for t in stripped)
    decimal = all(map(_DECIMAL_COMMA.fullmatch, stripped))
    if decimal and (decimal_comma or not thousands):
        return {t: float(t.replace(".", "").replace(",", ".")) for t in texts}
    return {t: float(t.replace(",", "")) for t in texts} if thousands else None


def _category(texts: Array, column: str) -> _Read:
    distinct = sorted({t for t in texts.tolist() if t is not None})
    place = {t: float(i) for i, t in enumerate(distinct)}
    values = [place.get(t, np.nan) for t in texts.tolist()]
    return _Read(Column(column, "category", tuple(distinct)), np.array(values, dtype=np.float32))


def _empty(cells: Any, column: str, kind: str) -> _Read:
    return _Read(Column(column, kind), np.full(len(cells), np.nan, dtype=np.float32))


def _dated(kind: str | None, column: str, name: str, cells: Any) -> str:
    first = next((c for c in cells.to_pylist() if c is not None), None)
    if kind is None:
        return f"holds dates, such as {str(first)!r}"
    raise InputError(
        f"{name}: column {column!r} holds dates, such as {str(first)!r}; the model was trained on "
        f"a {kind} there."
    )


def _floats(cells: Any) -> Array:
    return _float32(np.asarray(cells.to_numpy(zero_copy_only=False)))


def _float32(values: Array) -> Array:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused by name
        return values.astype(np.float32)


def _texts(cells: Any) -> Array:
    """(N,) texts, None where a cell is empty."""
    return np.array([None if c is None else str(c) for c in cells.to_pylist()], dtype=object)


def _refuse_infinite(x: Array, columns: tuple[Column, ...], name: str) -> None:
    bad = np.argwhere(np.isinf(x))
    if len(bad):
        row, at = bad[0]
        raise InputError(
            f"{name}: row {row} (counted from 0), column {columns[at].name!r} is {x[row, at]}; "
            "every cell must be a finite float32 number. Drop or fill such rows."
        )


def _label_column(column: Any, target: str, name: str, *, needed: bool) -> Array | None:
    """The labels; None where one is missing and they are not ``needed``."""
    from pyarrow import types

    column, of = _simple(column), column.type
    if types.is_nested(of) or types.is_binary(of) or types.is_large_binary(of):
        raise InputError(
            f"{name}: column {target!r} holds {of}; labels must be numbers or text. Name another."
        )
    cells = column.to_pylist()
    missing = [i for i, value in enumerate(cells) if value is None or value == ""]
    if missing and not needed:
        return None
    if missing:
        raise InputError(
            f"{name}: row {missing[0]} (counted from 0), column {target!r}: the label is missing. "
            "Fill it or drop the row."
        )
    values = np.array(cells)
    return values if values.dtype.kind in "biufU" else values.astype(str)
