"""Which weights a normalization can vanish into: what its input comes from, where its output goes.

Everything is read off one observed forward; what cannot be proved safe has its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truenorm.calling.flow import Flow, Node

_CONVS = {f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)}
WEIGHTED = {*_CONVS, "linear"}
# What moves or averages values without changing what is common to a channel. Whether one does is
# seen by letting channel numbers pass: zeros that an average counts show there. Padding by a
# constant and dropout may do nothing to the example, and something to another input or later.
_PASSING = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT"),
    *("contiguous", "clone", "detach", "to", "type", "float", "double", "half", "bfloat16"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("getitem", "expand", "narrow", "roll", "flip", "pad", "unfold", "data", "identity"),
    *("channel_shuffle", "upsample_nearest", "interpolate", "mean"),
    *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)),
}


class Weights(NamedTuple):
    """One use of a weight: the operation that takes it.

    Attributes:
        node: its number.
        op: what it is.
        weight: dotted name.
        bias: dotted name, or None if it takes none.
    """

    node: int
    op: str
    weight: str
    bias: str | None

    @property
    def owner(self) -> str:
        """Dotted name of the module that holds the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return "transpose" in self.op


class Partner(NamedTuple):
    """A weighted operation beside a norm, and which of the norm's channels meets which of its own.

    Attributes:
        weights: the operation.
        channels: of a producer, for each output channel the norm's channel; of a consumer, for each
            input channel the norm's channel.
    """

    weights: Weights
    channels: Tensor


class Neighbour(NamedTuple):
    """A norm behind a norm; ``channels`` has, for each of its channels, the first one's."""

    norm: str
    channels: Tensor


class Refused(NamedTuple):
    """There is a partner, but it cannot take the norm up."""

    reason: str


@dataclass
class Wiring:
    """A forward's values and who takes them, each norm's call as one operation.

    Attributes:
        model: that was observed.
        flow: of its forward.
        norms: dotted names of the modules that count as one operation.
        absorbed: those that have vanished already; values pass through them unchanged.
    """

    model: nn.Module
    flow: Flow
    norms: Iterable[str]
    absorbed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.calls = {name: self.flow.calls_of(name) for name in self.norms}
        self._inside: dict[int, str] = {}
        for name, calls in self.calls.items():
            for call in calls:
                self._inside |= dict.fromkeys(range(call.first, call.end), name)
        self._names = _same_tensors(self.model)
        self._uses = Counter(name for node in self.flow.nodes for name in set(node.state))
        self._hooked = self._seen_by_hooks()
        self._called = {self.model.get_submodule(call.module) for call in self.flow.calls}

    # -- what is before a norm --------------------------------------------------------------------

    def producer(self, norm: str) -> Partner | Refused | None:
        """The weighted operation whose output the norm normalizes; None if there is none."""
        value = self.calls[norm][0].input
        user: int | str = norm
        chain: list[Node] = []
        refused: Refused | None = None
        while value is not None:
            refused = refused or self._shared(value, user)
            node, inside = self.flow.nodes[value], self._inside.get(value)
            if inside is not None and inside in self.absorbed:
                value, user = self.calls[inside][0].input, inside
            elif inside is None and _passes(node):
                chain.append(node)
                value, user = node.inputs[0], value
            elif inside is None and node.op in WEIGHTED:
                return refused or self._checked_producer(value, chain[::-1], norm)
            else:
                return None
        return None

    def _checked_producer(self, value: int, chain: list[Node], norm: str) -> Partner | Refused:
        weights = self.weights_of(value)
        if isinstance(weights, Refused):
            return weights
        node = self.flow.nodes[value]
        shape = node.shape
        axis = _channel_axis(weights, shape, parameter_of(self.model, weights.weight).ndim)
        index = _index(shape, axis, chain, 1)
        owner = weights.owner or "(model)"
        if index is None or len(index) != shape[axis] or len(set(index.tolist())) != len(index):
            return Refused(f"its channels are not the output channels of {owner}")
        channels = torch.empty_like(index)
        channels[index] = torch.arange(len(index))
        return self.apart(norm, weights.owner) or Partner(weights, channels)

    # -- what is behind a norm --------------------------------------------------------------------

    def consumers(self, norm: str) -> list[Partner | Neighbour] | Refused | None:
        """What takes the norm's output; None if that is anything but weights and norms."""
        output = self.calls[norm][0].output
        return None if output is None else self.takers(output, norm)

    def takers(self, value: int, norm: str = "") -> list[Partner | Neighbour] | Refused | None:
        """All weights and norms that take ``value`` (N, C, *S); None if anything else does.

        Args:
            value: what ``norm`` gives.
            norm: dotted name; "" for the model's input.
        """
        ends: list[tuple[int | str, list[Node]]] = []
        waiting: list[tuple[int, list[Node]]] = [(value, [])]
        refused: Refused | None = None
        while waiting:
            at, chain = waiting.pop()
            refused = refused or self._visible(at)
            users = self._users(at)
            if not users and not refused:
                continue  # made and forgotten
            for user in users:
                if isinstance(user, str) and user in self.absorbed:
                    return None
                if isinstance(user, str) or self.flow.nodes[user].op in WEIGHTED:
                    ends.append((user, chain))
                elif _passes(self.flow.nodes[user]):
                    waiting.append((user, [*chain, self.flow.nodes[user]]))
                else:
                    return None
        if not ends:
            return None
        if refused:
            return refused
        found = self._checked_takers(ends, self.flow.nodes[value].shape)
        if isinstance(found, Refused):
            return found
        names = [one.norm if isinstance(one, Neighbour) else one.weights.owner for one in found]
        return next(filter(None, (self.apart(norm, name) for name in names)), found)

    def _checked_takers(
        self, ends: list[tuple[int | str, list[Node]]], shape: tuple[int, ...]
    ) -> list[Partner | Neighbour] | Refused:
        found: list[Partner | Neighbour] = []
        for user, chain in ends:
            if isinstance(user, str):
                index = _index(shape, 1, chain, 1)
                if index is None or len(self.calls[user]) != 1:
                    return Refused(f"its channels are not those of {user}, which takes it")
                found.append(Neighbour(user, index))
                continue
            weights = self.weights_of(user)
            if isinstance(weights, Refused):
                return weights
            ndim = parameter_of(self.model, weights.weight).ndim
            given = chain[-1].shape if chain else shape
            index = _index(shape, 1, chain, _channel_axis(weights, given, ndim))
            if index is None:
                owner = weights.owner or "(model)"
                return Refused(f"its channels are not the input channels of {owner}")
            found.append(Partner(weights, index))
        return found

    # -- safety -----------------------------------------------------------------------------------

    def weights_of(self, value: int) -> Weights | Refused:
        """The weights that the operation ``value`` takes, if they may be changed."""
        node = self.flow.nodes[value]
        where = node.module or "(model)"
        if len(node.inputs) != 1 or not 1 <= len(node.state) <= 2:
            return Refused(f"the weight of {where} is computed anew in each forward")
        for name in node.state:
            others = [other for other in self._names[name] if other != name]
            if others:
                return Refused(f"{name} is shared with {others[0]}")
            if self._uses[name] > 1:
                return Refused(f"{name} is used {self._uses[name]} times in a forward")
        weights = Weights(value, node.op, node.state[0], (*node.state, None)[1])
        module = self.model.get_submodule(weights.owner)
        if hooks_of(module):
            return Refused(f"{weights.owner or '(model)'} has hooks")
        if weights.bias is None and not _takes_bias(module, weights):
            return Refused(f"{weights.owner or '(model)'} has no place for a bias")
        return weights

    def apart(self, one: str, other: str) -> Refused | None:
        """Why two modules may not become one: another could be called in the place of either.

        As ``norms[domain](conv(x))`` does: the example calls one norm of several. Told by an alike
        module that the example does not call, in the list, dict or module that holds one of the
        two and not the other.
        """
        return self._replaceable(one, other) or self._replaceable(other, one)

    def _replaceable(self, name: str, other: str) -> Refused | None:
        module, partner = self.model.get_submodule(name), self.model.get_submodule(other)
        key = name
        while key:
            holder, _, key_there = key.rpartition(".")
            if f"{other}.".startswith(f"{key}."):
                return None
            found = self._idle(holder, key_there, module, partner)
            if found is not None:
                return Refused(
                    f"{found}, which the forward of the example does not call, could take the "
                    f"place of {name}"
                )
            key = holder
        return None

    def _idle(self, holder: str, key: str, module: nn.Module, partner: nn.Module) -> str | None:
        """A module beside ``key`` that is like ``module`` and was not called."""
        there = self.model.get_submodule(holder)
        listed = isinstance(there, (nn.ModuleList, nn.ModuleDict))
        idle = {
            name: found
            for beside, child in there.named_children()
            if beside != key
            for name, found in child.named_modules(prefix=f"{holder}.{beside}".strip("."))
            if found not in self._called and (listed or found is child)
        }
        if not listed and any(_alike(found, partner) for found in idle.values()):
            return None  # a pair of its own
        return next((name for name, found in idle.items() if _alike(found, module)), None)

    def _users(self, value: int) -> list[int | str]:
        users = [self._inside.get(n, n) for n in self.flow.nodes[value].outputs]
        return list(dict.fromkeys(users))

    def _shared(self, value: int, user: int | str) -> Refused | None:
        """Why ``value`` must stay what it is, whatever ``user`` makes of it."""
        others = [other for other in self._users(value) if other != user]
        if others:
            return Refused(f"{self._output_of(value)} is also used by {self._user(others[0])}")
        return self._visible(value)

    def _visible(self, value: int) -> Refused | None:
        if value in self.flow.results:
            return Refused(f"{self._output_of(value)} is returned by the model")
        if value in self.flow.kept:
            return Refused(f"{self._output_of(value)} is kept after the forward")
        if value in self._hooked:
            return Refused(f"{self._output_of(value)} is seen by a hook of {self._hooked[value]}")
        return None

    def _seen_by_hooks(self) -> dict[int, str]:
        modules = dict(self.model.named_modules())
        return {
            value: call.module or "(model)"
            for call in self.flow.calls
            if hooks_of(modules[call.module])
            for value in (call.input, call.output)
            if value is not None
        }

    def _output_of(self, value: int) -> str:
        node = self.flow.nodes[value]
        return f"the output of {node.module or node.op}"

    def _user(self, user: int | str) -> str:
        if isinstance(user, str):
            return user
        node = self.flow.nodes[user]
        return f"{node.op} in {node.module or '(model)'}"


def parameter_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a dotted name."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    assert isinstance(found, Tensor)
    return found


def hooks_of(module: nn.Module) -> bool:
    """Whether a forward of ``module`` calls hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether one could be called in the other's place: norms of a width, weights of a shape."""
    for kind in ("running_mean", "weight"):
        held = [getattr(module, kind, None) for module in (one, other)]
        shapes = [t.shape for t in held if isinstance(t, Tensor) and not nn.parameter.is_lazy(t)]
        if len(shapes) == 2 and shapes[0] == shapes[1]:
            return kind == "running_mean" or type(one) is type(other)
    return False


def _takes_bias(module: nn.Module, weights: Weights) -> bool:
    """Whether ``module`` has a bias that is None, and would use one."""
    return weights.weight.endswith("weight") and "bias" in module._parameters


def _same_tensors(model: nn.Module) -> Mapping[str, list[str]]:
    """For each parameter and buffer all names of what shares its memory.

    A module in several places counts once: it is one module, whatever it is called by.
    """
    places: dict[object, list[str]] = {}
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is None or nn.parameter.is_lazy(tensor):
                    continue
                place = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
                name = f"{prefix}.{key}" if prefix else key
                places.setdefault(place or id(tensor), []).append(name)
    return {name: names for names in places.values() for name in names}


def _passes(node: Node) -> bool:
    return (
        node.op in _PASSING
        and not _adds_zeros(node)
        and node.again is not None
        and not node.state
        and node.dtype is not None
        and node.dtype.is_floating_point
    )


def _adds_zeros(node: Node) -> bool:
    """Whether it may put a constant between the values, if not here, then at another size or mode.

    How much a pad adds is often computed from the size; a dropout that rests can be woken.
    """
    if node.op == "pad":
        return bool(_argument(node, 2, "mode", "constant") == "constant")
    return "dropout" in node.op and bool(_argument(node, 1, "p", 0.5))


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument that is no tensor, by its place or its name."""
    if len(node.arguments) > place:
        return node.arguments[place]
    return node.keywords.get(name, default)


def _channel_axis(weights: Weights, shape: tuple[int, ...], ndim: int) -> int:
    """Where the channels of a weighted operation's input or output of ``shape`` lie."""
    if weights.op == "linear":
        return len(shape) - 1
    return 1 if len(shape) == ndim else 0  # a convolution of one example without a batch axis


def _index(shape: tuple[int, ...], axis: int, chain: list[Node], end: int) -> Tensor | None:
    """Which channel each place of axis ``end`` shows after ``chain``, or None if it is mixed.

    Channel numbers pass, and their squares: an average of several channels agrees in one only.
    """
    numbers = torch.arange(1, shape[axis] + 1, dtype=torch.float64)
    first, second = (_passed(n, shape, axis, chain, end) for n in (numbers, numbers.square()))
    if first is None or second is None:
        return None
    rounded = first.round()
    if (first - rounded).abs().max() > 1e-6 or rounded.min() < 1:
        return None
    if not torch.allclose(second, rounded.square(), rtol=1e-9, atol=0):
        return None
    return rounded.long() - 1


@torch.no_grad()
def _passed(
    channels: Tensor, shape: tuple[int, ...], axis: int, chain: list[Node], end: int
) -> Tensor | None:
    """What axis ``end`` shows of a value for each channel, or None if other axes show, too."""
    view = [1] * len(shape)
    view[axis] = -1
    x = channels.view(view).expand(shape).clone()
    try:
        for node in chain:
            x = node.again(x)  # type: ignore[misc]  # _passes() has seen that there is one
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    if not isinstance(x, Tensor) or x.ndim <= end or not x.numel():
        return None
    across = x.double().movedim(end, 0).flatten(1)
    one = across[:, 0]
    return one if torch.allclose(across, one[:, None], rtol=1e-9, atol=0) else None
