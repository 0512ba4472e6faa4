"""Hooks that a watched model bears, and what they must not do while torch traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from truenorm.doctor.ledger.book import Layer

compiling = torch.compiler.is_compiling
tracing = torch._C._get_tracing_state
transforming = torch._C._functorch.peek_interpreter_stack  # not None inside torch.func's
graph_task = torch._C._current_graph_task_id  # of the backward pass that runs now
NO_GRAPH_TASK = -1


def _nothing(*_: Any) -> None:
    """What a hook becomes in a copy of the model: a copy is not watched."""


def _inert() -> Callable[..., None]:
    return _nothing


class Watcher(Protocol):
    """What hooks report to: a ledger."""

    depth: int  # of calls inside calls, 0 outside any

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a call of the outermost module."""

    def end(self) -> None:
        """End it."""

    def called(self, layer: Layer, module: Any, args: Any, out: Any) -> None:
        """Take down a call of a norm."""

    def repeated(self, layer: Layer, module: Any, args: Any, out: Any) -> None:
        """Take down a call of a norm inside a backward pass."""


class _Hook:
    """A hook that a copied or saved model carries as one that does nothing.

    ``watches`` tells :func:`truenorm.calling.borrowing.borrowed` to leave it to its ledger.
    """

    watches = True

    def __init__(self, ledger: Watcher, to: Any) -> None:
        self.ledger, self.to = ledger, to

    def __reduce__(self) -> Any:
        return _inert, ()


class Enter(_Hook):
    """Before each module that a caller may call."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Replicas of a module share its hooks.
        if compiling() or module is not self.to:
            return
        ledger = self.ledger
        if ledger.depth:
            ledger.depth += 1
        elif graph_task() == NO_GRAPH_TASK:
            ledger.depth = 1
            ledger.begin(module, args, kwargs)


class Leave(_Hook):
    """After it."""

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        if compiling() or module is not self.to:
            return
        ledger = self.ledger
        if ledger.depth:
            ledger.depth -= 1
            if not ledger.depth:
                ledger.end()


class Called(_Hook):
    """After each call of a norm."""

    def __call__(self, module: Any, args: Any, out: Any) -> None:
        layer: Layer = self.to
        # Values cannot be read by the compiler, by a tracer and in torch.func's transforms.
        blind = compiling() or tracing() or transforming() is not None
        if blind or module is not layer.module:
            return
        ledger = self.ledger
        if graph_task() != NO_GRAPH_TASK:
            ledger.repeated(layer, module, args, out)
        elif ledger.depth:
            ledger.called(layer, module, args, out)
        else:  # called by itself
            ledger.begin(module, args, {})
            ledger.called(layer, module, args, out)
            ledger.end()
