from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truenorm import InputError
from truenorm.data.readers.text import DELIMITERS, SAMPLE, delimiter_of, encoding_of

GBK = [
    ("男", "女"), ("是", "否"), ("红", "绿", "蓝"), ("北京", "上海", "广州"), ("良性", "恶性"),
    ("高", "中", "低"), ("猫", "狗"), ("一年级", "二年级"), ("张三", "李四", "王五"), ("有", "无"),
]  # fmt: skip
OTHERS = {
    "cp1252": [("café", "thé"), ("männlich", "größer"), ("España", "niño"), ("Zürich", "Genève")],
    "cp1251": [("да", "нет"), ("мужской", "женский"), ("Москва", "Казань"), ("кошка", "собака")],
    "cp932": [("はい", "いいえ"), ("赤", "青"), ("東京", "大阪")],
    "big5": [("臺北", "高雄"), ("紅色", "綠色")],
    "cp1250": [("kobieta", "mężczyzna"), ("žena", "muž")],
}
KOREAN = [*"가나다라마바사아자차카타파하"]


def written(words, encoding, header="id,age,kind,y"):
    lines = [f"{i},{20 + i % 50},{words[i % len(words)]},{i % 2}" for i in range(200)]
    return "\n".join([header, *lines, ""]).encode(encoding)


@pytest.mark.parametrize("words", GBK, ids="/".join)
@pytest.mark.parametrize("header", ["id,age,kind,y", "编号,年龄,种类,结果"])
def test_chinese_in_gbk_is_found_however_few_its_letters(words, header):
    raw = written(words, "gbk", header)
    assert raw.decode(encoding_of(raw, "t")) == raw.decode("gbk")


@pytest.mark.parametrize(
    ("encoding", "words"), [(e, w) for e, sets in OTHERS.items() for w in sets], ids=str
)
def test_other_encodings_are_found_by_their_letters(encoding, words):
    raw = written(words, encoding)
    assert raw.decode(encoding_of(raw, "t")) == raw.decode(encoding)


def test_korean_is_told_from_chinese_by_a_dozen_letters():
    raw = written(KOREAN, "euc_kr")
    assert encoding_of(raw, "t") == "euc_kr"


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-32", "utf-32"),
        ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"), ("ascii", "utf-8"),
    ],
)  # fmt: skip
def test_unicode_is_found_by_its_marks_or_strictly(encoding, found):
    assert encoding_of(written(("red", "blue"), encoding), "t") == found


def test_a_letter_cut_by_the_end_of_the_sample_hides_no_encoding():
    cut = 0
    for start in range(4):
        gbk, utf8 = (
            (b"x" * start + written(("红色的", "绿"), e) * 500)[:SAMPLE] for e in ("gbk", "utf-8")
        )
        assert encoding_of(gbk, "t") == "gb18030"
        assert encoding_of(utf8, "t") == "utf-8"
        cut += gbk.decode("gb18030", "replace")[-1] == "\ufffd"
    assert cut


@pytest.mark.parametrize("raw", [b"a,b\n1\0,2\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(20)])
def test_zero_bytes_are_refused(raw):
    with pytest.raises(InputError, match="t: holds zero bytes"):
        encoding_of(raw, "t")


def test_what_fits_no_encoding_is_refused_with_those_tried():
    raw = bytes(range(1, 256)) * 20
    with pytest.raises(InputError, match=r"no encoding known here fits \(gb18030, .* --encoding"):
        encoding_of(raw, "t")


@given(st.binary(min_size=1, max_size=400))
def test_any_bytes_have_an_encoding_or_are_refused(raw):
    try:
        encoding = encoding_of(raw, "t")
    except InputError:
        return
    raw.decode(encoding, "replace")


@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_separates_the_cells_is_found(delimiter, end):
    rows = [["name", "size", "k"], ["ab", "1", "x"], ["c", "2", "y"]] * 5
    assert delimiter_of(end.join(delimiter.join(row) for row in rows)) == delimiter


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a;b;k\n" + "1,5;2,5;x\n" * 50, ";"),  # commas stand in as many places as semicolons
        ("a,k\n" + '"1;2;3",x\n' * 9, ","),
        ("a,k\n" + '"he said ""a;b;c""\n and more; much",x\n' * 9, ","),
        ('"a";"k"\n"1";"x"\n', ";"),
        ("k\nx\ny\n", ","),
        ('"k"\n"x"\n', ","),
        ("a,b\n", ","),
        ("a\tb", "\t"),
        ("a,text,k\n" + "1,two; or three; words | bars,x\n" * 9, ","),
        ("a,k\n" + "1," + "q" * 200_000 + "\n", ","),  # longer than csv's module takes
        ('a,k\n1,"' + "x\n" * 100_000, ","),  # a quote that never closes
        ("", ","),
    ],
)
def test_quotes_decimal_commas_and_texts_mislead_it_not(text, delimiter):
    assert delimiter_of(text) == delimiter
