"""What stands behind a norm, a residual and an activation, taken into the norm.

Whose forward calls norm and activation is seen on one forward of the model; that nothing else
takes what lies between them is read off the graph of that forward; that outputs, gradients and
running statistics stay is proved by running it both ways, on what it was given in the model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from truenorm.calling.borrowing import Randoms, borrowed, eager, to_eval
from truenorm.calling.call import call_with
from truenorm.calling.flow import Flow, flow_of
from truenorm.errors import InputError
from truenorm.kernels.fused import OPERATIONS
from truenorm.layers import rewriting, trial
from truenorm.layers.batch_norm import BatchNorm

_GRID = torch.tensor(
    [-1e3, *(i / 20 for i in range(-600, 601)), 1e3], dtype=torch.float64, device="cpu"
)
_NAMES = {name + end for name in OPERATIONS for end in ("", "_")} | {"hardtanh", "hardtanh_"}


class _Left(Exception):
    """A norm stays without what follows it; the text says why."""


class _Calls:
    """Who called which module how often, in one forward of a model."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow, self._named = flow, dict(model.named_modules())
        self._names = {module: name for name, module in self._named.items()}
        self.by: dict[nn.Module, Counter[nn.Module]] = {m: Counter() for m in self._names}
        for call in flow.calls:
            self.by[self._named[call.module]][self._named[call.caller]] += 1

    def only(self, module: nn.Module, by: nn.Module, places: int) -> bool:
        """Whether all calls of ``module`` are those of ``by``, in so many places of its forward."""
        return set(self.by[module]) == {by} and self.of(module) == places * self.of(by)

    def of(self, module: nn.Module) -> int:
        """How often it was called."""
        return self.by[module].total()

    def alone_behind(self, norm: nn.Module) -> set[nn.Module]:
        """What each call of ``norm`` gave its output to, and to nothing beside it."""
        nodes, found = self.flow.nodes, set()
        for call in self.flow.calls_of(self._names[norm]):
            users = set() if call.output is None else set(nodes[call.output].outputs)
            takers = (
                self._named[other.module]
                for other in self.flow.calls
                if (other.caller, other.input) == (call.caller, call.output)
                and call.output not in self.flow.results
                and users.issubset(range(other.first, other.end))
            )
            found.add(next(takers, norm))
        return found


@dataclass
class _Block:
    """A module whose forward calls norms, and what stands behind them there.

    Attributes:
        module: that module.
        graph: of its forward.
        fusions: the nodes of each, from the norm to the activation.
        acts: the activation of each norm.
        spare: names, below the module, of activations that will have nothing left to do.
        rewrites: whether the forward must change; else the spare ones do nothing in it.
    """

    module: nn.Module
    graph: Graph
    fusions: list[tuple[Node, ...]] = field(default_factory=list)
    acts: dict[BatchNorm, str] = field(default_factory=dict)
    spare: set[str] = field(default_factory=set)
    rewrites: bool = False

    def module_of(self, node: Node) -> nn.Module | None:
        """What a node calls, if that is a module."""
        if node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))

    def nodes_of(self, module: nn.Module) -> list[Node]:
        """The calls of ``module``."""
        return [node for node in self.graph.nodes if self.module_of(node) is module]

    def find(self, norm: BatchNorm, calls: _Calls) -> None:
        """Note what can be taken into ``norm``."""
        nodes = self.nodes_of(norm)
        if not calls.only(norm, self.module, len(nodes)):
            raise _Left("it is called from several places")
        behind = [self._behind(node) for node in nodes]
        acts = {act for act, _ in behind}
        if len(acts) > 1:
            raise _Left(f"it is called for {' and for '.join(sorted(acts))}")
        self.acts[norm] = acts.pop()
        self.fusions += [fusion for _, fusion in behind]

    def _behind(self, norm: Node) -> tuple[str, tuple[Node, ...]]:
        """The activation behind a call of a norm, and the nodes from there to it."""
        if len(norm.args) != 1 or norm.kwargs:
            raise _Left("it is called with more than a tensor")
        nodes = [norm, *self._next(norm)]
        act = self._activation(nodes[-1])
        if act is None and nodes[-1].target in rewriting.ADDS:
            self._check_addition(*nodes[-2:])
            nodes += self._next(nodes[-1])
            act = self._activation(nodes[-1])
        if act is not None:
            return act, tuple(nodes)
        if nodes[-1].op == "output":
            raise _Left(f"its output is that of {type(self.module).__qualname__}")
        follows = "its output" if nodes[-2] is norm else f"that of {self._word(nodes[-2])}"
        raise _Left(f"{self._word(nodes[-1])} takes {follows}, and is no activation")

    def _next(self, node: Node) -> list[Node]:
        """The one operation that takes the output of ``node``, behind those that do nothing."""
        passed = []
        while True:
            if len(node.users) != 1:
                raise _Left(f"{node.name} is taken by {len(node.users)} operations, not by one")
            node = next(iter(node.users))
            passed.append(node)
            module = self.module_of(node)
            if type(module) is not nn.Identity or _watched(module):
                return passed

    def _check_addition(self, before: Node, add: Node) -> None:
        """Raise _Left if more happens than that a tensor is added to what ``before`` gives."""
        first, *others = add.args
        if add.kwargs or len(others) != 1 or not isinstance(others[0], Node):
            raise _Left(f"{add.name} adds no tensor to its output")
        if first is not before and add.target not in rewriting.ADDS_ANEW:
            raise _Left(f"{add.name} writes into the tensor that its output is added to")
        if any(add in fusion for fusion in self.fusions):
            raise _Left(f"{add.name} adds two norms, of which another takes it in")

    def _word(self, node: Node) -> str:
        module = self.module_of(node)
        return node.name if module is None else f"{node.target} ({type(module).__name__})"

    def _activation(self, node: Node) -> str | None:
        """The name of the activation that a node is, by what it does to numbers."""
        tensors, rest = node.args[:1], node.args[1:]
        if not (tensors and isinstance(tensors[0], Node)) or node.all_input_nodes != [*tensors]:
            return None
        module = self.module_of(node)
        if module is not None:
            return None if rest or node.kwargs else _activation_of_module(module)
        name = getattr(node.target, "__name__", node.target)
        if name not in _NAMES:
            return None
        function: Any = node.target
        if node.op == "call_method":
            function = getattr(Tensor, str(node.target))
        return _same_as(lambda x: function(x, *rest, **node.kwargs))

    def settle(self, calls: _Calls) -> None:
        """Find which activations nothing will call, and whether the forward must change.

        Raises:
            _Left: it must, and may not.
        """
        fused = {fusion[-1] for fusion in self.fusions}
        for act in fused:
            module = self.module_of(act)
            places = [] if module is None else self.nodes_of(module)
            if (
                module is None
                or not fused.issuperset(places)
                or not calls.only(module, self.module, len(places))
            ):
                self.rewrites = True
            else:
                self._spares(module)
        self.rewrites = self.rewrites or any(map(rewriting.addition, self.fusions))
        if self.rewrites and isinstance(self.module, nn.Sequential):
            raise _Left("its activation is called elsewhere, too")

    def apply(self) -> None:
        """Do it."""
        for norm, act in self.acts.items():
            norm.adopt(replace(norm.options, act=act))
        if self.rewrites:
            names = (tuple(node.name for node in fusion) for fusion in self.fusions)
            rewriting.become(self.module, tuple(names))
        for name in self.spare:
            parent, _, last = name.rpartition(".")
            training = self.module.get_submodule(name).training
            setattr(self.module.get_submodule(parent), last, nn.Identity().train(training))

    def _spares(self, act: nn.Module) -> None:
        below = self.module.named_modules(remove_duplicate=False)
        self.spare |= {name for name, other in below if other is act}

    def told(self, norm: BatchNorm) -> str:
        """What a norm takes in, in words."""
        its = (fusion for fusion in self.fusions if self.module_of(fusion[0]) is norm)
        added = any(map(rewriting.addition, its))
        what = f"takes in {'the residual and ' if added else ''}{self.acts[norm]}"
        if not self.rewrites:
            return what
        return f"{what}; the forward of {type(self.module).__qualname__} is rewritten"


@dataclass
class _Unread(_Block):
    """A block whose forward is no graph: what stands behind its norms was seen once.

    Attributes:
        why: it is none.
    """

    graph: Graph = field(default_factory=Graph)
    why: str = ""

    def find(self, norm: BatchNorm, calls: _Calls) -> None:
        """Note the activation module that took all of the norm's outputs, and nothing else."""
        takers = calls.alone_behind(norm)
        taker = takers.pop()
        act = _activation_of_module(taker)
        once = calls.only(taker, self.module, 1) and calls.only(norm, self.module, 1)
        if act is None or takers or not once:
            raise _Left(f"{type(self.module).__qualname__}: {self.why}")
        self.acts[norm] = act
        self._spares(taker)

    def settle(self, calls: _Calls) -> None:
        """All is settled."""


def observe(model: nn.Module, example: Any) -> Flow:
    """One forward of ``model`` on ``example``, in evaluation; all is given back."""
    with borrowed(model, Randoms(), parameters=False), eager(model):
        to_eval(model)
        return flow_of(model, lambda: call_with(model, example))


def fuse(
    model: nn.Module, norms: Iterable[BatchNorm], flow: Flow, example: Any
) -> dict[BatchNorm, str]:
    """Take into each of ``norms`` what stands behind it.

    Args:
        model: any model.
        norms: of it.
        flow: of a forward of ``model`` on ``example``.
        example: the arguments of that forward.

    Returns:
        For each norm what it takes in, or why nothing.
    """
    calls = _Calls(model, flow)
    told: dict[BatchNorm, str] = {}
    callers: dict[nn.Module, list[BatchNorm]] = {}
    for norm in norms:
        try:
            callers.setdefault(_caller(norm, calls), []).append(norm)
        except _Left as why:
            told[norm] = f"{_ALONE}: {why}"
    blocks = []
    for module, its in callers.items():
        try:
            block = _Block(module, rewriting.own_graph(module))
        except InputError as why:
            block = _Unread(module, why=str(why))
        for norm in its:
            try:
                block.find(norm, calls)
            except _Left as why:
                told[norm] = f"{_ALONE}: {why}"
        if block.acts:
            blocks.append(block)
    unproved = _unproved(model, blocks, calls, example)
    for block in blocks:
        if block.module in unproved:
            told.update(dict.fromkeys(block.acts, f"{_ALONE}: {unproved[block.module]}"))
            continue
        told |= {norm: block.told(norm) for norm in block.acts}
        block.apply()
    return told


_ALONE = "takes nothing in"


def _caller(norm: BatchNorm, calls: _Calls) -> nn.Module:
    """The module whose forward calls ``norm``."""
    if norm.act is not None:
        raise _Left("it applies an activation already")
    if _watched(norm):
        raise _Left("its hooks would see another output")
    callers = list(calls.by[norm])
    if not callers:
        raise _Left("the example does not call it")
    if len(callers) > 1:
        raise _Left("it is called from several places")
    if callers[0] is norm:
        raise _Left("it is the whole model")
    return callers[0]


def _watched(module: nn.Module) -> bool:
    """Whether hooks stand on it that see its output."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _activation_of_module(module: nn.Module) -> str | None:
    state = (*module.parameters(), *module.buffers(), *module.children())
    if state or _watched(module) or module._forward_pre_hooks:
        return None
    found = {_same_as(copy.deepcopy(module).train(mode).forward) for mode in (True, False)}
    return found.pop() if len(found) == 1 else None


def _same_as(function: Callable[[Tensor], Any]) -> str | None:
    """The activation that does to numbers what ``function`` does."""
    try:
        with torch.no_grad():
            y = function(_GRID.clone())
    except Exception:  # others wrote it
        return None
    if not isinstance(y, Tensor) or y.shape != _GRID.shape or y.dtype != _GRID.dtype:
        return None
    same = (n for n, act in OPERATIONS.items() if torch.allclose(y, act(_GRID), 1e-9, 1e-12))
    return next(same, None)


# -- the proof ------------------------------------------------------------------------------------


def _unproved(
    model: nn.Module, blocks: list[_Block], calls: _Calls, example: Any
) -> dict[nn.Module, str]:
    """Of blocks that are not the same both ways, why."""
    found: dict[nn.Module, str] = {}
    trying = False

    def try_once(block: _Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal trying
            if trying or block in tried:
                return
            trying = True
            tried.append(block)
            difference = trial.difference(module, block.apply, args, kwargs)
            if difference:
                found[module] = difference
            trying = False

        return hook

    tried: list[_Block] = []
    with borrowed(model, Randoms(), parameters=False), eager(model), torch.no_grad():
        to_eval(model)
        for block in blocks:
            try:
                block.settle(calls)
            except _Left as left:
                found[block.module] = str(left)
                continue
            block.module.register_forward_pre_hook(try_once(block), with_kwargs=True)
        call_with(model, example)
    return found
