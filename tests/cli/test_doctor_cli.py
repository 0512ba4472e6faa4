from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import patients
import truenorm as tn
from truenorm.cli import main
from truenorm.doctor.checks.catalogue import CHECKS


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on iris, trained long enough for its statistics to fit."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", "iris", "--quiet", "--run-dir", str(folder), "--seed", "1"])
    assert ended.value.code == 0
    return folder


FACTORIES = """
import patients, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CONSTANT = 3
ready = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

def model():
    model = patients.trained("mlp")
    patients.norms(model)[0].running_var.div_(60)
    return model, patients.batches("mlp")

def biased(model):  # a note for each norm
    for layer in [m for m in model if isinstance(m, nn.Linear) and m.bias is None]:
        layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return model

def ill_and_noted():
    ill, data = model()
    return biased(ill), data

def only_noted():
    return biased(patients.trained("mlp")), patients.batches("mlp", 40)

def bare():
    return patients.trained("mlp")

def loader():
    x, y = (torch.cat(part) for part in zip(*patients.batches("mlp", 40), strict=True))
    return patients.trained("mlp"), DataLoader(TensorDataset(x, y), 24)

def ending():  # a last batch of one, far behind those that are looked at
    x, y = (torch.cat(part) for part in zip(*patients.batches("mlp", 60), strict=True))
    return patients.trained("mlp").train(), DataLoader(TensorDataset(x[:-23], y[:-23]), 24)

def stream():
    return patients.trained("mlp"), iter(patients.batches("mlp", 50))

def talks():
    print("hello")
    return model()

def wrong_data():
    return patients.trained("mlp"), patients.batches("convnet")

def no_batches():
    return patients.trained("mlp"), 3

def sick():  # beyond what a remedy reaches
    model = patients.trained("mlp")
    patients.norms(model)[1].weight.data[0] = float("nan")
    return model

def raises():
    raise RuntimeError("no weights\\nanywhere")

def leaves():
    raise SystemExit(0)

def lacks():
    return object().attribute

def none():
    return None

def nothing():
    return 3

def three():
    return 1, 2, 3

def asks(path):
    return path
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A module ``ill`` with factories, and others that do not import, beside the caller."""
    (tmp_path / "ill.py").write_text(FACTORIES)
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    (tmp_path / "broken.py").write_text("def model(:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("ill", "needy", "broken", "script"):
        sys.modules.pop(name, None)
    return tmp_path


def said(capsys, *tokens):
    with pytest.raises(SystemExit) as ended:
        main([str(token) for token in tokens])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def refused(capsys, *tokens):
    """The one message on stderr of a command that ends with 2."""
    code, out, err = said(capsys, *tokens)
    assert code == 2
    assert out == ""
    assert err.startswith("truenorm: ")
    assert err.count("\n") == 1
    return err


def codes_in(text):
    return {(f["code"], f["layer"]) for f in json.loads(text)["findings"]}


# -- what is examined ----------------------------------------------------------------------------


def test_a_healthy_run_exits_with_0(run_folder, capsys):
    code, out, _ = said(capsys, "doctor", run_folder, "--json")
    assert code == 0, out
    assert json.loads(out)["healthy"] is True


def test_findings_exit_with_1_and_are_told(factory, capsys):
    code, out, err = said(capsys, "doctor", "ill:model")
    assert code == 1
    assert "TN103" in out
    assert "not healthy" in out
    assert err == ""


@pytest.mark.parametrize("name", ["bare", "ready", "loader", "stream"])
def test_a_factory_may_give_a_model_alone_or_with_any_iterable(name, factory, capsys):
    code, out, _ = said(capsys, "doctor", f"ill:{name}", "--json")
    assert code == 0, out
    looked = "TN103" in json.loads(out)["passed"]
    assert looked == (name in ("loader", "stream"))


def test_the_last_batch_of_a_loader_is_seen_however_long_it_is(factory, capsys):
    _, out, _ = said(capsys, "doctor", "ill:ending", "--json")
    assert "TN302" in {code for code, _ in codes_in(out)}


def test_what_a_factory_prints_is_not_among_the_diagnosis(factory, capsys):
    _, out, err = said(capsys, "doctor", "ill:talks", "--json")
    assert not json.loads(out)["healthy"]
    assert "hello" in err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "cannot examine 'nowhere': it is no run folder"),
        ("ill.py", "ill.py: is no checkpoint"),
        (".", "holds no run (no config.json)"),
        ("ill.py:model", "give the module as it is imported, ill:model"),
        ("ill:", "give package.module:factory"),
        ("il:model", "no module named 'il'; did you mean ill?"),
        ("ill:modle", "has no attribute 'modle'; did you mean model?"),
        ("ill:absent", "has no attribute 'absent'"),
        ("needy:model", "No module named 'no_such_package' (needy.py, line 1)"),
        ("broken:model", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("script:model", "SystemExit: 0 (script.py, line 2)"),
        ("ill:raises", "ill:raises: RuntimeError: no weights anywhere (ill.py, line "),
        ("ill:leaves", "SystemExit: 0 (ill.py, line "),
        ("ill:lacks", "'object' object has no attribute 'attribute' (ill.py, line "),
        ("ill:none", "returned NoneType, not a torch.nn.Module"),
        ("ill:nothing", "returned int, not a torch.nn.Module"),
        ("ill:three", "returned tuple, not a torch.nn.Module; a factory returns a model, or"),
        ("ill:asks", "ill:asks: takes path, and a factory is given nothing"),
        ("ill:CONSTANT", "is a int, not a function"),
        ("ill:wrong_data", "ill:wrong_data could not be examined: RuntimeError: mat1 and mat2"),
        ("ill:no_batches", "data must be batches that can be iterated, got int"),
    ],
)
def test_what_cannot_be_examined_exits_with_2_and_one_message(factory, capsys, target, message):
    assert message in refused(capsys, "doctor", target)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "doctor needs a target"),
        (["ill:model", "--fix"], "--fix needs --out"),
        (["ill:model", "--fix", "-o", "."], ".: is a folder; --out names a file"),
        (["ill:model", "-o", "ill.py/d.json"], "could not be written"),
        (["ill:model", "--data", "nowhere"], "data 'nowhere' is neither a file or folder"),
        (["ill:model", "--data", "iris"], "could not be examined: RuntimeError: mat1 and mat2"),
        (["ill:model", "--format", "bogus"], 'Invalid value "bogus" for --format'),
        (["ill:model", "--fail-on", "bogus"], 'Invalid value "bogus" for --fail-on'),
        (["ill:model", "--baseline", "none.json"], "none.json: no such file"),
        (["--explain", "TN999"], "unknown code 'TN999'"),
    ],
)
def test_options_that_do_not_fit_exit_with_2_and_one_message(factory, capsys, tokens, message):
    assert message in refused(capsys, "doctor", *tokens)


def test_json_and_another_format_contradict_each_other(factory, capsys):
    code, out, _ = said(capsys, "doctor", "ill:model", "--json", "--format", "html")
    assert code == 2
    assert "contradict" in json.loads(out)["error"]


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def state():
    """A ResNet's state dict, in which one batch norm is sick, and that one's name."""
    model = patients.trained("resnet")
    name, norm = [(n, m) for n, m in model.named_modules() if m in patients.norms(model)][2]
    norm.running_var[2] = float("nan")
    return {k: v.contiguous() for k, v in model.state_dict().items()}, name


def prefixed(state, prefix):
    return {f"{prefix}{key}": value.clone() for key, value in state.items()}


@pytest.mark.parametrize(
    "held",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"epoch": 3, "trainer": {"nets": [state]}, "optimizer": {"state": {0: {}}}},
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: prefixed(state, "module._orig_mod."),
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        lambda state: {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()},
        lambda state: {k: v for k, v in state.items() if "running" in k},
    ],
)
def test_a_checkpoint_is_examined_under_the_bare_model_s_names(held, state, tmp_path, capsys):
    tensors, name = state
    torch.save(held(tensors), tmp_path / "model.pt")
    code, out, _ = said(capsys, "doctor", tmp_path / "model.pt", "--json")
    assert code == 1
    assert ("TN102", name) in codes_in(out)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "ckpt", "bin"])
def test_a_healthy_checkpoint_exits_with_0(suffix, tmp_path, capsys):
    state = {k: v.contiguous() for k, v in patients.trained("resnet").state_dict().items()}
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(state, tmp_path / f"model.{suffix}")
    code, out, _ = said(capsys, "doctor", tmp_path / f"model.{suffix}", "--json")
    assert code == 0
    assert json.loads(out)["layers"] == len(patients.norms(patients.trained("resnet")))


def two_copies(healthy):
    one = {k: v.contiguous() for k, v in patients.trained("resnet").state_dict().items()}
    move = 0 if healthy else 3
    return one, {k: v + move if k.endswith("running_mean") else v.clone() for k, v in one.items()}


COPIES = {
    "model and model_ema": lambda a, b: prefixed(a, "model.") | prefixed(b, "model_ema."),
    "student and teacher": lambda a, b: prefixed(a, "student.") | prefixed(b, "teacher."),
    "wrapped": lambda a, b: prefixed(a, "module.net.") | prefixed(b, "module.ema._orig_mod."),
    "two state dicts": lambda a, b: {"state_dict": a, "state_dict_ema": b, "epoch": 2},
}


@pytest.mark.parametrize("healthy", [True, False])
@pytest.mark.parametrize("kind", COPIES)
def test_two_copies_in_a_checkpoint_are_compared(kind, healthy, tmp_path, capsys):
    torch.save(COPIES[kind](*two_copies(healthy)), tmp_path / "two.pt")
    code, out, _ = said(capsys, "doctor", tmp_path / "two.pt", "--json")
    assert code == (0 if healthy else 1)
    assert ("TN107" in {code for code, _ in codes_in(out)}) == (not healthy)


def test_copies_in_safetensors_are_compared_too(tmp_path, capsys):
    one, other = two_copies(healthy=False)
    safetensors.torch.save_file(
        prefixed(one, "model.") | prefixed(other, "model_ema."), tmp_path / "two.safetensors"
    )
    _, out, _ = said(capsys, "doctor", tmp_path / "two.safetensors", "--json")
    (found,) = json.loads(out)["findings"]
    assert found["code"] == "TN107"
    assert found["layer"].startswith("model_ema.")
    assert found["layer"].removeprefix("model_ema.") + ".running_mean" in one


def test_a_batch_norm_alone_and_odd_names_are_no_trouble(tmp_path, capsys):
    torch.save(nn.BatchNorm1d(4).state_dict(), tmp_path / "one.pt")
    assert said(capsys, "doctor", tmp_path / "one.pt")[0] == 0
    held = {"training": {"forward": nn.BatchNorm1d(4).state_dict()}, "eval": {"a": torch.ones(2)}}
    held |= {"scalar.running_mean": torch.tensor(1.0), "scalar.running_var": torch.tensor(1.0)}
    torch.save(held, tmp_path / "odd.pt")
    assert said(capsys, "doctor", tmp_path / "odd.pt")[0] == 0
    mixed = nn.BatchNorm1d(4).state_dict() | {
        "weight": torch.ones(4, 3),
        "weight.child": torch.ones(2),
        "num_batches_tracked": torch.zeros(2),
        "narrow": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "count": torch.tensor(3),
    }
    torch.save(mixed, tmp_path / "mixed.pt")
    assert said(capsys, "doctor", tmp_path / "mixed.pt")[0] == 0


def _script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Sequential(nn.BatchNorm1d(2))).save(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", None, "a.pt: no such file"),
        ("a.pt", lambda path: path.touch(), "is empty"),
        ("a.safetensors", lambda path: path.touch(), "is empty"),
        ("a.pt", lambda path: path.write_bytes(b"hello" * 50), "is damaged, or no checkpoint"),
        ("a.safetensors", lambda path: path.write_bytes(b"hello" * 50), "is damaged, or no"),
        ("a.pt", lambda path: torch.save(torch.ones(2), path), "holds Tensor, not a dictionary"),
        ("a.pt", lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "no batch norm to"),
        ("a.pt", lambda path: torch.save({"a.running_mean": torch.ones(())}, path), "no batch no"),
        (
            "a.ckpt",
            lambda path: torch.save({"state_dict": {}, "h": argparse.Namespace(a=1)}, path),
            "Python objects beside tensors (argparse.Namespace); reading such can run code",
        ),
        (
            "a.pt",
            lambda path: torch.save(nn.Sequential(nn.BatchNorm1d(2)), path),
            "(torch.nn.modules.container.Sequential); reading such can run code",
        ),
        ("a.pt", _script, "torch.save(torch.jit.load("),
    ],
)
def test_a_file_that_cannot_be_examined_says_why(tmp_path, capsys, name, write, message):
    if write is not None:
        write(tmp_path / name)
    assert message in refused(capsys, "doctor", tmp_path / name)


def test_what_the_refusal_of_a_checkpoint_advises_works(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    torch.save({"state_dict": state, "h": argparse.Namespace(a=1)}, "light.ckpt")
    err = refused(capsys, "doctor", "light.ckpt")
    exec(err[err.index("torch.save(") : err.index(", 'tensors.pt')") + len(", 'tensors.pt')")])
    assert said(capsys, "doctor", "tensors.pt")[0] == 0


def test_a_folder_without_a_run_names_the_checkpoint_in_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "pytorch_model.bin")
    assert "Or give " in refused(capsys, "doctor", tmp_path)
    assert said(capsys, "doctor", tmp_path / "pytorch_model.bin")[0] == 0


def test_a_checkpoint_takes_no_data_and_no_fix(state, tmp_path, capsys):
    torch.save(state[0], tmp_path / "model.pt")
    given = ("doctor", tmp_path / "model.pt")
    assert "leave --data out" in refused(capsys, *given, "--data", "iris")
    assert "no model to mend" in refused(capsys, *given, "--fix", "-o", tmp_path / "o.pt")
    assert not (tmp_path / "o.pt").exists()


# -- what comes out ------------------------------------------------------------------------------


def test_a_baseline_forgives_what_was_known_and_nothing_else(factory, capsys):
    known = factory / "known.json"
    said(capsys, "doctor", "ill:ill_and_noted", "--format", "json", "-o", known)
    code, _, err = said(capsys, "doctor", "ill:ill_and_noted", "--baseline", known)
    assert code == 0
    assert "knows 3 of 3 findings" in err
    other = json.loads(known.read_text())
    other["findings"][0]["layer"] = "another"
    known.write_text(json.dumps(other))
    assert said(capsys, "doctor", "ill:ill_and_noted", "--baseline", known)[0] == 1
    for broken in ("[]", "{", '{"findings": [1]}', ""):
        known.write_text(broken)
        assert "is no diagnosis" in refused(
            capsys, "doctor", "ill:ill_and_noted", "--baseline", known
        )


def test_fail_on_moves_the_line_between_0_and_1(factory, capsys):
    assert said(capsys, "doctor", "ill:only_noted", "--fail-on", "note")[0] == 1
    assert said(capsys, "doctor", "ill:only_noted", "--fail-on", "warning")[0] == 0
    assert said(capsys, "doctor", "ill:ill_and_noted", "--fail-on", "error")[0] == 1


@pytest.mark.parametrize("out", ["mended.safetensors", "new/folder/mended.pt"])
def test_a_fix_is_told_written_and_healthy(out, factory, capsys):
    for _ in range(2):  # a file that exists is replaced
        code, _, err = said(capsys, "doctor", "ill:model", "--fix", "-o", out)
        assert code == 0
        assert "fixed TN103 1: Running statistics do not fit the data" in err
        assert f"written to {out}" in err
    mended = patients.trained("mlp")
    read = torch.load if out.endswith(".pt") else safetensors.torch.load_file
    mended.load_state_dict(read(factory / out))
    assert tn.examine(mended, patients.batches("mlp")).healthy


def test_a_fix_says_in_json_what_it_did(factory, capsys):
    code, out, _ = said(capsys, "doctor", "ill:model", "--fix", "-o", "m.pt", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["healthy"]
    assert [(f["code"], f["layer"]) for f in told["fixed"]] == [("TN103", "1")]


def test_what_no_remedy_reaches_still_exits_with_1(factory, capsys):
    code, out, err = said(capsys, "doctor", "ill:sick", "--fix", "-o", "m.safetensors")
    assert code == 1
    assert "TN102" in out
    assert "nothing to fix; written to m.safetensors" in err


@pytest.mark.parametrize("format", ["json", "sarif", "html"])
def test_a_format_may_be_named_or_follow_from_the_file(format, factory, capsys):
    code, printed, err = said(capsys, "doctor", "ill:ill_and_noted", "--format", format)
    assert code == 1
    assert err == ""
    code, out, err = said(capsys, "doctor", "ill:ill_and_noted", "-o", f"d.{format}")
    assert code == 1
    assert out == ""
    assert "not healthy: 1 error, 2 notes" in err
    assert f"written to d.{format}" in err
    assert (factory / f"d.{format}").read_text() == printed


def test_sarif_places_findings_in_the_factory_s_file(factory, capsys):
    _, out, _ = said(capsys, "doctor", "ill:model", "--format", "sarif")
    (run,) = json.loads(out)["runs"]
    assert run["results"][0]["ruleId"] == "TN103"
    for result in run["results"]:
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == "ill.py"


# -- codes ---------------------------------------------------------------------------------------


def test_every_code_is_listed_and_explained(capsys):
    code, out, _ = said(capsys, "doctor", "--list")
    assert code == 0
    codes = [line.split()[0] for line in out.splitlines()[1:]]
    assert codes == [check.code for check in CHECKS]
    assert "TN108" in codes
    for one in codes:
        code, out, _ = said(capsys, "doctor", "--explain", one)
        assert code == 0
        assert out.startswith(f"# {one}: ")
        assert "**Remedy**" in out


def test_codes_are_explained_to_programs_too(capsys):
    told = json.loads(said(capsys, "doctor", "--list", "--json")[1])["codes"]
    assert told[0]["code"] == "TN101"
    told = json.loads(said(capsys, "doctor", "--explain", "tn204", "--json")[1])
    assert told["code"] == "TN204"
    assert told["page"].startswith("# TN204: ")


@pytest.mark.parametrize(
    "tokens", [["--help"], ["doctor", "--list"], ["doctor", "--explain", "TN103"]]
)
def test_help_and_codes_need_no_torch(tokens):
    asked = f"import sys, truenorm.cli.app as c\ntry: c.main({tokens})\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{asked}sys.exit('torch' in sys.modules)"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "truenorm", "doctor", "--list"],
        stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 141  # as of a program that the signal ended
    assert done.stderr == b""


# -- recalibrate ---------------------------------------------------------------------------------


def test_recalibration_goes_through_all_of_the_data(factory, capsys):
    for name, batches in (("stream", 45), ("loader", 36)):  # a tenth is held out
        _, out, _ = said(capsys, "recalibrate", f"ill:{name}", "-o", "new.pt", "--json")
        assert json.loads(out)["batches"] == batches


def test_recalibration_is_written_only_if_it_is_no_worse(run_folder, factory, capsys):
    out = factory / "new.safetensors"
    code, told, _ = said(capsys, "recalibrate", "ill:model", "-o", out, "--json")
    assert code == 0
    told = json.loads(told)
    assert told["kept"]
    assert told["after"]["loss"] < told["before"]["loss"]
    assert out.exists()
    code, told, _ = said(capsys, "recalibrate", run_folder, "-o", factory / "run.safetensors")
    assert (factory / "run.safetensors").exists() == (code == 0)
    assert ("nothing was written; see --keep-worse" in told) == (code == 1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["ill:model"], "--out"),
        (["ill:bare", "-o", "a.pt"], "recalibrate needs data"),
        (["ill:ready", "--data", "nowhere", "-o", "a.pt"], "data 'nowhere' is neither"),
        (["ill:wrong_data", "-o", "a.pt"], "could not be recalibrated: RuntimeError: mat1 and"),
        (["ill:no_batches", "-o", "a.pt"], "data must be batches that can be iterated"),
        (["ill:raises", "-o", "a.pt"], "RuntimeError: no weights anywhere (ill.py, line "),
        (["ill:model", "-o", "."], ".: is a folder; --out names a file"),
        (["ill:model", "-o", "ill.py/a.pt"], "could not be written"),
        (["some.pt", "-o", "a.pt"], "a checkpoint has no model to run data through"),
        (["some.pt", "--data", "iris", "-o", "a.pt"], "a checkpoint has no model to run data"),
        ([".", "-o", "a.pt"], "holds no run"),
    ],
)
def test_what_cannot_be_recalibrated_exits_with_2_and_one_message(factory, capsys, tokens, message):
    assert message in refused(capsys, "recalibrate", *tokens)
    assert not (factory / "a.pt").exists()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["doctor", "ill:model", "-o", "d.pdf"], "d.pdf: --out must end in .txt, .log, .json"),
        (["doctor", "ill:model", "--fix", "-o", "m.txt"], "m.txt: --out takes the model's tensors"),
        (["recalibrate", "ill:model", "-o", "x.txt"], "x.txt: --out takes the model's tensors"),
    ],
)
def test_outputs_of_unknown_kinds_are_refused_before_the_work(
    capsys, tmp_path, monkeypatch, tokens, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *tokens)
    assert list(tmp_path.iterdir()) == []
