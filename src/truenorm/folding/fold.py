"""Fold batch norm into the weights beside it, for inference; each pair proved, each rest explained.

1. Observe one forward (``flow``), in which tensors show how they really flow; see which norms are
   fixed affine maps in it (``subject``).
2. Find for each what it can vanish into, or why it must stay (``wiring``, ``plan``).
3. Compute the new weights in float64 (``affine``), and prove each pair on the inputs that its
   operation got and on random ones (``proof``).
4. Write them into a copy (``building``), and compare it with the original from end to end, in the
   model's dtype and in float64. What fails is undone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from truenorm.data.datasets import Scaling
from truenorm.folding.building import built, plan_of
from truenorm.folding.plan import ChangeSet, Form, planned
from truenorm.folding.proof import Whole, prove, sifted
from truenorm.folding.subject import Subject


class FoldedNorm(NamedTuple):
    """A norm that has vanished.

    Attributes:
        norm: its dotted name.
        into: the module that took it up, or itself where it became a scale and shift.
        form: how.
        error: largest error of the pair's output, over the largest output, against float64, on
            the inputs that the pair got and on random ones.
        unfolded: the same of the two modules as they were.
    """

    norm: str
    into: str
    form: Form
    error: float
    unfolded: float


class LeftNorm(NamedTuple):
    """A norm that stays, and why."""

    norm: str
    reason: str


@dataclass(frozen=True)
class Folded:
    """A model for inference, and the proof that it is the one given.

    Attributes:
        model: a copy; what was given is untouched.
        pairs: what was folded.
        left: what was not.
        error: largest difference of the model's outputs from those of the original, over the
            largest output; on the example and on random inputs.
        exact: the same with both in float64; None if the model does not run in it.
        plan: what :func:`refold` needs to give a freshly built model the same structure.
    """

    model: nn.Module
    pairs: tuple[FoldedNorm, ...]
    left: tuple[LeftNorm, ...]
    error: float
    exact: float | None
    plan: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {
            "pairs": [pair._asdict() for pair in self.pairs],
            "left": [left._asdict() for left in self.left],
            "error": self.error,
            "exact": self.exact,
        }


def fold(model: nn.Module, example_inputs: Any, *, scaling: Scaling | None = None) -> Folded:
    """Fold every batch norm that can be folded, and prove it.

    A norm is y = s x + t in inference. Behind a convolution, transposed convolution or linear
    layer it becomes W' = s W and b' = s b + t; before one, W' = W s and b' = b + sum(W t). One
    that has neither becomes a scale and shift of channels. The arithmetic is in float64, rounded
    once.

    Args:
        model: any model that runs. Norms in train mode are left: call ``model.eval()`` first.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments, as the
            model takes them. What is folded is read off this one forward.
        scaling: of the model's first argument, to be folded into its first layer: the folded
            model takes what was not scaled (uint8, too), and so must ``example_inputs`` be.

    Returns:
        The folded copy, the pairs with their errors, and what was left with the reasons.

    Raises:
        InputError: the model cannot be copied, or does not run on the example.
    """
    subject = Subject.of(model, example_inputs, scaling)
    parts, left = planned(subject)
    prove(subject, parts)
    whole = Whole(subject)
    sound = sifted(whole, [part for part in parts if not part.fault])
    error, exact, _, _ = whole.errors(sound)
    return Folded(
        built(subject, sound),
        *_outcome(subject, parts, sound, left),
        error,
        exact,
        plan_of(subject, sound),
    )


def _outcome(
    subject: Subject, parts: list[ChangeSet], sound: list[ChangeSet], left: dict[str, str]
) -> tuple[tuple[FoldedNorm, ...], tuple[LeftNorm, ...]]:
    """Pairs and what was left, in the order of ``named_modules()``."""
    order = {name: i for i, (name, _) in enumerate(subject.model.named_modules())}
    for part in parts:
        if part.fault:
            left |= dict.fromkeys(part.norms, part.fault)
    pairs = [
        FoldedNorm(name, into, form, part.error, part.unfolded)
        for part in sound
        for name, (into, form) in part.norms.items()
    ]
    pairs.sort(key=lambda pair: order.get(pair.norm, -1))
    stay = sorted(left.items(), key=lambda row: order.get(row[0], -1))
    return tuple(pairs), tuple(LeftNorm(*row) for row in stay)
