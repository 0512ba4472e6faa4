"""How tensors really flow through a model: every operation of one forward, and who called it.

Observed while the model runs, so that functional calls, branches and reuse are seen, whatever the
names and the order of registration.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from truenorm.calling.nested import tensors_in

# What takes a tensor and gives no tensor, but its numbers; all else of that kind tells shapes.
_READS = {
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
    *("__bool__", "__float__", "__int__", "__index__", "__complex__"),
    *("__array__", "__dlpack__", "__contains__"),
}
# Of their second tensor these take the shape alone, or the type.
_LIKE = {"reshape_as", "view_as", "expand_as", "type_as", "to"}
_LIKE_ONE = {"zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like"}
_LIKE_ONE |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
# These pass on the same values in the same order, in another shape at most.
SHAPING = {"view", "reshape", "flatten", "contiguous", "squeeze", "unsqueeze", "to", "clone"}


@dataclass
class Node:
    """One operation of a forward.

    Attributes:
        op: what was called, as "conv2d", "linear", "relu", "add", "view"; "input" for a tensor
            that nothing seen here has made.
        inputs: numbers of the nodes whose outputs it took; parameters are not among them.
        module: dotted name of the innermost module that was running, "" for the model itself.
        shape: of its first output; () for one that gave none, as "item".
        dtype: of its first output; None for one that gave none.
        outputs: numbers of the nodes that took its output.
        keywords: its keyword arguments that hold no tensor.
        state: names of the parameters and buffers it took, in order; of a tied one the first.
        arguments: its positional arguments, None where a tensor stood.
        again: the same operation on another tensor in place of the one that it took; None where
            it took none or several.
    """

    op: str
    inputs: tuple[int, ...]
    module: str
    shape: tuple[int, ...]
    outputs: list[int] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    state: tuple[str, ...] = ()
    arguments: tuple[Any, ...] = ()
    again: Callable[[Tensor], Any] | None = field(default=None, repr=False)


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        module: its dotted name.
        input: node of its first tensor argument; None if it has none or that is a parameter.
        output: node of the first tensor that it returned.
        tensors: the number of tensors among its arguments.
        first: number of the first node that could be made during the call.
        end: the number after that of the last one.
        caller: dotted name of the module whose forward made the call; "" for the model itself, and
            for the call of the model.
    """

    module: str
    input: int | None
    output: int | None
    tensors: int = 1
    first: int = 0
    end: int = 0
    caller: str = ""


@dataclass
class Flow:
    """The operations and module calls of one forward, in order.

    Attributes:
        nodes: all operations.
        calls: all calls of modules.
        results: nodes of the tensors that the model returned.
        kept: nodes whose tensors somebody held when the forward was over, the results aside; only
            where asked for.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    results: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)

    def calls_of(self, module: str) -> list[ModuleCall]:
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


class _Recorder(TorchFunctionMode):
    """Notes each torch function that is called, and which results it took."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.running = [""]
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._state_names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._state_names.setdefault(id(tensor), name)
        self._given: set[int] = set()  # tensors that nothing seen here has made
        self.inside = False

    def number_of(self, tensor: Tensor, *, make: bool = True) -> int | None:
        """The node that made ``tensor``; a node of its own if none is known."""
        known = self._made.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if not make or isinstance(tensor, nn.Parameter) or id(tensor) in self._state_names:
            return None
        self._given.add(id(tensor))
        node = Node("input", (), self.running[-1], tuple(tensor.shape), dtype=tensor.dtype)
        return self._note([tensor], node)

    def note(self, func: Any, name: str, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """One operation and what it made: a node for each tensor."""
        args, like = _without_likes(name, args)
        tensors = list(tensors_in((args, kwargs)))
        taken = [n for tensor in tensors if (n := self.number_of(tensor)) is not None]
        inputs = tuple(dict.fromkeys(taken))
        state = tuple(self._state_names[id(t)] for t in tensors if id(t) in self._state_names)
        direct = sum(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        alone = len(tensors) == len(taken) == direct == 1
        again = _again(func, (*args, *like), kwargs) if alone else None
        plain = {k: v for k, v in kwargs.items() if next(tensors_in(v), None) is None}
        positional = tuple(a if next(tensors_in(a), None) is None else None for a in args)
        details: dict[str, Any] = {"keywords": plain, "state": state}
        details |= {"arguments": positional, "again": again}
        op, where = name.strip("_"), self.running[-1]
        for tensor in made:
            shape, dtype = tuple(tensor.shape), tensor.dtype
            self._note([tensor], Node(op, inputs, where, shape, dtype=dtype, **details))
        if not made:
            self._note([], Node(op, inputs, where, (), **details))

    def _note(self, made: list[Tensor], node: Node) -> int:
        self.flow.nodes.append(node)
        number = len(self.flow.nodes) - 1
        for tensor in made:
            self._made[id(tensor)] = (weakref.ref(tensor), number)
        for before in node.inputs:
            self.flow.nodes[before].outputs.append(number)
        return number

    def alive(self) -> set[int]:
        """Nodes whose tensors somebody still holds, what the model was given aside."""
        gc.collect()  # what only cycles hold is let go
        return {
            number
            for key, (tensor, number) in self._made.items()
            if tensor() is not None and key not in self._given
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        self.inside = True
        try:
            # Numbers are given before the call, which may write into what it takes.
            for tensor in tensors_in((args, kwargs)):
                self.number_of(tensor)
            out = func(*args, **kwargs)
            name, made = _name_of(func), list(tensors_in(out))
            if made or name in _READS:
                self.note(func, name, args, kwargs, made)
        finally:
            self.inside = False
        return out


class _Unseen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what reaches torch's kernels past its Python functions: scripts and extensions."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        recorder = self._recorder
        if not recorder.inside:
            recorder.inside = True
            try:
                recorder.note(func, _name_of(func), args, kwargs, list(tensors_in(out)))
            finally:
                recorder.inside = False
        return out


def _name_of(func: Any) -> str:
    """The bare name of an operation."""
    if isinstance(func, torch._ops.OpOverload):  # "mul.Tensor", of torch.ops
        return str(func.overloadpacket.__name__)
    name: str = (resolve_name(func) or getattr(func, "__name__", "?")).split(".")[-1]
    if name == "__get__":  # a property: x.T gives a tensor, x.shape does not
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _without_likes(name: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments whose values count, and empty tensors like the one whose values do not."""
    if name in _LIKE_ONE and args and isinstance(args[0], Tensor):
        return args[1:], ()
    if name in _LIKE and len(args) == 2 and isinstance(args[1], Tensor):
        return args[:1], (args[1].detach().to("meta"),)
    return args, ()


def _again(func: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
    """``func`` with the one tensor among its arguments left open; keeps no tensor."""
    places = [isinstance(a, Tensor) and not a.is_meta for a in args]
    rest = [None if here else a for a, here in zip(args, places, strict=True)]
    names = [k for k, v in kwargs.items() if isinstance(v, Tensor)]
    others = {k: v for k, v in kwargs.items() if k not in names}

    def call(x: Tensor) -> Any:
        given = [x if here else a for a, here in zip(rest, places, strict=True)]
        return func(*given, **others, **dict.fromkeys(names, x))

    return call


@torch.no_grad()
def flow_of(model: nn.Module, run: Callable[[], Any], *, whole: bool = False) -> Flow:
    """Record what happens to tensors while ``run()`` calls ``model``; hooks are taken off again.

    Args:
        model: whose modules are named.
        run: the forward; it should not keep what the model returns.
        whole: also see what passes by torch's Python functions (scripts, extensions), and which
            tensors somebody keeps.
    """
    recorder = _Recorder(model)
    names = {module: name for name, module in model.named_modules()}
    with contextlib.ExitStack() as stack:
        for module, name in names.items():
            stack.callback(_observed(module, name, recorder))
        if whole:
            stack.enter_context(_Unseen(recorder))
        with recorder:
            out = run()
    flow = recorder.flow
    flow.results = {
        number
        for tensor in tensors_in(out)
        if (number := recorder.number_of(tensor, make=False)) is not None
    }
    if whole:
        del out
        flow.kept = recorder.alive() - flow.results
    return flow


def _observed(module: nn.Module, name: str, recorder: _Recorder) -> Callable[[], None]:
    """Hook ``module`` so that ``recorder`` knows when it runs; return what unhooks it."""
    open_calls: list[ModuleCall] = []
    nodes = recorder.flow.nodes

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(tensors_in((args, kwargs)))
        taken = recorder.number_of(given[0]) if given else None
        caller = recorder.running[-1]
        call = ModuleCall(name, taken, None, len(given), len(nodes), caller=caller)
        open_calls.append(call)
        recorder.flow.calls.append(call)
        recorder.running.append(name)

    def leave(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        recorder.running.pop()
        made = list(tensors_in(out))
        call = open_calls.pop()
        call.output, call.end = recorder.number_of(made[0]) if made else None, len(nodes)

    before = module.register_forward_pre_hook(enter, with_kwargs=True)
    after = module.register_forward_hook(leave, with_kwargs=True)

    def remove() -> None:
        before.remove()
        after.remove()

    return remove
