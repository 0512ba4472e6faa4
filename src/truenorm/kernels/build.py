"""Compiling the kernels, and where the result stands.

Nothing of TrueNorm's is imported here: ``setup.py`` runs this file before the package is there.
``python -m truenorm.kernels.build`` compiles them into an installed package.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_kernels.abi3.so"

# By torch's stable interface of 2.10: one library serves that and all newer torches.
_FLAGS = (
    "-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden",
    "-fno-strict-aliasing", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)  # fmt: skip


class NoKernelsError(Exception):
    """The kernels cannot be compiled here; says why."""


def compile_library(to: Path = LIBRARY, flags: Sequence[str] = ()) -> None:
    """Compile the kernels to ``to``, against the torch that this Python imports.

    Without ``flags`` nothing is compiled that has not changed since.

    Args:
        to: the library.
        flags: of the compiler, behind the usual ones.

    Raises:
        NoKernelsError: no compiler, no torch, or the compiler refused.
    """
    if (
        not flags
        and LIBRARY.exists()
        and LIBRARY.stat().st_mtime > max(map(_changed, SOURCES.iterdir()))
    ):
        if to.resolve() != LIBRARY.resolve():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(LIBRARY, to)
        return
    compiler, torch = _compiler(), _torch()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for source in sorted(SOURCES.glob("*.cpp")):
            made = Path(scratch, f"{source.stem}.o")
            reading = f"-I{torch / 'include'}", "-c", str(source)
            jobs.append((made, _start([*compiler, *_FLAGS, *flags, *reading, "-o", str(made)])))
        for _, job in jobs:
            _end(job)
        linked = Path(scratch, to.name)
        objects = [str(made) for made, _ in jobs]
        libraries = f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,-s"
        _end(_start([*compiler, *flags, "-shared", *objects, *libraries, "-o", str(linked)]))
        to.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process may hold the old file mapped.
        shutil.copyfile(linked, staged := to.with_suffix(f".{os.getpid()}"))
        staged.replace(to)


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _compiler() -> list[str]:
    if sys.platform != "linux":
        raise NoKernelsError(f"the kernels are compiled on Linux alone, not on {sys.platform}")
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if found is None:
        raise NoKernelsError("no C++ compiler (g++) was found")
    return [found]


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise NoKernelsError("torch is not there to compile against")
    directory = Path(found.origin).parent
    if not (directory / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise NoKernelsError("this torch has no stable interface; 2.10 and newer have")
    return directory


def _start(call: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise NoKernelsError(f"{call[0]} could not be run: {error}") from error


def _end(job: subprocess.Popen[str]) -> None:
    _, told = job.communicate()
    if job.returncode:
        lines = [line for line in told.splitlines() if "error" in line] or told.splitlines()
        raise NoKernelsError(f"the compiler refused: {lines[0] if lines else job.returncode}")


def main() -> int:
    """Compile into the package, and say in one line how that went."""
    try:
        compile_library()
    except NoKernelsError as error:
        print(f"TrueNorm's kernels were not compiled, torch's own are used: {error}.")
        return 1
    print(f"TrueNorm's kernels were compiled for {sysconfig.get_platform()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
