"""Run the tests of the kernels on kernels that are compiled with sanitizers, those of g++.

Not a part of the suite: compiling takes minutes. ``make sanitize`` runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from truenorm.kernels import build

SANITIZERS = "-fsanitize=address,undefined"
FLAGS = ("-O1", "-g1", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", SANITIZERS)
HERE = Path(__file__).parent
RUN = """
import sys
from pathlib import Path
from truenorm.kernels import build
build.LIBRARY = Path(sys.argv[1])
from truenorm.kernels import ops
assert ops.kernels().live, ops.kernels().reason
assert sys.argv[1] in Path("/proc/self/maps").read_text()
import pytest
ignored = "ignore::pytest.PytestAssertRewriteWarning"  # of this package, which is imported already
sys.exit(pytest.main(["-q", "-n", "0", "-W", ignored, *sys.argv[2:]]))
"""
CASES = ("test_ops.py", "test_fused_kernels.py", "test_torchs_own_cases.py")


def main() -> int:
    """Compile, preload the sanitizers into a Python, and run the tests there."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "_kernels.abi3.so")
        build.compile_library(library, FLAGS)
        found = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment = os.environ | {
            "LD_PRELOAD": ":".join(found),
            # Python and torch keep what they have until the end.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        cases = [str(HERE / name) for name in CASES]
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(library), *cases], env=environment, check=False
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
