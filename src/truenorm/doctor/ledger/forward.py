"""One forward of a watched model, and the marks by which it is seen what became of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Fate = Literal["pending", "stepped", "discarded", "inputs only", "unreached", "no gradients"]
Stray = Literal["no gradients", "unreached", "discarded", "attack"]


class Written(Protocol):
    """What a forward writes: a layer, which counts what became of its writes."""

    shape: tuple[int, int]  # rows and values of its last input that was written
    rested_stepped: int  # calls in eval mode, in forwards that were stepped with

    def step_on(self, step: int, *, passes: int = 1) -> None:
        """A write has been stepped with."""

    def stray(self, kind: Stray, *, inside: bool) -> None:
        """A write belongs to no step."""


class Forward:
    """One call of an outermost module, from its beginning to its return.

    Attributes:
        step: steps that the optimizer had made.
        grad: whether it was called with gradients enabled.
        inside: whether a forward with gradients came before it in the same step.
        examples: length of the first axis of its first tensor, if it is recorded in detail.
        detailed: whether its calls are recorded in detail.
        recorded: whether one has been.
        checked: whether it is looked whether statistics are finite.
        attacks: whether an input that is no output of parameters wanted a gradient.
        generated: whether an input that is one did, as what a generator made does.
        fate: what became of its gradient. "stepped": a step was made with it; "discarded": it was
            thrown away; "inputs only": no parameter got one; "unreached": no backward pass came.
        passes: backward passes behind the step that was made with it.
        writes: the layers whose statistics it moved, one entry for each write.
        rested: the layers that ran in eval mode.
        gradient: that of a parameter in it, by which the fate is seen.
        mark: in its graph, to see whether a backward pass comes by.
        presumed: it has no mark, as no other forward came between a step and the next so far.
        reached: whether a backward pass has come by.
        fired: so has the one that runs now, or one before that kept its graph for another.
        kept: that one may come by once more.
        linked: a checkpoint's first forward, whose repetition has been seen.
        key: its module and the shapes of its arguments.
    """

    # Defaults of the class: a forward sets few of them, and a small model has little time.
    examples = 0
    detailed = recorded = checked = attacks = generated = presumed = reached = fired = kept = (
        linked
    ) = False
    fate: Fate = "pending"
    passes = 0
    rested: Sequence[Written] = ()
    gradient: Gradient | None = None
    mark: weakref.ref[Mark] | None = None
    key: tuple[Any, ...] = ()

    def __init__(self, step: int = 0, *, grad: bool = True, inside: bool = False) -> None:
        self.step, self.grad, self.inside = step, grad, inside
        self.writes: list[Written] = []


class Mark:
    """Sits in the graph of a forward: called when a backward pass comes by, gone with the graph."""

    __slots__ = ("__weakref__", "forward")

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, _: Any) -> None:
        forward = self.forward
        forward.reached = forward.fired = True
        forward.kept |= torch.is_grad_enabled()  # create_graph=True


class Gradient:
    """One parameter, by which it is seen that gradients are added, thrown away or stepped with.

    Attributes:
        forwards: those behind its present gradient.
        passes: the backward passes behind it.
    """

    def __init__(self, parameter: nn.Parameter, accumulated: Any) -> None:
        self.parameter, self._accumulated = parameter, accumulated
        self.forwards: list[Forward] = []
        self.passes = 0
        self.fresh = True  # whether the last gradient found no other to be added to
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks on, once; a parameter that was frozen meanwhile takes none."""
        if self._handles or not self.parameter.requires_grad:
            return
        self._handles = [
            self.parameter.register_hook(self._before),  # type: ignore[no-untyped-call]
            self.parameter.register_post_accumulate_grad_hook(self._after),  # type: ignore[no-untyped-call]
        ]

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, _: Tensor) -> None:
        if self.forwards:
            old = self.parameter.grad
            self.fresh = old is None or (old.layout == torch.strided and not bool(old.any()))

    def _after(self, _: Tensor) -> None:
        self._accumulated(self)
