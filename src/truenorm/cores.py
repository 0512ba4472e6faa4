"""Sharing the cores with other programs: OpenMP's waiting threads give way while others run.

torch's threads wait for each other at the end of every operation. GNU OpenMP lets a waiting
thread spin, about a millisecond, before it sleeps. That is right where each thread has a core
to itself. Beside other programs the thread that is waited for may not be running, and the
waiting one burns the very time that it needs: a fit of 1.7 s on two cores took 31 s beside
four busy processes, and 8 s on a single thread.

libgomp spins a thousand times shorter where a process has more OpenMP threads than the machine
has cores (``gomp_throttled_spin_count_var`` in its ``config/linux/wait.h``), and it counts them
anew at each wait. So, while the kernel takes the cores away from this process, a second team of
threads is parked, asleep; its being there is enough. The number of threads that compute does
not change, nor does a bit of what they compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_WINDOW = 0.1  # seconds between looks
# Involuntary switches a second for each thread. Seen on two cores: 8 to 19 in an idle machine,
# 80 beside four busy processes and 130 beside one; threads that sleep are switched more often.
_TAKEN = 60.0
_CALM_WINDOWS = 3  # before the threads may spin again


class share_cores:  # called like a function, used like one
    """Let torch's CPU threads give way while other programs use the cores.

    One line at the top of a script does it for the whole process; in a ``with`` statement it
    ends with the body. :func:`truenorm.fit`, :func:`truenorm.examine` and the command line do
    it for themselves. Results are the same, bit for bit. It watches how often the kernel takes
    a core away, ten times a second, and works on Linux with the GNU OpenMP of torch's own
    wheels; elsewhere, and in a process of one thread, it changes nothing.
    """

    def __init__(self) -> None:
        self._monitor: _Monitor | None = _MONITOR
        _MONITOR.enter()

    def end(self) -> None:
        """Leave the threads as OpenMP lets them be."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class _Monitor:
    """One thread for the process that looks whether cores are taken, while anyone asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stop: threading.Event | None = None

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1 and sys.platform == "linux":
                self._stop = threading.Event()
                watch = threading.Thread(
                    target=_watch, args=(self._stop,), name="truenorm-cores", daemon=True
                )
                watch.start()

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._stop is not None:
                self._stop.set()
                self._stop = None


_MONITOR = _Monitor()


def _begin_anew() -> None:
    """In a forked child no thread of the parent's lives on."""
    global _MONITOR  # noqa: PLW0603
    _MONITOR = _Monitor()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _watch(stop: threading.Event) -> None:
    import resource  # Linux alone gets here

    parked: _Parked | None = None
    calm = 0
    then, before = time.monotonic(), _switches(resource)
    while not stop.wait(_WINDOW):
        now, switches = time.monotonic(), _switches(resource)
        rate = (switches - before) / (now - then)
        then, before = now, switches
        threads = _threads() if rate > _TAKEN else 1
        taken = rate > _TAKEN * threads
        calm = 0 if taken else calm + 1
        if parked is None and taken and threads > 1:
            parked = _park(threads)
        elif parked is not None and calm >= _CALM_WINDOWS:
            parked.end()
            parked = None
    if parked is not None:
        parked.end()


def _switches(resource: Any) -> int:
    """How often the kernel has taken a core from this process."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _threads() -> int:
    """The threads that torch computes on; 1 before it is imported."""
    torch = sys.modules.get("torch")
    count = getattr(torch, "get_num_threads", None)  # None while the import is under way
    if count is None:
        return 1
    found: list[int] = []  # a thread learns the number once, so one that is new is asked
    asked = threading.Thread(target=lambda: found.append(count()))
    asked.start()
    asked.join()
    return found[0]


class _Parked:
    """A team of OpenMP threads that sleeps, until it is ended."""

    def __init__(self, parallel: Callable[..., Any], size: int) -> None:
        self._ended = threading.Event()
        self._there = threading.Event()
        # A team belongs to the thread that began it, and goes when that ends.
        self._master = threading.Thread(
            target=self._stay, args=(parallel, size), name="truenorm-parked", daemon=True
        )
        self._master.start()
        self._there.wait()

    def _stay(self, parallel: Callable[..., Any], size: int) -> None:
        parallel(_NOTHING, None, size, 0)
        self._there.set()
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()
        self._master.join()


def _park(threads: int) -> _Parked | None:
    """Park so many threads that there are more than cores; None where libgomp is not torch's."""
    parallel = _gomp_parallel()
    cores = len(os.sched_getaffinity(0))
    return None if parallel is None else _Parked(parallel, max(2, cores - threads + 2))


# What each thread of the parked team does: free(NULL), which is nothing, and needs no Python.
_NOTHING = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p) if os.name == "posix" else None


def _gomp_parallel() -> Callable[..., Any] | None:
    """GNU OpenMP's entry into a parallel region, of the copy that torch itself is linked to."""
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "kmp_get_blocktime"):  # LLVM's and Intel's, under GNU's names
            return None
        parallel = library.GOMP_parallel
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None
