"""What may be looked at now: whether values are there, or only their places in a graph."""

from __future__ import annotations

import torch
from torch import Tensor

compiling = torch.compiler.is_compiling
graph_task = torch._C._current_graph_task_id  # of the backward pass that runs now
NO_GRAPH_TASK = -1
wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY


def captured() -> bool:
    """Whether operations are being written down: by torch.compile, export or make_fx."""
    return compiling() or _mode(_PROXY) is not None


def readable(x: Tensor, *, any_device: bool = False) -> bool:
    """Whether a value can be looked at, and cheaply: no graph capture, no device to wait for."""
    if type(x) is not Tensor or captured():
        return False
    if not (x.is_cpu or (any_device and not x.is_meta)):
        return False
    return not wrapped(x)
