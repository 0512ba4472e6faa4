"""truenorm info."""

from __future__ import annotations

import json as json_text
import os
import platform

from truenorm.cli.options import DONE, Json


def info(*, json: Json = False) -> int:
    """Say what batch norm runs on here: versions, threads, the kernels or why there are none."""
    import torch

    import truenorm
    from truenorm.kernels.ops import kernels

    found = kernels()
    facts = {
        "truenorm": truenorm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "kernels": found.instructions or "torch",
        "reason": found.reason,
    }
    if json:
        print(json_text.dumps(facts))
        return DONE
    live = f"TrueNorm's, for {found.instructions}" if found.live else f"torch's; {found.reason}"
    for name, value in {**facts, "kernels": live}.items():
        if name != "reason":
            print(f"{name:<10} {value}")
    return DONE
