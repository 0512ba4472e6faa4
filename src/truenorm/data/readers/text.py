"""Text files: how they are encoded, and what stands between their cells."""

from __future__ import annotations

import codecs
import csv
from collections import Counter

from truenorm.errors import InputError

_SAMPLE = 2**20  # bytes looked at
# Byte marks; UTF-32's begin with UTF-16's, so they come first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What tables come in that are not UTF-8; the first of those that fit equally well is taken.
_LEGACY = ("gb18030", "cp1252", "big5", "cp932", "euc_kr", "cp1251", "cp1250", "koi8_r")
DELIMITERS = ",;\t|"


def encoding_of(head: bytes, name: str) -> str:
    """The encoding of a text that begins with ``head``, by its marks, strictly, or by its letters.

    Raises:
        InputError: no encoding fits well; the text says how to name one.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    head = head[:_SAMPLE]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if even + odd:  # Latin letters in UTF-16 have a zero byte each, on one side
        if max(even, odd) > 0.3 * len(head) / 2 and min(even, odd) < 0.1 * max(even, odd):
            return "utf-16-be" if even > odd else "utf-16-le"
        raise InputError(
            f"{name}: holds zero bytes, so it is no text in a known encoding; export it as "
            "UTF-8 text."
        )
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(head, final=False)
    except UnicodeDecodeError:
        return _by_letters(head, name)
    return "utf-8"


def _by_letters(head: bytes, name: str) -> str:
    from charset_normalizer import from_bytes

    # Only what is no ASCII tells encodings apart: lines without would drown the few that do.
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    found = list(from_bytes(b"\n".join(lines[:5000]), cp_isolation=list(_LEGACY)))
    if not found:
        raise InputError(
            f"{name}: is not UTF-8, and no encoding known here fits ({', '.join(_LEGACY)}); "
            "name it with --encoding, or export the file as UTF-8."
        )
    best = min(match.chaos for match in found)
    good = [m for m in found if m.chaos <= best + 0.05]
    most = max(match.coherence for match in good)
    fit = {m.encoding for m in good if m.coherence >= most - 0.05}
    # cp1250 and cp1252 have the letters of western Europe at the same places.
    west = b"\n".join(lines)
    if "cp1250" in fit and _reads_alike(west, "cp1250", "cp1252"):
        fit.add("cp1252")
    return next(encoding for encoding in _LEGACY if encoding in fit)


def _reads_alike(text: bytes, one: str, other: str) -> bool:
    try:
        return text.decode(one) == text.decode(other)
    except UnicodeDecodeError:
        return False


def delimiter_of(text: str) -> str:
    """What separates the cells of a table that begins with ``text``: comma, semicolon, tab or bar.

    That which gives most cells a line, on nearly every line; quoted cells may hold any of them.
    """
    lines = text.splitlines()[:200]
    if len(lines) > 1 and not text.endswith("\n"):
        lines = lines[:-1]  # it may be cut short
    best, columns = ",", 1
    for delimiter in DELIMITERS:
        counts = Counter(len(row) for row in csv.reader(lines, delimiter=delimiter) if row)
        width, rows = counts.most_common(1)[0] if counts else (1, 0)
        if width > columns and rows >= 0.9 * counts.total():
            best, columns = delimiter, width
    return best
