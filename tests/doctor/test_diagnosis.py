from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
import rich
from PIL import Image
from rich.console import Console

import patients
import truenorm as tn
from truenorm.doctor.checks.catalogue import CHECKS
from truenorm.doctor.codes import codes, page
from truenorm.doctor.diagnosis import Diagnosis
from truenorm.doctor.finding import Finding, Skipped


def finding(code="TN103", severity="error", layer="bn", cause="it does not fit", **given):
    title = next(check.title for check in CHECKS if check.code == code)
    return Finding(code, title, severity, layer, given.pop("evidence", {}), cause, "Mend it.")


def diagnosis(*findings, skipped=()):
    return Diagnosis(findings, ("TN101",), tuple(skipped), 53)


MANY = tuple(finding(layer=f"layer{i}.bn", evidence={"ratio": 2.0 + i}) for i in range(53))


def test_a_diagnosis_reads_as_text_and_as_json():
    model = patients.trained("mlp")
    patients.norms(model)[0].running_var[0] = float("nan")
    seen = tn.examine(model)
    for part in ("TN102", "error", "Statistics that are not finite", "not healthy: 1 error"):
        assert part in str(seen)
    read = json.loads(seen.to_json())
    assert read["healthy"] is False
    assert read["findings"][0]["code"] == "TN102"
    assert read["findings"][0]["evidence"] == {"not finite in running_var": 1}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_is_as_wide_as_the_terminal_and_plain(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    print(diagnosis(*MANY, finding(code="TN401", severity="note", cause="x " * 100)))
    lines = capsys.readouterr().out.splitlines()
    assert width - 30 < max(map(len, lines)) <= width
    assert "\x1b" not in "".join(lines)
    assert "".join(lines).isascii()  # some encodings cannot print box drawings
    assert all(line == line.rstrip() for line in lines)


def test_rich_prints_it_in_colour():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=100)
    console.print(diagnosis(*MANY))
    assert "\x1b[31m" in file.getvalue()
    assert "TN103" in file.getvalue()
    file = io.StringIO()
    rich.print(diagnosis(*MANY), file=file)
    assert "\x1b" not in file.getvalue()


def test_many_alike_are_one_row_and_one_article_and_all_in_json_and_sarif():
    seen = diagnosis(*MANY)
    told = " ".join(str(seen).split())
    assert str(seen).count("TN103") == 1
    for part in ("53 layers:", "layer0.bn,", "layer1.bn,", "layer2.bn,", "...", "ratio: 2 to 54"):
        assert part in told
    assert "layer3.bn" not in told
    assert "not healthy: 53 errors;" in told
    html = seen.to_html()
    assert html.count("<article") == 1
    assert all(html.count(f"<code>layer{i}.bn</code>") == 1 for i in range(53))
    assert len(json.loads(seen.to_json())["findings"]) == 53
    assert len(json.loads(seen.to_sarif())["runs"][0]["results"]) == 53


@pytest.mark.parametrize(
    ("one", "other", "rows"),
    [
        ({}, {"layer": "b"}, 1),
        (
            {"cause": "the bias of conv1 is lost: 64"},
            {"cause": "the bias of a.conv2 is lost: 9"},
            1,
        ),
        ({"cause": "it never ran"}, {"cause": "momentum is wrong"}, 2),
        ({"severity": "error"}, {"severity": "warning"}, 2),
        ({"code": "TN101"}, {"code": "TN102"}, 2),
    ],
)
def test_findings_are_grouped_that_differ_in_layers_and_numbers_alone(one, other, rows):
    seen = diagnosis(finding(**one), finding(**other))
    assert seen.to_html().count("<article") == rows
    assert str(seen).count("Mend it.") == rows


def test_evidence_of_a_group_is_a_range_or_a_few_names():
    made = [finding(layer=f"n{i}", evidence={"p": 0.3, "of": f"d{i}"}) for i in range(5)]
    told = " ".join(str(diagnosis(*made)).split())
    assert "p: 0.3; of: d0, d1, d2, ..." in told


def test_notes_are_last_and_a_line_each(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    notes = [finding(code="TN401", severity="note", layer=f"bn{i}") for i in range(40)]
    skipped = [Skipped(f"TN30{i}", "a title", "needs data") for i in range(1, 6)]
    lines = str(diagnosis(*notes, finding(), skipped=skipped)).splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("TN401")]
    assert len(at) == 1
    assert at[0] > next(i for i, line in enumerate(lines) if line.startswith("TN103"))
    assert lines[at[0]] == (
        "TN401 note  Bias before batch norm, 40 layers: bn0, bn1, bn2, ...: it does not fit"
    )
    assert "skipped, needs data: TN301, TN302, TN303, TN304, TN305" in lines
    assert lines[-1].startswith("not healthy: 1 error, 40 notes; 53 normalization layers")


def test_names_are_no_markup():
    seen = diagnosis(finding(layer="[red]<b>bn</b>", cause="[link=x]why"))
    assert "[red]<b>bn</b>" in str(seen)
    assert "[link=x]why" in str(seen)
    html = seen.to_html("<i>model</i>")
    assert "<b>bn" not in html
    assert "<i>model" not in html


def test_a_short_form_stands_where_a_repr_is_shown():
    assert repr(diagnosis(*MANY)) == (
        "<Diagnosis: not healthy: 53 errors; 53 normalization layers, 1 check passed, 0 skipped>"
    )
    assert ": not examined with data: no findings; " in repr(diagnosis())
    assert ": healthy: no findings; " in repr(dataclasses.replace(diagnosis(), with_data=True))


def test_a_finding_has_its_page():
    assert finding(code="TN204").page == page("TN204")


# -- SARIF ---------------------------------------------------------------------------------------


@pytest.fixture
def sarif():
    whole = finding(layer=None, evidence={"worst": float("inf")})
    twice = finding(code="TN304", severity="warning")
    return json.loads(diagnosis(whole, *MANY, twice, twice).to_sarif("a b/model.pt"))


def test_sarif_has_what_its_specification_requires(sarif):
    assert sarif["version"] == "2.1.0"
    (run,) = sarif["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "truenorm"
    ids = [rule["id"] for rule in driver["rules"]]
    assert ids == [check.code for check in CHECKS]
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"]
        assert rule["help"]["text"].startswith(f"# {rule['id']}: ")
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
        assert ".md)" not in rule["help"]["markdown"]  # a relative link leads nowhere
        assert "helpUri" not in rule
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == "a%20b/model.pt"
        assert place["physicalLocation"]["region"]["startLine"] == 1
        assert place["logicalLocations"][0]["name"]
    assert run["results"][0]["properties"]["evidence"] == {"worst": "inf"}


@pytest.mark.parametrize("target", ["model", "package.module:factory", "C:\\models\\a b.pt"])
def test_what_sarif_gives_as_uri_is_a_relative_one(target):
    (run,) = json.loads(diagnosis(finding()).to_sarif(target))["runs"]
    location = run["results"][0]["locations"][0]["physicalLocation"]
    uri = urlsplit(location["artifactLocation"]["uri"])
    assert not uri.scheme
    assert re.fullmatch(r"[\w%./-]+", uri.path)


def test_a_fingerprint_is_of_code_and_layer_and_of_nothing_else(sarif):
    def marks(log):
        rows = log["runs"][0]["results"]
        return [row["partialFingerprints"]["primaryLocationLineHash"] for row in rows]

    assert len(set(marks(sarif))) == 56
    changed = finding(layer="layer7.bn", severity="warning", cause="other", evidence={"ratio": 9.0})
    (again,) = marks(json.loads(diagnosis(changed).to_sarif()))
    assert again == marks(sarif)[8]


# -- HTML ----------------------------------------------------------------------------------------


def test_the_page_opens_offline():
    html = diagnosis(*MANY).to_html("runs/x")
    assert "<title>Diagnosis of runs/x</title>" in html
    assert "<script" not in html
    assert not re.search(r"https?:", html)


def test_a_notebook_gets_the_content_alone():
    html = diagnosis(*MANY)._repr_html_()
    assert "TN103" in html
    assert "<body" not in html
    styled = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    for rule in re.sub(r"/\*.*?\*/", "", styled, flags=re.S).split("}")[:-1]:
        for selector in rule.split("{")[0].split(","):
            assert ".truenorm-doctor" in selector, selector


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_chromium_draws_the_page_in_light_and_in_dark(tmp_path, dark):
    (tmp_path / "page.html").write_text(diagnosis(*MANY).to_html())
    shot = tmp_path / "shot.png"
    theme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,700",
         *theme, f"--screenshot={shot}", (tmp_path / "page.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    values = np.asarray(Image.open(shot).convert("L"))
    assert (np.median(values) < 60) == dark
    assert values.std() > 5


# -- codes ---------------------------------------------------------------------------------------


def test_the_documented_codes_are_those_that_are_looked_for():
    assert [(c.code, c.title) for c in codes()] == [(c.code, c.title) for c in CHECKS]
    for code, check in zip(codes(), CHECKS, strict=True):
        assert code.needs == ", ".join(check.needs)
        assert set(code.severities) <= {"error", "warning", "note"}
        assert page(code.code).startswith(f"# {code.code}: {code.title}\n")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.code)
def test_a_check_has_a_look_and_needs_what_its_looks_are_given(check):
    assert check.look or check.watched
    assert ("ledger" in check.needs) == (check.watched is not None)
    assert len(check.needs) == (check.look is not None) + (check.watched is not None)


def test_an_unknown_code_is_refused_with_the_nearest():
    with pytest.raises(tn.InputError, match=r"unknown code 'TN24'; did you mean TN204\?"):
        page("TN24")


# -- pytest --------------------------------------------------------------------------------------


def test_assert_healthy_says_what_where_why_and_what_to_do():
    model = patients.trained("resnet")
    for norm in patients.norms(model):
        norm.running_var[0] = float("nan")
    with pytest.raises(AssertionError) as failed:
        tn.assert_healthy(model)
    head, told, advice = str(failed.value).splitlines()
    assert re.fullmatch(r"not healthy: TN102; \d+ errors", head)
    assert re.match(r"  error TN102 \d+ layers: \S+, \S+, \S+, \.\.\.: Statistics that are", told)
    assert "(not finite in running_var: 1)" in told
    assert advice.startswith("    Load an older checkpoint")


def _pytest(folder, *tokens):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tokens, "."],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_the_plugin_shows_a_failure_at_the_test_s_own_line(tmp_path):
    (tmp_path / "test_net.py").write_text(
        "from torch import nn\n"
        "def test_net(assert_healthy):\n"
        "    net = nn.BatchNorm1d(2)\n"
        "    net.running_var[0] = float('nan')\n"
        "    assert_healthy(net)\n"
    )
    code, out = _pytest(tmp_path)
    assert code == 1
    assert "test_net.py:5: AssertionError" in out
    assert "diagnosis.py" not in out
    assert "not healthy: TN102" in out


def test_the_plugin_is_documented_cheap_and_can_be_left_out(tmp_path):
    (tmp_path / "test_none.py").write_text(
        "import sys\ndef test_none():\n    assert 'torch' not in sys.modules\n"
    )
    code, out = _pytest(tmp_path, "--fixtures")
    assert code == 0
    assert re.search(r"assert_healthy .*\n +``assert_healthy\(model, data\)``: fail the test", out)
    assert _pytest(tmp_path)[0] == 0
    code, out = _pytest(tmp_path, "-p", "no:truenorm", "--fixtures")
    assert code == 0
    assert "assert_healthy" not in out
