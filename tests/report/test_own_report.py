from __future__ import annotations

import importlib
import re

import pytest
import torch
from torch import nn

import truenorm
from truenorm import InputError, TrainConfig


@pytest.fixture
def trained(splits):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    config = TrainConfig(epochs=3, batch_size=16)
    return model, truenorm.fit(model, splits, config), config


def test_the_page_of_a_module_of_ones_own_is_whole_and_self_contained(tmp_path, splits, trained):
    model, history, config = trained
    path = tmp_path / "out" / "report.html"
    truenorm.report(model, history, splits, path, config=config)
    page = path.read_text("utf-8")
    assert "<h1>Sequential on data</h1>" in page
    scores = truenorm.evaluate(model, splits)
    assert f"{100 * scores.accuracy:.2f} %" in page
    assert "BatchNorm1d" in page
    assert '<th scope="row">batch_size</th><td>16</td>' in page
    assert page.count("<svg") >= 3
    links = re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*", page)
    assert not links
    assert "@import" not in page


def test_it_is_called_by_its_name_whatever_was_imported(tmp_path, splits, trained):
    importlib.import_module("truenorm.report.run_page")
    truenorm.report(*trained[:2], splits, tmp_path / "a.html")
    head = (tmp_path / "a.html").read_text("utf-8").partition("<svg")[0]
    assert "None" not in head


def test_a_history_without_accuracy_has_no_curve_of_it(tmp_path, splits, trained):
    model, _, config = trained
    data = [(part.x, torch.eye(3)[part.y]) for part in (splits.train, splits.valid)]
    history = truenorm.fit(model, data, config, loss=nn.BCEWithLogitsLoss())
    truenorm.report(model, history, splits, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


def test_data_without_classes_and_places_that_cannot_be_written_are_refused(
    tmp_path, splits, trained
):
    model, history, _ = trained
    with pytest.raises(InputError, match="a report needs Splits"):
        truenorm.report(model, history, [splits.train, splits.valid], tmp_path / "a.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="could not be written"):
        truenorm.report(model, history, splits, tmp_path / "folder")
