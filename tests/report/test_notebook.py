"""What a notebook shows of results: a table that says what was found, and escapes what is named."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from torch import nn

import truenorm
from foldable import images, lively
from samples import blobs
from truenorm.training.history import Epoch, History


class _Shown(HTMLParser):
    """The cells and lines of a page, and whether every tag is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {"p": [], "th": [], "td": []}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def shown(result: object) -> dict[str, list[str]]:
    html = result._repr_html_()
    assert "<script" not in html
    page = _Shown()
    page.feed(html)
    assert not page.open
    return page.texts


def test_a_history_shows_its_epochs_and_marks_the_best():
    epochs = (
        Epoch(1, 0.5, 0.4, 0.875, 0.1, 0.2, best=True),
        Epoch(2, 0.25, 0.5, float("nan"), 0.1, 0.4, best=False),
    )
    texts = shown(History(epochs, 1, "nan", 0.4, "the loss is NaN at <step> 7"))
    assert texts["td"] == [
        *("1", "0.5000", "0.4000", "87.50%", "0.1", "0.2", "best"),
        *("2", "0.2500", "0.5000", "-", "0.1", "0.4", ""),
    ]
    assert texts["p"] == [
        "stopped: nan; the model is that of epoch 1",
        "the loss is NaN at <step> 7",
    ]


def test_a_fold_shows_its_pairs_and_what_was_left():
    torch.manual_seed(0)
    train = nn.BatchNorm2d(4).train()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), train)
    lively(model)[3].train()
    texts = shown(truenorm.fold(model, images()))
    assert texts["td"][:3] == ["1", "into producer", "0"]
    assert texts["td"][4:] == ["3", "left: is in train mode; call model.eval() first", "", ""]
    assert texts["p"][0].startswith("1 folded, 1 left; largest error from end to end ")


def test_a_study_shows_its_variants_and_verdicts():
    changes = {"epochs": 1, "widths": (8,)}
    study = truenorm.compare(
        blobs(90), norms=("batch", "none"), seeds=2, processes=0, changes=changes
    )
    texts = shown(study)
    assert texts["td"][0::6] == ["batch/16", "none/16"]
    assert texts["td"][1::6] == ["2", "2"]
    assert texts["p"] == str(study).splitlines()
