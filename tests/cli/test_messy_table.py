"""A messy table (GBK, semicolons, gaps, dates, categories, ids) through every command."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

HEADER = ["编号", "年龄", "城市", "吸烟", "日期", "备注", "结果"]


def rows(count, seed, cities=("北京", "上海", "广州")):
    rng = np.random.default_rng(seed)
    for i in range(count):
        age = int(rng.integers(20, 80))
        yield [
            f"P{i:03}", "" if rng.random() < 0.1 else str(age), str(rng.choice(cities)),
            ("true", "false")[i % 2], f"2024-01-{i % 28 + 1:02}", f"note {i}, made; up",
            "恶性" if (age > 55) ^ (rng.random() < 0.05) else "良性",
        ]  # fmt: skip


def write(path, made, encoding="gb18030"):
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([HEADER, *made])


TRAIN = ("train", "--data", "患者.CSV", "--target", "结果", "--id", "编号", "--run-dir", "r")


@pytest.fixture(name="trained")
def _trained(cli, tmp_path):
    write(tmp_path / "患者.CSV", rows(300, 0))
    code, out, err = cli(*TRAIN, "--epochs", 8, "--class-weight", "balanced")
    assert (code, err) == (0, "")
    return out


def answers(out):
    return list(csv.DictReader(io.StringIO(out)))


def test_what_became_of_each_column_is_printed_and_the_report_names_rows(trained, tmp_path):
    told = " ".join(trained.split())
    for part in (
        "read as gb18030", "年龄 number as it is; empty cells become the median",
        "城市 category one of 3: 上海, 北京, 广州", "吸烟 boolean 0 or 1",
        "日期 left out holds dates", "备注 left out", "class weights balanced", "balanced accuracy",
    ):  # fmt: skip
        assert part in told
    page = (tmp_path / "r" / "report.html").read_text("utf-8")
    assert ">P" in page  # the worst mistakes by their ids


def test_prediction_keeps_ids_and_tells_what_the_model_does_not_know(cli, tmp_path, trained):
    new = list(rows(20, 1, cities=("北京", "深圳")))
    new[3][1] = ""
    write(tmp_path / "new.csv", new, "utf-16")
    code, out, err = cli("predict", "r", "new.csv", "--id", "编号")
    assert code == 0
    assert [row["编号"] for row in answers(out)] == [row[0] for row in new]
    assert "深圳" in err
    assert "accuracy" in err
    right = [a["class"] == row[-1] for a, row in zip(answers(out), new, strict=True)]
    assert sum(right) >= 14


def test_folded_and_exported_it_answers_alike(cli, tmp_path, trained):
    write(tmp_path / "new.csv", rows(20, 1, cities=("北京", "深圳")))
    said = {}
    for name in ("r", "f.safetensors", "m.onnx", "m.pt2"):
        if name != "r":
            code, _, err = cli("fold" if name.startswith("f") else "export", "r", "-o", name)
            assert code == 0, err
        code, out, err = cli("predict", name, "new.csv", "--id", "编号")
        assert code == 0, err
        said[name] = answers(out)
    for name, found in said.items():
        for ours, theirs in zip(said["r"], found, strict=True):
            assert ours["class"] == theirs["class"], name
            assert float(ours["p(恶性)"]) == pytest.approx(float(theirs["p(恶性)"]), abs=2e-5)


def test_it_goes_on_is_examined_and_compared(cli, tmp_path, trained):
    code, out, err = cli("train", "--resume", "r", "--epochs", 10, "--json")
    assert code == 0, err
    assert json.loads(out)["epochs"] > 8
    code, out, err = cli("doctor", "r", "--require-data", "--fail-on", "error")
    assert code == 0, out + err
    assert "not examined" not in out
    code, out, err = cli("compare", "--data", "患者.CSV", "--target", "结果", "--id", "编号",
                         "--norm", "batch,none", "--seeds", 2, "--epochs", 1, "--processes", 0,
                         "--json", "--quiet")  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["rows"]) == 4


def test_gaps_are_refused_by_choice(cli, tmp_path):
    write(tmp_path / "患者.CSV", rows(60, 0))
    code, _, err = cli(*TRAIN, "--missing", "refuse")
    assert code == 2
    assert "年龄" in err
    assert not (tmp_path / "r").exists()
