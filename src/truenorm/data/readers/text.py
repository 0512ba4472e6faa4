"""Text files: how they are encoded, and what stands between their cells."""

from __future__ import annotations

import codecs
import re

from truenorm.errors import InputError

SAMPLE = 2**20  # bytes looked at
# Byte marks; UTF-32's begin with UTF-16's, so they come first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What tables come in that are not UTF-8; the first of those that fit equally well is taken.
_LEGACY = ("gb18030", "cp1252", "big5", "cp932", "euc_kr", "cp1251", "cp1250")
DELIMITERS = ",;\t|"
_QUOTED = re.compile(r'(?<![^,;\t|\r\n])"(?:[^"]+|"")*+"')
_HALF_WIDTH = re.compile("[\uff66-\uff9f]")


def encoding_of(head: bytes, name: str) -> str:
    """The encoding of a text that begins with ``head``, by its marks, strictly, or by its letters.

    Raises:
        InputError: no encoding fits well; the text says how to name one.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    head = head[:SAMPLE]
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

    # Only what is no ASCII tells encodings apart: lines without would drown the few that do. The
    # last line may be cut inside a letter of several bytes.
    whole = head.split(b"\n")[:-1] if len(head) == SAMPLE else head.split(b"\n")
    lines = [line for line in whole if not line.isascii()][:5000] or [head]
    text = b"\n".join(lines)
    if paired := _of_pairs(text):
        return paired
    found = [
        match
        for match in from_bytes(text, cp_isolation=list(_LEGACY))
        if not (match.encoding == "cp932" and _is_half_width(str(match)))
    ]
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
    if "cp1250" in fit and _reads_alike(text, "cp1250", "cp1252"):
        fit.add("cp1252")
    return next(encoding for encoding in _LEGACY if encoding in fit)


def _of_pairs(text: bytes) -> str | None:
    """Chinese or Korean, if what is no ASCII are pairs of bytes among the common letters of both.

    Words of one byte a letter have odd lengths, too; few texts hold such pairs alone. Chinese
    leads with B0 to D7, Korean with B0 to C8: a dozen letters tell.
    """
    try:
        letters = [c.encode("gb2312") for c in text.decode("gb2312") if not c.isascii()]
    except UnicodeError:
        return None
    if sum(0xB0 <= pair[0] <= 0xD7 for pair in letters) < 0.9 * len(letters):
        return None
    different = set(letters)
    korean = len(different) >= 12 and all(pair[0] <= 0xC8 for pair in different)
    return "euc_kr" if korean else "gb18030"


def _is_half_width(text: str) -> bool:
    """Whether letters are mostly half-width kana: Japanese has few, but any byte reads as one."""
    letters = sum(not c.isascii() for c in text)
    return len(_HALF_WIDTH.findall(text)) > letters / 2


def _reads_alike(text: bytes, one: str, other: str) -> bool:
    try:
        return text.decode(one) == text.decode(other)
    except UnicodeDecodeError:
        return False


def delimiter_of(text: str) -> str:
    """What separates the cells of a table that begins with ``text``: comma, semicolon, tab or bar.

    That which gives the line of names most cells and nearly every other line as many. The count
    of most lines alone would not do: between decimal commas stand as many semicolons.
    """
    lines = [line for line in re.split(r"\r\n|\r|\n", _QUOTED.sub("q", text)) if line.strip()][:200]
    if len(lines) > 1 and not text.endswith(("\n", "\r")):
        lines = lines[:-1]  # it may be cut short

    def fit(delimiter: str) -> tuple[bool, int]:
        counts = [line.count(delimiter) for line in lines]
        return counts.count(counts[0]) >= 0.9 * len(counts), counts[0]

    found = [d for d in DELIMITERS if lines and d in lines[0]]
    return max(found, key=fit, default=",")
