"""A norm of its own for each call of one layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from truenorm.calling.borrowing import borrowed, to_eval
from truenorm.calling.call import call_with
from truenorm.errors import InputError


class PerCall(nn.Module):
    """A norm for each of the calls of one forward, in their order.

    The model's forward begins the count again, by a hook that ``convert`` leaves on it.

    Raises:
        InputError: called more often than it has norms, or while a backward pass runs a part of
            the forward again, where the order of calls is another.
    """

    def __init__(self, norm: nn.Module, calls: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in range(calls - 1))])
        self.called = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next norm's output."""
        if torch._C._current_graph_task_id() != -1:
            raise InputError("a norm per call does not work with activation checkpointing.")
        if self.called >= len(self.norms):
            raise InputError(
                f"a norm for each of {len(self.norms)} calls was called once more in one forward; "
                "convert again with an example that makes all the calls."
            )
        self.called += 1
        return self.norms[self.called - 1](*args, **kwargs)


def restart_calls(model: nn.Module, args: Any) -> None:
    """Before a forward of the whole model: every count of calls starts at zero."""
    for module in model.modules():
        if isinstance(module, PerCall):
            module.called = 0


def count_calls(model: nn.Module, layers: list[nn.Module], example: Any) -> dict[nn.Module, int]:
    """How often each layer is called in one forward, in evaluation; all is given back."""
    calls = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, args: Any) -> None:
        calls[layer] += 1

    with borrowed(model, parameters=False), torch.no_grad():
        to_eval(model)
        for layer in layers:
            layer.register_forward_pre_hook(count)
        call_with(model, example)
    return calls
