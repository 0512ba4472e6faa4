from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from truenorm import ModelSpec, Splits, build, dataset
from truenorm.report import run_page as html
from truenorm.training import job
from truenorm.training.judgement import confusion, judge, view_norms, worst


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a small convnet on digits, and its outcome."""
    folder = tmp_path_factory.mktemp("report") / "run"
    spec = ModelSpec(name="convnet", widths=(4, 8))
    work = job.start("digits", spec, changes={"epochs": 4, "amp": "off"}, folder=folder)
    outcome = work.execute()
    text = html.render(work, outcome)
    work.run.save_report(text)
    return folder / "report.html", outcome, text


def test_the_report_opens_offline(page):
    _, _, text = page
    # Namespaces are names, and are not fetched.
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text))
    assert all(a.startswith(("data:", "#")) for a in addresses), addresses
    assert text.count("<script") == 1


def test_the_report_shows_all_its_parts(page):
    _, outcome, text = page
    accuracy = f"{100 * outcome.judgement.scores.accuracy:.2f} %"
    for part in (accuracy, "Learning curves", "Confusion matrix", "Worst mistakes",
                 "The normalization at work", "running variance", "gamma (weight)",
                 "prefers-color-scheme: dark", f"best: epoch {outcome.history.best_epoch}",
                 ">before<", ">after<"):  # fmt: skip
        assert part in text, part
    assert text.count("BatchNorm2d") == 2
    assert text.count("data:image/png") == len(outcome.judgement.mistakes) > 0


def test_the_drawings_take_their_colours_from_the_page(page):
    _, _, text = page
    assert "var(--main)" in text
    assert not re.search(r"#0[1-9a-f]0[2-9a-f]0[3-9a-f]\b", text)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_chromium_draws_the_report_in_light_and_in_dark(page, tmp_path, dark):
    path, _, _ = page
    shot = tmp_path / "shot.png"
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,3000",
        *scheme, f"--screenshot={shot}", path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("L")).astype(float)
    corner = pixels[:8, :8].mean()
    assert corner < 60 if dark else corner > 220
    assert pixels.std() > 5  # more than an empty page


def test_a_report_on_rows_lists_mistakes_and_names(tmp_path):
    work = job.start("iris", ModelSpec(norm="none"), changes={"epochs": 2}, folder=tmp_path / "r")
    text = html.render(work, work.execute())
    assert "This model has no normalization layer" in text
    assert "setosa" in text
    assert "data:image/png" not in text


def test_labels_from_the_data_cannot_break_the_page(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array(["<script>alert(1)</script>", "b & c"])[np.arange(60) % 2]
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(60, 3)), y=labels)
    work = job.start(str(tmp_path / "d.npz"), ModelSpec(), changes={"epochs": 1},
                     folder=tmp_path / "r")  # fmt: skip
    text = html.render(work, work.execute())
    assert text.count("<script") == 1
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text


def test_a_hundred_classes_are_summed_up_instead_of_drawn(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(800, 3)), y=np.arange(800) % 100)
    work = job.start(str(tmp_path / "d.npz"), ModelSpec(), changes={"epochs": 1},
                     folder=tmp_path / "r")  # fmt: skip
    text = html.render(work, work.execute())
    assert 'class="matrix"' not in text
    assert "Most often confused" in text


def small():
    x = np.arange(12.0).reshape(6, 2)
    return dataset(x, [0, 1, 2, 0, 1, 2])


LOGITS = torch.tensor(
    [[5.0, 0, 0], [5, 0, 0], [0, 0, 5], [9, 0, 0], [0, 5, 0], [1, 2, 0]], dtype=torch.float64
)


def test_confusion_counts_true_rows_and_predicted_columns():
    assert confusion(LOGITS, small()).tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_the_worst_mistakes_come_first_with_their_confidence():
    found = worst(LOGITS, small())
    assert [(m.number, m.true, m.predicted) for m in found] == [(1, 1, 0), (5, 2, 1)]
    assert found[0].confidence == pytest.approx(np.exp(5) / (np.exp(5) + 2))


def test_looking_at_norms_changes_nothing_and_sees_what_they_do():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].running_mean.copy_(torch.tensor([5.0, 6.0]))
        model[0].running_var.fill_(4.0)
    data = small()
    splits = Splits(data, data, scaling=None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (view,) = view_norms(model, data, splits.scaling, torch.device("cpu"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not model[0]._forward_hooks
    assert (view.name, view.kind, view.running_mean) == ("0", "BatchNorm1d", [5.0, 6.0])
    x = splits.scaling(data.x)
    assert view.before.low == pytest.approx(x.min().item())
    expected = ((x - torch.tensor([5.0, 6.0])) / (4 + 1e-5) ** 0.5).max().item()
    assert view.after.high == pytest.approx(expected)
    assert sum(view.before.counts) == x.numel()


def test_without_a_test_part_the_validation_part_is_judged(splits):
    model = build(ModelSpec(), (6,), 3, seed=0)
    assert judge(model, splits).part == "validation"
