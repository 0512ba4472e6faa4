"""What becomes of each norm, and which changes stand or fall together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from truenorm.calling.flow import Node
from truenorm.data.datasets import Scaling
from truenorm.folding.affine import Affine, Weighted
from truenorm.folding.subject import INPUT, Norm, Subject
from truenorm.folding.wiring import Neighbour, Partner, Refused, Weights, Wiring, parameter_of

Form = Literal["into producer", "into consumer", "into norm", "scale and shift"]


@dataclass
class Destination:
    """Weights that take norms up."""

    weights: Weights
    base: Weighted
    padded: bool
    inputs: int  # axis of the channels in what it takes
    outputs: int
    before: Affine | None = None
    after: list[Affine] = field(default_factory=list)

    def folded(self) -> Weighted:
        """The new weights, in float64."""
        weighted = self.base
        if self.before is not None:
            weighted = weighted.preceded_by(self.before, padded=self.padded)
        for affine in self.after:
            weighted = weighted.followed_by(affine)
        return weighted


@dataclass
class ChangeSet:
    """Changes that stand or fall together."""

    norms: dict[str, tuple[str, Form]] = field(default_factory=dict)  # what into, and how
    destinations: list[Destination] = field(default_factory=list)
    alone: dict[str, Affine] = field(default_factory=dict)  # as a scale and shift
    error: float = 0.0
    unfolded: float = 0.0
    fault: str = ""


class _Planner:
    """Decides for each norm, in the order of the forward."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.wiring = Wiring(subject.model, subject.flow, subject.norms)
        self.affines = {name: norm.affine for name, norm in subject.norms.items()}
        self.destinations: dict[str, Destination] = {}
        self.fates: dict[str, tuple[list[str], str, Form]] = {}  # what it meets, into, how
        self.left = dict(subject.left)
        self.merged: set[str] = set()

    def decide(self, name: str) -> None:
        """Into its producer, else into its consumers, else alone; or left, with the reason."""
        norm = self.subject.norms[name]
        producer = None if norm.scales_input else self.wiring.producer(name)
        if isinstance(producer, Partner):
            self._into_producer(norm, producer)
            return
        consumers = self.wiring.consumers(name) if norm.bare else None
        if isinstance(consumers, list):
            why = self._into_consumers(name, consumers)
            if why is None:
                return
            consumers = why
        reasons = [found.reason for found in (producer, consumers) if isinstance(found, Refused)]
        if norm.scales_input and not reasons:
            reasons = ["is not followed by weights alone"]
        if reasons and name not in self.merged:
            self.left[name] = "; ".join(reasons)
        else:
            self.fates[name] = ([], name, "scale and shift")

    def _into_producer(self, norm: Norm, partner: Partner) -> None:
        destination = self._destination(partner.weights)
        destination.after.append(self.affines[norm.name].of_channels(partner.channels))
        if norm.bare:
            self.wiring.absorbed.add(norm.name)
        weight = partner.weights.weight
        self.fates[norm.name] = ([weight], partner.weights.owner, "into producer")

    def _into_consumers(self, name: str, found: list[Partner | Neighbour]) -> Refused | None:
        for one in found:
            if isinstance(one, Partner) and (why := self._unfit(one.weights)):
                return Refused(why)
            if isinstance(one, Neighbour) and one.norm in self.left:
                return Refused(f"{one.norm}, which takes it, is left")
        affine = self.affines[name]
        for one in found:
            if isinstance(one, Partner):
                destination = self._destination(one.weights)
                destination.before = affine.of_channels(one.channels)
            else:
                first = affine.of_channels(one.channels)
                self.affines[one.norm] = self.affines[one.norm].after(first)
                self.merged.add(one.norm)
        self.wiring.absorbed.add(name)
        meets = [o.weights.weight if isinstance(o, Partner) else o.norm for o in found]
        owners = [o.weights.owner if isinstance(o, Partner) else o.norm for o in found]
        form: Form = "into norm" if isinstance(found[0], Neighbour) else "into consumer"
        self.fates[name] = (meets, ", ".join(owners), form)
        return None

    def _unfit(self, weights: Weights) -> str | None:
        """Why a weighted operation cannot take up what is before it."""
        if (
            weights.weight in self.destinations
            and self.destinations[weights.weight].before is not None
        ):
            return f"{weights.owner} has taken up another norm"
        if not _padded(self.subject.flow.nodes[weights.node], weights):
            return None
        module = self.subject.model.get_submodule(weights.owner)
        plain = isinstance(module, nn.modules.conv._ConvNd) and weights.weight.endswith("weight")
        if plain and self.subject.flow.nodes[weights.node].module == weights.owner:
            return None
        return f"zeros pad the input of {weights.owner}, which is no plain convolution"

    def _destination(self, weights: Weights) -> Destination:
        if weights.weight in self.destinations:
            return self.destinations[weights.weight]
        flow, model = self.subject.flow, self.subject.model
        node = flow.nodes[weights.node]
        given = flow.nodes[node.inputs[0]]
        weight = parameter_of(model, weights.weight)
        linear = weights.op == "linear"
        axes = [
            len(n.shape) - 1 if linear else len(n.shape) - weight.ndim + 1 for n in (given, node)
        ]
        groups = 1
        if not linear:
            groups = (
                node.shape[axes[1]] // weight.shape[1]
                if weights.transposed
                else given.shape[axes[0]] // weight.shape[1]
            )
        bias = None if weights.bias is None else parameter_of(model, weights.bias).detach().double()
        base = Weighted(weight.detach().double(), bias, weights.transposed, groups)
        destination = Destination(weights, base, _padded(node, weights), axes[0], axes[1])
        self.destinations[weights.weight] = destination
        return destination

    def input_scaling(self) -> None:
        """Fold the scaling of the model's first argument into whatever takes it."""
        scaling = self.subject.scaling
        if scaling is None:
            return
        value = self.subject.flow.calls_of("")[0].input
        shape = () if value is None else self.subject.flow.nodes[value].shape
        affine = _as_affine(scaling, shape)
        takers = None if value is None or affine is None else self.wiring.takers(value)
        if isinstance(takers, list) and affine is not None:
            self.affines[INPUT] = affine
            why = self._into_consumers(INPUT, takers)
            if why is None:
                return
            takers = why
        self.left[INPUT] = takers.reason if isinstance(takers, Refused) else (
            "the model's input is not taken by weights alone"
        )  # fmt: skip

    def parts(self) -> list[ChangeSet]:
        """The decisions, those that touch the same weights together."""
        home: dict[str, ChangeSet] = {}
        parts: list[ChangeSet] = []
        for name, (meets, into, form) in self.fates.items():
            joined = {id(home[key]): home[key] for key in (name, *meets) if key in home}
            part = next(iter(joined.values()), None) or ChangeSet()
            if id(part) not in joined:
                parts.append(part)
            for other in list(joined.values())[1:]:
                part.norms |= other.norms
                parts = [p for p in parts if p is not other]
                home |= {key: part for key, where in home.items() if where is other}
            part.norms[name] = (into, form)
            home |= dict.fromkeys((name, *meets), part)
        for weight, destination in self.destinations.items():
            home[weight].destinations.append(destination)
        for name, (_, _, form) in self.fates.items():
            if form == "scale and shift":
                home[name].alone[name] = self.affines[name]
        return parts


def planned(subject: Subject) -> tuple[list[ChangeSet], dict[str, str]]:
    """All changes, and the norms that stay with the reasons."""
    planner = _Planner(subject)
    planner.input_scaling()
    order = {call.module: i for i, call in reversed(list(enumerate(subject.flow.calls)))}
    for name in sorted(subject.norms, key=lambda name: order[name]):
        planner.decide(name)
    return planner.parts(), planner.left


def _padded(node: Node, weights: Weights) -> bool:
    """Whether a shift of the input reaches some outputs less than others."""
    if weights.op == "linear":
        return False
    padding = node.arguments[4] if len(node.arguments) > 4 else node.keywords.get("padding", 0)
    if weights.transposed or isinstance(padding, str):
        return weights.transposed or padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _as_affine(scaling: Scaling, shape: tuple[int, ...]) -> Affine | None:
    """An input scaling as a map of channels, if it is one."""
    if len(shape) < 2:
        return None
    along = (shape[1], *(1,) * (len(shape) - 2))
    try:
        scale = scaling.scale.double().expand(along).flatten()
        shift = scaling.shift
        offset = (
            torch.zeros_like(scale) if shift is None else shift.double().expand(along).flatten()
        )
    except RuntimeError:  # it has a value for each position
        return None
    return Affine(scale, -offset * scale)
