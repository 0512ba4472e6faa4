"""Pages that everyone can read: drawings that say what they show, tables that can be sorted."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import truenorm
from truenorm import canvas
from truenorm.models import ModelSpec
from truenorm.report import study
from truenorm.report.run_page import render
from truenorm.training import job

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page of a run and one of a study."""
    folder = tmp_path_factory.mktemp("pages")
    work = job.start("iris", ModelSpec(), changes={"epochs": 2}, folder=folder / "r")
    found = truenorm.compare(
        "iris", norms=("none", "batch"), seeds=3, processes=0, changes={"epochs": 2}
    )
    return {"run": render(work, work.execute()), "study": study.html(found)}


@pytest.fixture(params=["run", "study"])
def text(pages: dict[str, str], request: pytest.FixtureRequest) -> str:
    return pages[request.param]


def drawings(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(t) for t in re.findall(r"<svg.*?</svg>", text, re.S)]


def test_every_drawing_has_a_role_a_title_and_a_description_with_numbers(text: str) -> None:
    found = drawings(text)
    assert found
    for drawing in found:
        assert drawing.get("role") == "img"
        named = {e.get("id"): e for e in drawing}
        title, description = (named[i] for i in drawing.get("aria-labelledby", "").split())
        assert title.tag == f"{SVG}title"
        assert title.text
        assert description.tag == f"{SVG}desc"
        assert re.search(r"\d", description.text or "")


def test_no_two_elements_of_a_page_have_one_identifier(text: str) -> None:
    class Ids(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str | None] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for key, value in attrs if key == "id"]

    ids = Ids()
    ids.feed(text)
    assert len(ids.found) == len(set(ids.found)) > 10
    for name in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert (name[0] or name[1]) in ids.found


def test_each_point_says_its_value(pages: dict[str, str]) -> None:
    loss = drawings(pages["run"])[0]
    told = [e.text for e in loss.iter(f"{SVG}title")]
    assert any(re.fullmatch(r"epoch 1, training: [\d.]+", t or "") for t in told)
    assert any(re.fullmatch(r"epoch 2, validation: [\d.]+", t or "") for t in told)


def test_sortable_tables_have_a_head_and_a_body(text: str) -> None:
    tables = re.findall(r'<table class="[^"]*sortable.*?</table>', text, re.S)
    assert tables
    for table in tables:
        assert table.count("<thead>") == table.count("<tbody>") == 1
        assert "<th>" not in table  # each says whether it heads a column or a row


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_what_is_drawn_or_written_stands_out_from_its_ground() -> None:
    style = Path(truenorm.__file__).parent / "style.html"
    found = re.findall(r'"([\w-]+)": \("(#\w{6})", "(#\w{6})"\)', style.read_text())
    colours = {name: (light, dark) for name, light, dark in found}
    grounds = [colours.pop("page"), colours.pop("card")]
    colours.pop("line")  # of grids and borders, which say nothing
    assert len(colours) > 15
    for (name, pair), ground in itertools.product(colours.items(), grounds):
        for colour, behind in zip(pair, ground, strict=True):
            assert contrast(colour, behind) >= 4.5, (name, colour, behind)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_no_two_series_share_both_dashes_and_marks() -> None:
    styles = list(zip(map(str, canvas.DASHES), canvas.MARKS, strict=True))
    assert len(set(styles)) == len(canvas.SERIES)
