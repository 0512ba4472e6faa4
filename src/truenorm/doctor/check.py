"""What a check is and finds, and what many checks ask of the facts first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from truenorm.calling.flow import Flow, ModuleCall, Node
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.doctor.ledger.book import Book

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first
Needs = Literal["model", "data", "optimizer", "ledger"]
# Operations with weights, by the names that flow gives them.
WEIGHTED = {"linear", "conv1d", "conv2d", "conv3d", "bilinear"} | {
    f"conv_transpose{n}d" for n in (1, 2, 3)
}

NORMALIZING = {
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "sync_batch_norm"),
}


@dataclass(frozen=True)
class Found:
    """What a check saw: the layer (None for the model), numbers, and what they mean."""

    layer: str | None
    severity: Severity
    cause: str
    evidence: dict[str, Any] = field(default_factory=dict)
    fix: Callable[[], Any] | None = None
    advice: str | None = None  # where the check's own does not serve


class NotApplicable(Exception):
    """The check has nothing to look at in this model; the text says why."""


@dataclass(frozen=True)
class Check:
    """One fault that a model may have, and two ways to see it.

    Attributes:
        code: stable; documentation, baselines and tests use it.
        title: the fault in a few words.
        advice: the remedy.
        look: what is found in the facts of a model; None if only training shows it.
        looks_at: what must be given for ``look``.
        evaluates: whether ``look`` wants the model in eval mode; else it is as given.
        watched: what is found in the book of a ledger; None if training shows nothing of it.
    """

    code: str
    title: str
    advice: str
    look: Callable[[Facts], Iterator[Found]] | None = None
    looks_at: Literal["model", "data", "optimizer"] = "model"
    evaluates: bool = False
    watched: Callable[[Book, Facts], Iterator[Found]] | None = None

    @property
    def needs(self) -> tuple[Needs, ...]:
        """What must be given to find the fault; any one of them is enough."""
        own: tuple[Needs, ...] = () if self.look is None else (self.looks_at,)
        return own if self.watched is None else (*own, "ledger")


def tracking(facts: Facts) -> list[NormFacts]:
    """The batch norms with running statistics; without one the check does not apply."""
    norms = [norm for norm in facts.batch_norms if norm.tracked is not None]
    if not norms:
        raise NotApplicable("no batch norm with running statistics")
    return norms


def batch_norms(facts: Facts) -> list[NormFacts]:
    """All batch norms; without one the check does not apply."""
    if not facts.batch_norms:
        raise NotApplicable("no batch norm")
    return facts.batch_norms


def flow_of(facts: Facts) -> Flow:
    """How tensors flow, of a check that is asked only where data were given."""
    assert facts.flow is not None
    return facts.flow


def calls_of(facts: Facts, norms: list[NormFacts]) -> Iterator[tuple[NormFacts, ModuleCall]]:
    """The first call of each of ``norms`` whose input is known.

    A norm of which the first call has none is passed over.
    """
    flow = flow_of(facts)
    for norm in norms:
        for call in flow.calls_of(norm.name)[:1]:
            if call.input is not None:
                yield norm, call


def dropouts_before(flow: Flow, number: int, modules: dict[str, nn.Module]) -> list[Node]:
    """Dropouts that drop something on the ways to the node ``number``, nearest first.

    A norm between takes up what they do to the variance.
    """

    def through(node: Node) -> bool:
        return node.op not in NORMALIZING and "dropout" not in node.op

    start = flow.nodes[number]
    nodes = [start, *(flow.upstream(number, through) if through(start) else ())]
    return [node for node in nodes if "dropout" in node.op and rate_of(node, modules) > 0]


def rate_of(node: Node, modules: dict[str, nn.Module]) -> float:
    """The rate of a dropout; 0.5 where it is not named."""
    p = getattr(modules.get(node.module), "p", node.keywords.get("p", 0.5))
    return p if isinstance(p, float) else 0.5
