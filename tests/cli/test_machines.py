"""The commands on machines as people have them: consoles of other alphabets, odd folders."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from truenorm.cli import main
from truenorm.errors import InputError
from truenorm.factories import is_factory
from truenorm.files import write_atomically

FOLDER = "照片 and more"  # as a user's own may be called


def truenorm(
    *args: str, where: Path, without: tuple[str, ...] = (), **more: str
) -> subprocess.CompletedProcess[bytes]:
    env = {key: value for key, value in os.environ.items() if key not in without}
    command = [sys.executable, "-m", "truenorm", *args]
    return subprocess.run(command, capture_output=True, cwd=where, env={**env, **more}, check=False)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory) -> Path:
    """A folder with a table and a run of it, whose names and classes are not ASCII."""
    folder = tmp_path_factory.mktemp("machines") / FOLDER
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "表 1.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["长度", "宽度", "类"])
        for i in range(60):
            writer.writerow([*rng.normal(2 * (i % 2), 1, 2), ("猫 ≥ 1", "Hündin · 狗")[i % 2]])
    options = ["--data", "表 1.csv", "--target", "类", "--epochs", "1", "--run-dir", "运行"]
    done = truenorm("train", *options, "--quiet", where=folder, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    return folder


COMMANDS = {
    "train": ["train", "--data", "表 1.csv", "--target", "类", "--epochs", "1", "--run-dir"],
    "doctor": ["doctor", "运行"],
    "fold": ["fold", "运行"],
    "predict": ["predict", "运行", "表 1.csv"],
    "help": ["compare", "--help"],
    "refusal": ["predict", "无", "表 1.csv"],
}


def shown(encoding: str, folder: Path, args: list[str]) -> tuple[object, str]:
    """The exit status of a command, and what a console of ``encoding`` gets."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as left:
            main(args)
    for stream in streams:
        stream.flush()
    return left.value.code, "".join(s.buffer.getvalue().decode(encoding) for s in streams)


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp1252"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_console_of_another_alphabet_stops_no_command(folder, tmp_path, command, encoding):
    args = [*COMMANDS[command], *([str(tmp_path / "运行")] if command == "train" else [])]
    code, told = shown(encoding, folder, args)
    assert code in {"doctor": (0, 1), "refusal": (2,)}.get(command, (0,))
    assert told.strip()
    assert "codec" not in told


def test_what_a_console_lacks_is_written_by_its_number(folder):
    _, told = shown("cp1252", folder, ["predict", "运行", "表 1.csv"])
    assert told.splitlines()[0] == "row,class,p(H\xfcndin \xb7 \\u72d7),p(\\u732b \\u2265 1)"


def test_a_machine_without_a_home_and_with_a_plain_terminal_folds(folder):
    plain = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "40"}
    done = truenorm("fold", "运行", where=folder, without=("HOME",), **plain)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert b"folded, 0 left" in done.stdout


@pytest.mark.parametrize("command", ["fold", "doctor"])
def test_a_path_from_a_drive_of_windows_is_no_factory(tmp_path, command):
    code, told = shown("utf-8", tmp_path, [command, "C:\\runs\\a"])
    assert code == 2
    assert "is no run folder" in told
    assert "no module named" not in told


def test_a_factory_is_known_by_its_name() -> None:
    assert is_factory("mine:make")
    assert is_factory("c:make")
    assert not is_factory("C:/runs/mine.py:make")
    assert not is_factory("resnet")


def test_a_name_that_is_too_long_is_refused_with_the_next_step(tmp_path):
    with pytest.raises(InputError, match=r"could not be written .* choose a writable folder"):
        write_atomically(tmp_path / ("x" * 300), lambda path: path.write_bytes(b""))


def test_metrics_have_the_same_ends_of_lines_everywhere(folder):
    lines = (folder / "运行" / "metrics.csv").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    assert all(line.endswith(b"\r\n") and line.count(b"\r") == 1 for line in lines)


@pytest.mark.parametrize("backend", ["no-such", "module://no.such_module"])
def test_a_backend_of_matplotlib_that_is_not_there_stops_no_command(folder, tmp_path, backend):
    run = tmp_path / "run"
    done = truenorm(*COMMANDS["train"], str(run), where=folder, MPLBACKEND=backend)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "<svg" in (run / "report.html").read_text("utf-8")


def test_drawing_a_page_leaves_the_backend_as_it_was_chosen():
    code = "import truenorm.canvas, matplotlib; print(matplotlib.get_backend())"
    env = {**os.environ, "MPLBACKEND": "svg"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "svg\n"


def test_completion_is_installed_for_the_shell(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    done = truenorm(
        "--install-completion", where=tmp_path, without=("XDG_DATA_HOME",), HOME=str(home),
        SHELL="/bin/bash",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (script,) = (path for path in home.rglob("truenorm*") if path.is_file())
    for word in ("recalibrate", "--class-weight", "--require-data"):
        assert word in script.read_text("utf-8")
