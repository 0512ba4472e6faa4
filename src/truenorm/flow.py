"""How tensors really flow through a model: every operation of one forward, and who called it.

Observed while the model runs, so that functional calls, branches and reuse are seen, whatever the
names and the order of registration.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from truenorm.calling import tensors_in


@dataclass
class Node:
    """One operation of a forward.

    Attributes:
        op: what was called, as "conv2d", "linear", "relu", "add", "view"; "input" for a tensor
            that nothing seen here has made.
        inputs: numbers of the nodes whose outputs it took; parameters are not among them.
        module: dotted name of the innermost module that was running, "" for the model itself.
        shape: of its first output.
        outputs: numbers of the nodes that took its output.
        keywords: its plain arguments: numbers, booleans, text.
    """

    op: str
    inputs: tuple[int, ...]
    module: str
    shape: tuple[int, ...]
    outputs: list[int] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a module: the nodes of its first tensor argument and of its output."""

    module: str
    input: int | None
    output: int | None


@dataclass
class Flow:
    """The operations and module calls of one forward, in order."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    results: set[int] = field(default_factory=set)  # what the model returned

    def calls_of(self, module: str) -> list[Call]:
        """All calls of one module."""
        return [call for call in self.calls if call.module == module]

    def upstream(self, node: int, through: Callable[[Node], bool]) -> Iterator[Node]:
        """Nodes before ``node``, nearest first, not going beyond one for which ``through`` fails.

        The node at which it fails is given, too, and is the last of its branch.
        """
        seen, waiting = {node}, list(self.nodes[node].inputs)
        while waiting:
            number = waiting.pop(0)
            if number in seen:
                continue
            seen.add(number)
            yield self.nodes[number]
            if through(self.nodes[number]):
                waiting += self.nodes[number].inputs


_TRANSPOSED = {"T", "mT", "H", "mH"}


class _Recorder(TorchFunctionMode):
    """Notes each torch function that is called, and which results it took."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.running = [""]
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._held = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._inside = False

    def number_of(self, tensor: Tensor, *, make: bool = True) -> int | None:
        """The node that made ``tensor``; a node of its own if none is known."""
        held = self._made.get(id(tensor))
        if held is not None and held[0]() is tensor:
            return held[1]
        if not make or isinstance(tensor, nn.Parameter) or id(tensor) in self._held:
            return None
        return self._note(tensor, Node("input", (), self.running[-1], tuple(tensor.shape)))

    def _note(self, tensor: Tensor, node: Node) -> int:
        self.flow.nodes.append(node)
        number = len(self.flow.nodes) - 1
        self._made[id(tensor)] = (weakref.ref(tensor), number)
        for before in node.inputs:
            self.flow.nodes[before].outputs.append(number)
        return number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        self._inside = True
        try:
            taken = [
                number
                for tensor in tensors_in((args, kwargs))
                if (number := self.number_of(tensor)) is not None
            ]
            out = func(*args, **kwargs)
            name = (resolve_name(func) or getattr(func, "__name__", "?")).split(".")[-1]
            if name == "__get__":  # an attribute: of them only the transposed are operations
                name = getattr(getattr(func, "__self__", None), "__name__", name)
                name = name if name in _TRANSPOSED else "__get__"
            made = list(tensors_in(out))
            if made and name != "__get__":
                plain = {k: v for k, v in kwargs.items() if isinstance(v, (bool, int, float, str))}
                keep = tuple(dict.fromkeys(taken))
                op = name.strip("_")
                for tensor in made:
                    node = Node(op, keep, self.running[-1], tuple(tensor.shape), keywords=plain)
                    self._note(tensor, node)
        finally:
            self._inside = False
        return out


@torch.no_grad()
def flow_of(model: nn.Module, run: Callable[[], Any]) -> Flow:
    """Record what happens to tensors while ``run()`` calls ``model``; hooks are taken off again."""
    recorder = _Recorder(model)
    names = {module: name for name, module in model.named_modules()}
    with contextlib.ExitStack() as stack:
        for module, name in names.items():
            stack.callback(_observed(module, name, recorder))
        with recorder:
            out = run()
    recorder.flow.results = {
        number
        for tensor in tensors_in(out)
        if (number := recorder.number_of(tensor, make=False)) is not None
    }
    return recorder.flow


def _observed(module: nn.Module, name: str, recorder: _Recorder) -> Callable[[], None]:
    """Hook ``module`` so that ``recorder`` knows when it runs; return what unhooks it."""
    open_calls: list[Call] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(tensors_in((args, kwargs)))
        call = Call(name, recorder.number_of(given[0]) if given else None, None)
        open_calls.append(call)
        recorder.flow.calls.append(call)
        recorder.running.append(name)

    def leave(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        recorder.running.pop()
        made = list(tensors_in(out))
        open_calls.pop().output = recorder.number_of(made[0]) if made else None

    before = module.register_forward_pre_hook(enter, with_kwargs=True)
    after = module.register_forward_hook(leave, with_kwargs=True)

    def remove() -> None:
        before.remove()
        after.remove()

    return remove
