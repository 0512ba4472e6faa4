"""Threads that give way: the kernel's taking is answered by a parked team, and bits stay."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import truenorm
from truenorm import cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP's waiting is Linux's")
LONG = 60.0  # seconds until a test that waits in vain fails


class _Kernel:
    """A kernel that takes cores from this process, or none; tells of teams parked and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
        self.taking = False
        self.told: queue.Queue[str] = queue.Queue()
        self._switches = 0
        monkeypatch.setattr(cores, "_WINDOW", 0.001)
        monkeypatch.setattr(cores, "_switches", self._count)
        monkeypatch.setattr(cores, "_threads", lambda: threads)
        monkeypatch.setattr(cores, "_park", self._park)

    def _count(self, _: object) -> int:
        self._switches += 100_000 if self.taking else 0
        return self._switches

    def _park(self, threads: int) -> _Kernel:
        self.told.put("parked")
        return self

    def end(self) -> None:
        self.told.put("ended")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Kernel]:
    yield _Kernel(monkeypatch, threads=2)
    assert not [t for t in threading.enumerate() if t.name == "truenorm-parked"]


def test_a_team_is_parked_while_cores_are_taken_and_only_then(kernel: _Kernel) -> None:
    with truenorm.share_cores():
        for _ in range(2):
            kernel.taking = True
            assert kernel.told.get(timeout=LONG) == "parked"
            kernel.taking = False
            assert kernel.told.get(timeout=LONG) == "ended"
    assert kernel.told.empty()


def test_a_parked_team_ends_with_the_body(kernel: _Kernel) -> None:
    kernel.taking = True
    with truenorm.share_cores():
        assert kernel.told.get(timeout=LONG) == "parked"
    assert kernel.told.get(timeout=LONG) == "ended"


def test_within_another_it_ends_with_the_outer_one(kernel: _Kernel) -> None:
    kernel.taking = True
    with truenorm.share_cores():
        inner = truenorm.share_cores()
        assert kernel.told.get(timeout=LONG) == "parked"
        inner.end()
        inner.end()  # a second time changes nothing
        assert [t for t in threading.enumerate() if t.name == "truenorm-cores"]
        assert kernel.told.empty()
    assert kernel.told.get(timeout=LONG) == "ended"


def test_a_process_of_one_thread_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel(monkeypatch, threads=1)
    kernel.taking = True
    seen = threading.Event()
    looks = 0

    def count(resource: object) -> int:
        nonlocal looks
        looks += 1
        if looks > 20:
            seen.set()
        return kernel._count(resource)

    monkeypatch.setattr(cores, "_switches", count)
    with truenorm.share_cores():
        assert seen.wait(LONG)
    assert kernel.told.empty()


def test_torchs_own_number_of_threads_is_what_it_looks_at() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert cores._threads() == count
    finally:
        torch.set_num_threads(before)


_PARKED = """
import os, torch
from truenorm import cores

def tasks():
    return len(os.listdir("/proc/self/task"))

def work():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 512, generator=generator)
    net = torch.nn.Sequential(torch.nn.Linear(512, 64), torch.nn.BatchNorm1d(64))
    for p in net.parameters():
        torch.nn.init.normal_(p, generator=generator)
    net(x).square().sum().backward()
    return [p.grad for p in net.parameters()] + list(net.buffers())

torch.set_num_threads(2)
alone = work()
before = tasks()
parked = cores._park(2)
if cores._gomp_parallel() is None:
    print("no GNU OpenMP")
    raise SystemExit
assert tasks() >= before + 2, (before, tasks())
assert torch.get_num_threads() == 2
beside = work()
parked.end()
again = work()
assert tasks() <= before + 1, (before, tasks())
assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(alone, beside, again))
if os.fork() == 0:
    with cores.share_cores():
        os._exit(0)
assert os.wait()[1] == 0
print("the same bits")
"""


def test_a_parked_team_sleeps_beside_the_one_that_computes_and_changes_no_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PARKED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("the same bits", "no GNU OpenMP")


def test_the_wheel_that_the_tests_run_on_has_gnu_openmp_so_that_the_above_means_something() -> None:
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch is linked to another OpenMP")
    assert cores._gomp_parallel() is not None
