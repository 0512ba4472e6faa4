"""A module's own forward as a graph, and the module with another graph in its place.

The graph is of the one module: what it calls are single nodes. It is only given out if it stands
for the forward whatever the mode and the values; see :func:`own_graph`.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from truenorm.calling.borrowing import borrowed
from truenorm.errors import InputError

ADDS_ANEW = (operator.add, torch.add, "add")
"""What adds two tensors, as a graph names it, and makes a third."""

ADDS = (*ADDS_ANEW, operator.iadd, "add_")
"""What adds two tensors; those of the end write into the first."""


class _Asked(Exception):
    """The forward depends on what kind of thing it is given."""


class _Value(Proxy):
    """A value of which only torch may ask what it is."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if not asking.startswith("torch."):
            raise _Asked
        return _Value


class _OwnForward(Tracer):
    """Traces one module; what it calls are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)


def own_graph(module: nn.Module) -> Graph:
    """The graph of the forward of ``module`` alone.

    Raises:
        InputError: there is none that stands for it always; the text says why, without a name.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        raise InputError("its forward is not that of its class")
    for parameter in inspect.signature(type(module).forward).parameters.values():
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variable or parameter.default is not parameter.empty:
            raise InputError(f"its forward takes {parameter.name}, which may be left out")
    graphs = []
    try:
        with borrowed(module, parameters=False):
            before = _attributes(module)
            for mode in (True, False, True):  # what differs in the first and the last is chance
                vars(module)["training"] = mode
                graphs.append(_OwnForward().trace(module))
            after = _attributes(module)
    except _Asked:
        raise InputError("its forward depends on the kind of its arguments") from None
    except Exception as error:  # others wrote the forward
        told = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"its forward cannot be followed: {told}") from None
    if after != before:
        made = any(name.startswith("_tensor_constant") for name in after)
        does = "makes tensors of its own" if made else "changes its attributes"
        raise InputError(f"its forward {does}")
    if len({str(graph) for graph in graphs}) > 1:
        raise InputError("its forward is another in training than in evaluation, or by chance")
    return graphs[0]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What each attribute is, and what containers among them hold; the mode aside."""
    return {
        name: [id(value), *map(id, value)] if isinstance(value, (list, dict, set)) else id(value)
        for name, value in vars(module).items()
        if name != "training"
    }


Fusions = tuple[tuple[str, ...], ...]
"""For each fusion in a graph the names of its nodes, from the norm to the activation."""


def addition(fusion: Sequence[Node]) -> list[Node]:
    """The residual's addition among the nodes of a fusion; none if there is no residual."""
    return [node for node in fusion[1:-1] if node.target in ADDS]


def rewrite(graph: Graph, fusions: Fusions) -> None:
    """Let each norm take its residual, and be what its activation was."""
    nodes = {node.name: node for node in graph.nodes}
    for names in fusions:
        fusion = [nodes[name] for name in names]
        others = (o for add in addition(fusion) for o in add.args if o not in fusion)
        residual = dict(zip(("residual",), others, strict=False))
        norm, *_, act = fusion
        with graph.inserting_before(act):
            whole = graph.call_module(str(norm.target), norm.args, residual)
        act.replace_all_uses_with(whole)
        for node in reversed(fusion):
            graph.erase_node(node)


class Rewritten(nn.Module):
    """What a module has beyond its class where its forward is another graph's: base of such.

    Attributes:
        original: the class that it was.
    """

    original: ClassVar[type[nn.Module]]
    _fusions: Fusions
    _run: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with what was fused."""
        return self._run(self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__().copy()  # type: ignore[no-untyped-call]
        state.pop("_run", None)  # which no pickle can hold
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _compile(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the original class: that of the module itself has no place in any module."""
        return _blank, (self.original,), self.__getstate__()


def become(module: nn.Module, fusions: Fusions) -> None:
    """Let ``module`` run its graph with ``fusions``; its class is one of its own then."""
    vars(module)["_fusions"] = fusions
    module.__class__ = _rewritten(type(module))
    _compile(module)


def _compile(module: Any) -> None:
    """Make what runs, from the original forward and the fusions that are known of it."""
    rewritten = type(module)
    module.__class__ = rewritten.original
    try:
        graph = own_graph(module)
    finally:
        module.__class__ = rewritten
    rewrite(graph, vars(module)["_fusions"])
    written = torch.fx.GraphModule(module, graph, rewritten.__name__)
    vars(module)["_run"] = type(written).forward


_made: dict[type[nn.Module], type[Rewritten]] = {}


def _rewritten(original: type[nn.Module]) -> type[Rewritten]:
    """The class of a module that was ``original``; one for each."""
    if original not in _made:
        about = {"__module__": __name__, "__doc__": original.__doc__, "original": original}
        _made[original] = type(original.__name__, (Rewritten, original), about)
    return _made[original]


def _blank(original: type[nn.Module]) -> nn.Module:
    """A module of that class without state; pickles hold the name of this function."""
    kind = _rewritten(original)
    return kind.__new__(kind)
