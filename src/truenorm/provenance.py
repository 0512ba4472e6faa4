"""Where a number came from: versions, machine, command."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch


def environment() -> dict[str, Any]:
    """Versions, machine and command: what a reader needs to judge or repeat the numbers."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "truenorm": metadata.version("truenorm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }
