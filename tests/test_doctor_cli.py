from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import patients
import truenorm as tn
from truenorm.cli import main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on iris, trained long enough for its statistics to fit."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", "iris", "--quiet", "--run-dir", str(folder), "--seed", "1"])
    assert ended.value.code == 0
    return folder


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A module ``ill`` with factories, beside the caller."""
    (tmp_path / "ill.py").write_text(
        "import patients\n"
        "def model():\n"
        "    model = patients.trained('mlp')\n"
        "    patients.norms(model)[0].running_var.div_(60)\n"
        "    return model, patients.batches('mlp')\n"
        "def nothing():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("ill", None)
    return tmp_path


def said(capsys, *tokens):
    with pytest.raises(SystemExit) as ended:
        main(list(tokens))
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_a_healthy_run_exits_with_0(run_folder, capsys):
    code, out, _ = said(capsys, "doctor", str(run_folder), "--json")
    assert code == 0, out
    assert json.loads(out)["healthy"] is True


def test_findings_exit_with_1_and_are_told(factory, capsys):
    code, out, _ = said(capsys, "doctor", "ill:model")
    assert code == 1
    assert "TN103" in out
    assert "not healthy" in out


def test_a_fix_is_written_and_is_healthy(factory, capsys):
    code, _, _ = said(capsys, "doctor", "ill:model", "--fix", "-o", "mended.safetensors")
    assert code == 0
    mended = patients.trained("mlp")
    mended.load_state_dict(safetensors.torch.load_file(factory / "mended.safetensors"))
    assert tn.examine(mended, patients.batches("mlp")).healthy


def test_a_baseline_forgives_what_was_known(factory, capsys):
    _, out, _ = said(capsys, "doctor", "ill:model", "--format", "json")
    (factory / "known.json").write_text(out)
    assert said(capsys, "doctor", "ill:model", "--baseline", "known.json")[0] == 0
    (factory / "known.json").write_text("[]")
    code, _, err = said(capsys, "doctor", "ill:model", "--baseline", "known.json")
    assert code == 2
    assert "is no diagnosis" in err


def test_sarif_has_a_rule_for_each_code_and_a_result_for_each_finding(factory, capsys):
    _, out, _ = said(capsys, "doctor", "ill:model", "--format", "sarif")
    (run,) = json.loads(out)["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert len(rules) == 27
    assert {r["ruleId"] for r in run["results"]} <= rules
    assert any(r["ruleId"] == "TN103" and r["level"] == "error" for r in run["results"])


def test_a_page_is_whole_and_opens_offline(factory, capsys):
    said(capsys, "doctor", "ill:model", "--format", "html", "-o", "page.html")
    page = (factory / "page.html").read_text()
    assert "TN103" in page
    assert "http" not in page


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_checkpoint_is_examined_by_its_buffers(suffix, tmp_path, capsys):
    model = patients.trained("resnet")
    path = tmp_path / f"model.{suffix}"

    def save():
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        if suffix == "pt":
            torch.save({"state_dict": state, "epoch": 3}, path)
        else:
            safetensors.torch.save_file(state, path)

    save()
    assert said(capsys, "doctor", str(path))[0] == 0
    name, norm = next((n, m) for n, m in model.named_modules() if m in patients.norms(model))
    norm.running_var[2] = float("nan")
    save()
    code, out, _ = said(capsys, "doctor", str(path), "--json")
    assert code == 1
    (finding,) = json.loads(out)["findings"]
    assert (finding["code"], finding["layer"]) == ("TN102", name)


def test_recalibration_goes_through_all_of_the_data(factory, capsys):
    (factory / "ill.py").write_text(
        "import patients\n"
        "def long():\n"
        "    return patients.trained('mlp'), patients.batches('mlp', 50)\n"
    )
    _, out, _ = said(capsys, "recalibrate", "ill:long", "-o", "new.safetensors", "--json")
    told = json.loads(out)
    assert told["batches"] == 45  # a tenth is held out


def test_recalibration_is_written_only_if_it_is_no_worse(run_folder, factory, capsys):
    code, out, _ = said(
        capsys, "recalibrate", "ill:model", "-o", str(factory / "new.safetensors"), "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert told["kept"]
    assert told["after"]["loss"] < told["before"]["loss"]
    assert (factory / "new.safetensors").exists()
    code, _, _ = said(
        capsys, "recalibrate", str(run_folder), "-o", str(factory / "run.safetensors")
    )
    assert (factory / "run.safetensors").exists() == (code == 0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["doctor"], "doctor needs a target"),
        (["doctor", "nowhere"], "cannot examine 'nowhere'"),
        (["doctor", "none.pt"], "no such file"),
        (["doctor", "ill:nothing"], "returned int, not a torch.nn.Module"),
        (["doctor", "ill:absent"], "has no attribute 'absent'"),
        (["doctor", "ill:model", "--fix"], "--fix needs --out"),
        (["doctor", "--explain", "TN999"], "unknown code 'TN999'"),
    ],
)
def test_what_cannot_be_examined_exits_with_2(factory, capsys, tokens, message):
    code, _, err = said(capsys, *tokens)
    assert code == 2
    assert message in err


def test_every_code_is_listed_and_explained(capsys):
    code, out, _ = said(capsys, "doctor", "--list")
    assert code == 0
    codes = [line.split()[0] for line in out.splitlines()]
    assert len(codes) == 27
    for one in codes:
        code, out, _ = said(capsys, "doctor", "--explain", one)
        assert code == 0
        assert out.startswith(f"# {one}: ")


def test_help_of_all_commands_needs_no_torch():
    asked = "import sys, truenorm.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{asked}sys.exit('torch' in sys.modules)"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
