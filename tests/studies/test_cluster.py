from __future__ import annotations

import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from children import heed_ctrl_c
from rows import timeless
from samples import blobs
from truenorm import compare

# That the rows stay the same where actors are killed is tested in test_study.py.
ray = pytest.importorskip("ray", reason="engine 'ray' needs the extra cluster")
pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="looks for processes in /proc"
)

TUNED = {
    "norms": ("none", "batch"), "batch_sizes": (16, 32), "seeds": 2, "lr": "tune",
    "grid": (0.01, 0.1), "tuning_seeds": 1, "changes": {"epochs": 2, "widths": (8,)},
}  # fmt: skip
COMMAND = [
    *(sys.executable, "-W", "error", "-m", "truenorm", "compare", "--data", "digits", "--json"),
    *("--norm", "none,batch", "--batch-size", "8,32", "--seeds", "4", "--epochs", "20"),
    *("--widths", "16", "--engine", "ray", "--processes", "2", "--store", "s.sqlite"),
]


@pytest.fixture(scope="module", autouse=True)
def address():
    """The address of a cluster of two cores, which is there as long as this module's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        started = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield started.address_info["gcs_address"]
        ray.shutdown()


def rows(**options):
    study = compare(blobs(150), **TUNED, **options)
    return timeless(study.rows + study.tuning)


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def actors():
    """The processes of the studies' actors on this module's own cluster."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_text("utf-8", "replace").startswith("ray::Bench"):
                raylet = parent(place.name)
                if os.getpid() in (raylet, parent(raylet)):
                    found.append(int(place.name))
        except OSError:  # it has ended
            continue
    return found


def ended(pid):
    """Whether a process ends, which is waited for."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 30)[0])
    finally:
        os.close(handle)


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_the_rows_of_a_cluster_are_those_of_local_processes(processes):
    assert rows(engine="ray") == rows(processes=processes)


def test_a_study_leaves_the_callers_cluster_as_it_was():
    seen = set()
    rows(engine="ray", observe=lambda told: seen.update(actors()))
    assert len(seen) == 2
    assert all(ended(pid) for pid in seen)
    assert ray.is_initialized()
    assert ray.get(ray.put(7)) == 7


def test_a_cluster_named_by_ray_address_is_joined_and_ctrl_c_leaves_only_it(address, tmp_path):
    joined = subprocess.Popen(
        COMMAND, cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": address}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509
    )  # fmt: skip
    told = [joined.stderr.readline() for _ in range(4)]
    assert "seeds cannot tell anything" in told[0]
    assert all(line.startswith("run ") for line in told[1:])  # and ray says nothing
    at_work = actors()
    joined.send_signal(signal.SIGINT)
    out, err = joined.communicate()
    assert len(at_work) == 2
    assert all(ended(pid) for pid in at_work)
    assert joined.returncode == 130
    assert "Traceback" not in err
    assert json.loads(out) == {"error": "interrupted."}
    with sqlite3.connect(tmp_path / "s.sqlite") as file:
        assert file.execute("SELECT count(*) FROM runs").fetchone()[0] >= 3
    file.close()
    assert ray.get(ray.put(7)) == 7


def test_an_address_that_is_none_is_one_line_and_exit_2(tmp_path):
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": "nowhere"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "RAY_ADDRESS is 'nowhere'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
