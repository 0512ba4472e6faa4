from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from children import heed_ctrl_c
from samples import blobs
from truenorm import InputError, ModelSpec
from truenorm.cli.train import NewRun
from truenorm.kernels import ops

QUICK = ("--data", "iris", "--epochs", 3)
RESULT_KEYS = {
    "run", "seed", "epochs", "best_epoch", "stopped", "restored", "val_loss", "val_accuracy",
    "test_accuracy", "fit_seconds",
}  # fmt: skip


def test_json_is_one_object_on_stdout_and_nothing_else(cli):
    code, out, err = cli("train", *QUICK, "--json", "--seed", 5)
    result = json.loads(out)
    assert code == 0
    assert result.keys() >= RESULT_KEYS
    assert (result["seed"], result["epochs"], result["stopped"]) == (5, 3, "finished")
    assert result["restored"] is True
    assert "epoch 1/3" in err


def test_quiet_prints_the_result_alone(cli):
    code, out, err = cli("train", *QUICK, "--quiet")
    assert code == 0
    assert "epoch 1/3" not in out
    assert "test accuracy" in out
    assert err == ""


def test_an_epoch_is_a_line_with_losses_accuracy_and_the_best_marked(cli):
    _, out, _ = cli("train", *QUICK)
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    for line in lines:
        assert all(word in line for word in ("train loss", "val loss", "val accuracy"))
    assert "* best" in lines[0]


def test_the_run_folder_is_the_one_that_was_asked_for(cli, tmp_path):
    cli("train", *QUICK, "--run-dir", tmp_path / "here")
    assert (tmp_path / "here" / "report.html").exists()
    assert not (tmp_path / "runs").exists()


def test_without_one_a_new_run_folder_is_made_each_time(cli, tmp_path):
    for _ in range(3):
        cli("train", *QUICK, "--quiet")
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_options_reach_the_config(cli, tmp_path):
    cli("train", *QUICK, "--run-dir", "r", "--recipe", "classic", "--batch-size", 12, "--lr", 0.02,
        "--patience", 2, "--min-delta", 0.01, "--threads", 1, "--weight-decay", 0.1,
        "--model", "mlp", "--norm", "rms", "--widths", "7,5")  # fmt: skip
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    train, spec = config["train"], config["spec"]
    assert (train["batch_size"], train["lr"], train["patience"]) == (12, 0.02, 2)
    assert (train["min_delta"], train["threads"], train["weight_decay"]) == (0.01, 1, 0.1)
    assert (spec["norm"], spec["widths"]) == ("rms", [7, 5])
    assert json.loads((tmp_path / "r" / "result.json").read_text())["threads"] == 1


@pytest.fixture
def kernels_that_are_not_there(monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "nonsense")
    ops.kernels.cache_clear()
    yield
    monkeypatch.undo()
    ops.kernels.cache_clear()


@pytest.mark.usefixtures("kernels_that_are_not_there")
@pytest.mark.parametrize(
    "tokens",
    [("train", *QUICK), ("compare", "--data", "iris", "--seeds", 2), ("claims", "small-batch")],
    ids=lambda tokens: tokens[0],
)
def test_kernels_that_are_not_there_are_refused_before_anything_is_written(cli, tmp_path, tokens):
    code, _, err = cli(*tokens)
    assert code == 2
    assert f"{ops.VARIABLE} must be auto, torch, " in err
    assert list(tmp_path.rglob("*")) == []


def test_info_says_what_batch_norm_runs_on(cli):
    found = ops.kernels()
    code, out, _ = cli("info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kernels"], facts["reason"]) == (found.instructions or "torch", found.reason)
    _, out, _ = cli("info")
    assert f"TrueNorm's, for {found.instructions}" in out or f"torch's; {found.reason}" in out


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["train", "--lr", "0"], "lr must be a finite number above 0, got 0.0"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--bach-size", "3"], "Did you mean --batch-size"),
        (["train", "--model", "mpl"], "unknown model 'mpl'; choose one of"),
        (["train", "--norm", "bach"], "unknown norm 'bach'; choose one of"),
        (["train", "--recipe", "best"], "unknown recipe 'best'; choose one of"),
        (["train", "--widths", "a,b"], "widths must be integers like 256,128, got 'a,b'"),
        (["train", "--data", "nowhere"], "'nowhere' is neither a file or folder nor"),
        (["train", "--data", "iris", "--model", "convnet"], "convnet needs images"),
        (["train", "--resume", "nowhere"], "holds no run"),
        (["train", "--resume", "x", "--lr", "3"], "--resume takes every choice from the run"),
        (["train", "--data", "iris", "--device", "cuda:9"], "device 'cuda:9' cannot be used"),
        (["predict", "nowhere", "iris"], "holds no run"),
        (["tran"], "Unknown command"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_user_must_mend_is_one_message_and_exit_2(cli, tokens, text, as_json):
    code, out, err = cli(*tokens, *(["--json"] if as_json and len(tokens) > 1 else []))
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert err.count("truenorm: ") == 1
    if as_json and len(tokens) > 1:
        assert text in json.loads(out)["error"]
    else:
        assert out == ""


@pytest.mark.parametrize(
    "choice", [("--data", "iris"), ("--dropout", "0.1"), ("--run-dir", "r"), ("--seed", "0")]
)
def test_a_resumed_run_takes_no_choice_at_all(cli, choice):
    code, _, err = cli("train", "--resume", "x", *choice)
    assert code == 2
    assert "--resume takes every choice from the run" in err


def test_the_models_defaults_are_the_same_on_the_command_line():
    assert NewRun().spec() == ModelSpec()


def test_a_run_that_exists_is_refused_and_left_as_it_was(cli, tmp_path):
    cli("train", *QUICK, "--run-dir", "r")
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    code, _, err = cli("train", *QUICK, "--run-dir", "r")
    assert code == 2
    assert "r: holds a run already; continue it with --resume r" in err
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}


def test_a_folder_in_which_nothing_was_learned_may_be_used_again(cli, tmp_path):
    code, _, err = cli("train", *QUICK, "--run-dir", "r", "--batch-size", 1)
    assert code == 2
    assert "batch_size of at least 2" in err
    assert not (tmp_path / "r").exists()


def test_resuming_an_ended_run_prints_its_result_again(cli):
    _, out, _ = cli("train", *QUICK, "--run-dir", "r", "--json")
    code, again, _ = cli("train", "--resume", "r", "--json")
    assert code == 0
    assert json.loads(again) == json.loads(out)


def test_a_nan_loss_is_told_with_its_step_and_exits_2(cli):
    code, out, err = cli("train", "--data", "wine", "--norm", "none", "--lr", 1e30, "--recipe",
                         "classic", "--optimizer", "sgd", "--json", "--quiet")  # fmt: skip
    result = json.loads(out)
    assert code == 2
    assert result["stopped"] == "nan"
    assert "the training loss is" in err
    assert "try an lr smaller than 1e+30" in err


def test_ctrl_c_exits_130_with_the_best_epoch_restored_and_resumes(tmp_path):
    command = [sys.executable, "-m", "truenorm", "train", "--data", "digits", "--epochs", "3000",
               "--patience", "3000", "--run-dir", str(tmp_path / "r"), "--json"]  # fmt: skip
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509
    )  # fmt: skip
    for line in job.stderr:
        if line.startswith("epoch    5/"):
            job.send_signal(signal.SIGINT)
            break
    out, err = job.communicate()
    result = json.loads(out)
    assert job.returncode == 130
    assert "Traceback" not in err
    assert result["stopped"] == "interrupted"
    assert result["epochs"] >= 5
    assert result["restored"] is True
    assert result["test_accuracy"] > 0.3
    assert (tmp_path / "r" / "model.safetensors").exists()
    assert not (tmp_path / "r" / "result.json").exists()


def test_predict_writes_classes_and_probabilities(cli, tmp_path):
    cli("train", *QUICK, "--run-dir", "r")
    code, out, err = cli("predict", "r", "iris")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(rows) == 150
    assert "accuracy" in err
    for row in rows:
        values = {k: float(v) for k, v in row.items() if k not in ("row", "class")}
        assert sum(values.values()) == pytest.approx(1, abs=1e-4)
        assert max(values, key=values.get) == f"p({row['class']})"
    cli("predict", "r", "iris", "--out", "p.csv")
    assert (tmp_path / "p.csv").read_text() == out


def test_predict_says_as_json_what_it_says_as_csv(cli):
    cli("train", *QUICK, "--run-dir", "r")
    _, text, _ = cli("predict", "r", "iris")
    code, out, _ = cli("predict", "r", "iris", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["predicted"] == [r["class"] for r in csv.DictReader(io.StringIO(text))]
    assert told["examples"] == 150
    assert len(told["probabilities"][0]) == 3


def test_predict_takes_columns_by_name_and_needs_no_labels(cli, tmp_path):
    x, y = blobs(60, features=2)
    rows = [f"{a},{b},k{c}" for (a, b), c in zip(x, y, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,kind", *rows]))
    flipped = [f"9,{b},{a}" for a, b in x]
    (tmp_path / "new.csv").write_text("\n".join(["id,b,a", *flipped]))
    cli("train", "--data", "t.csv", "--target", "kind", "--run-dir", "r")
    _, known, err = cli("predict", "r", "t.csv")
    _, unknown, silent = cli("predict", "r", "new.csv")
    assert known == unknown
    assert "accuracy" in err
    assert "accuracy" not in silent
    (tmp_path / "short.csv").write_text("a\n1\n")
    code, _, err = cli("predict", "r", "short.csv")
    assert code == 2
    assert "lacks the column 'b' that the model was trained on" in err


def test_predict_refuses_data_of_another_kind(cli, tmp_path):
    cli("train", *QUICK, "--run-dir", "r")
    code, _, err = cli("predict", "r", "wine")
    assert code == 2
    assert "the model was trained on" in err
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 4), np.uint8))
    code, _, err = cli("predict", "r", "b.npz")
    assert code == 2
    assert "type torch.uint8, the model was trained on (4,) and torch.float32" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(cli, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = cli("train", *QUICK, "--run-dir", "locked/r")
    assert code == 2
    assert "could not be written" in err


def test_a_place_that_cannot_be_written_is_refused(cli):
    code, _, err = cli("train", *QUICK, "--run-dir", "/proc/here")
    assert code == 2
    assert "could not be written" in err
    assert "choose a writable folder" in err


def test_help_imports_no_torch():
    code = (
        "import sys, truenorm.cli.app\n"
        "try: truenorm.cli.app.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--label-smoothing" in done.stdout


def test_every_public_name_is_there():
    import truenorm

    for name in truenorm.__all__:
        assert getattr(truenorm, name) is not None
    assert set(truenorm.__all__) <= set(dir(truenorm))
    with pytest.raises(AttributeError, match="no attribute 'BatchNrom'"):
        truenorm.BatchNrom  # noqa: B018


@pytest.mark.parametrize("command", ["train", "compare"])
def test_data_without_its_option_is_told_the_option(cli, command):
    code, _, err = cli(command, "iris")
    assert code == 2
    assert f"truenorm {command} --data iris" in err


@pytest.mark.parametrize(
    ("text", "norm"),
    [
        ("bn", "batch"), ("BatchNorm2d", "batch"), ("batch_norm", "batch"), ("LayerNorm", "layer"),
        ("gn", "group"), ("instance-norm", "instance"), ("rmsnorm", "rms"), ("none", "none"),
        ("batchrenorm", "renorm"), ("Ghost", "ghost"),
    ],
)  # fmt: skip
def test_a_norm_may_be_called_as_classes_and_papers_call_it(text, norm):
    assert ModelSpec(norm=text).norm == norm


@pytest.mark.parametrize("text", ["", "norm", "d", "1d", "batchh", "own"])
def test_what_no_norm_is_called_is_refused_as_it_was_given(text):
    with pytest.raises(InputError, match=f"unknown norm '{text}'; choose one of none, batch"):
        ModelSpec(norm=text)


def test_norms_of_a_study_are_compared_under_their_own_names(cli):
    code, out, err = cli("compare", "--data", "iris", "--norm", "bn,LayerNorm", "--seeds", 2,
                         "--epochs", 1, "--processes", 0, "--json", "--quiet")  # fmt: skip
    assert code == 0, err
    assert {row["variant"] for row in json.loads(out)["rows"]} == {"batch/16", "layer/16"}
    code, _, err = cli("compare", "--data", "iris", "--norm", "bn,batch", "--seeds", 2)
    assert code == 2
    assert "all different" in err


def test_every_norm_is_named_in_the_help(cli):
    _, train, _ = cli("train", "--help")
    _, compare, _ = cli("compare", "--help")
    for norm in ("none", "batch", "layer", "group", "instance", "rms", "renorm", "ghost"):
        assert norm in train
        assert norm in compare


def test_ctrl_c_is_answered_at_once_and_a_second_one_leaves_with_the_hint_said(tmp_path):
    code = (  # the second comes while the best epoch is tested
        "import os, signal\n"
        "from truenorm.cli import main\n"
        "from truenorm.training import job\n"
        "def judge(*args): os.kill(os.getpid(), signal.SIGINT)\n"
        "job.judge = judge\n"
        "main(['train', '--data', 'digits', '--epochs', '3000', '--patience', '3000', '--run-dir', "
        f"{str(tmp_path / 'r')!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c, env={**os.environ, "PYTHONUNBUFFERED": "1"},  # noqa: PLW1509
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch    3/"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert process.returncode == 130
    said, left = err.splitlines()
    assert said.startswith("stopping: ")
    assert said.endswith(f"Continue with: truenorm train --resume {tmp_path / 'r'}")
    assert left == "truenorm: interrupted."


@pytest.mark.parametrize(
    ("weight", "learned"), [("none", True), ("balanced", True), ("none", False)]
)
def test_beside_accuracy_stands_what_it_hides(cli, tmp_path, weight, learned):
    rng = np.random.default_rng(0)
    rare = np.arange(1000) % 33 == 1
    x = rng.normal(3.0 * rare * learned, 1)
    (tmp_path / "t.csv").write_text(
        "a,y\n" + "".join(f"{v},{'rare' if r else 'usual'}\n" for v, r in zip(x, rare, strict=True))
    )
    code, out, err = cli(
        "train", "--data", "t.csv", "--target", "y", "--class-weight", weight, "--quiet"
    )
    assert code == 0, err
    assert "always answering usual would be right for 97.00%" in out
    assert ("nothing that tells the classes apart was learned" in out) is not learned


def test_a_folder_that_an_output_needs_is_made_and_told(cli, tmp_path):
    cli("train", *QUICK, "--run-dir", "r")
    code, _, err = cli("predict", "r", "iris", "--out", "new/answers.csv")
    assert code == 0
    assert "new: is not there, and is made for answers.csv" in err
    assert (tmp_path / "new" / "answers.csv").exists()
    _, _, err = cli("predict", "r", "iris", "--out", "new/answers.csv")
    assert "is made" not in err
