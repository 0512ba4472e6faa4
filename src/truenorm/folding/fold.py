"""Fold batch norm into the weights beside it, for inference; each pair proved, each rest explained.

1. Observe one forward for each example (``flow``), in which tensors show how they really flow; see
   which norms are fixed affine maps in it (``subject``).
2. Find for each what it can vanish into, or why it must stay (``wiring``, ``plan``), in all
   examples (``agreement``).
3. Compute the new weights in float64 (``affine``), and prove each pair on the inputs that its
   operation got and on random ones (``proof``).
4. Write them into a copy (``building``), and compare it with the original from end to end
   (``whole``), on the examples and on what differs from them (``trials``). What fails is undone.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from truenorm.data.datasets import Scaling
from truenorm.errors import InputError
from truenorm.folding import trials
from truenorm.folding.agreement import agreed
from truenorm.folding.building import built, plan_of
from truenorm.folding.plan import ChangeSet, Form
from truenorm.folding.proof import prove
from truenorm.folding.subject import Subject
from truenorm.folding.whole import Allowance, FoldProgress, Whole

_NAMED = 3  # modules in one line
FoldObserver = Callable[[FoldProgress], None]


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
            largest output; in all that it was proved on.
        exact: the same with both in float64, on the examples and random inputs; None if the model
            does not run in it, 0 if nothing was folded.
        noise: how far rounding alone moves the original's outputs, against float64, on the same.
            Where it is large, ``error`` says nothing, and ``exact`` is the proof.
        proved: what the folded model was compared on: examples, random inputs, other sizes, flags
            and methods.
        unproved: what it was not, each with the reason.
        changed: public methods that are other functions in the folded model, which was asked for
            by ``forward_only``.
        plan: what :func:`refold` needs to give a freshly built model the same structure.
    """

    model: nn.Module
    pairs: tuple[FoldedNorm, ...]
    left: tuple[LeftNorm, ...]
    error: float
    exact: float | None
    noise: float | None
    proved: tuple[str, ...]
    unproved: tuple[str, ...]
    changed: tuple[str, ...]
    plan: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {
            "pairs": [pair._asdict() for pair in self.pairs],
            "left": [left._asdict() for left in self.left],
            "error": self.error,
            "exact": self.exact,
            "noise": self.noise,
            "proved": list(self.proved),
            "unproved": list(self.unproved),
            "changed": list(self.changed),
        }

    def _repr_html_(self) -> str:
        from truenorm.templates import table

        pairs = [(p.norm or "(model)", p.form, p.into or "(model)", p.error) for p in self.pairs]
        rows = [(*row, f"{error:.1e}") for *row, error in pairs]
        rows += [(left.norm or "(model)", f"left: {left.reason}", "", "") for left in self.left]
        lines = [
            f"{len(self.pairs)} folded, {len(self.left)} left; largest error from end to end "
            f"{self.error:.1e} of the largest output",
            *(f"changed: the method {name} is another function" for name in self.changed),
            *(f"not proved: {told}" for told in self.unproved),
        ]
        return table(("norm", "form", "into", "error"), rows, lines)


def fold(
    model: nn.Module,
    example_inputs: Any,
    *,
    examples: Sequence[Any] = (),
    scaling: Scaling | None = None,
    forward_only: bool = False,
    seconds: float | None = None,
    observe: FoldObserver | None = None,
) -> Folded:
    """Fold every batch norm that can be folded, and prove it.

    A norm is y = s x + t in inference. Behind a convolution, transposed convolution or linear
    layer it becomes W' = s W and b' = s b + t; before one, W' = W s and b' = b + sum(W t). One
    that has neither becomes a scale and shift of channels. The arithmetic is in float64, rounded
    once.

    What the example's forward does not show is tried: other sizes of the input, true-or-false
    arguments turned over, and public methods of the model that take the example. What else the
    forward depends on (an attribute, a value, an optional argument) needs an example of its own.

    Args:
        model: any model that runs. Norms in train mode are left: call ``model.eval()`` first.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments, as the
            model takes them. What is folded is read off this forward and those of ``examples``.
        examples: more of them, for each way through the forward one.
        scaling: of the model's first argument, to be folded into its first layer: the folded
            model takes what was not scaled (uint8, too), and so must the examples be. Other
            methods are not compared then.
        forward_only: whether ``model(...)`` without flags is all that will be called. Else a fold
            that makes another function of a public method, or of the forward with a flag turned
            over, is left.
        seconds: that the proofs may take; the examples are proved in any case. What was not tried
            is in ``unproved``.
        observe: told of the proof's progress.

    Returns:
        The folded copy, the pairs with their errors, and what was left with the reasons.

    Raises:
        InputError: the model cannot be copied, or does not run on an example; ``seconds`` is
            negative.
    """
    if seconds is not None and not seconds >= 0:
        raise InputError(f"seconds must be 0 or more, or None for no bound, got {seconds!r}.")
    allowance = Allowance(seconds)
    subjects = _subjects(model, (example_inputs, *examples), scaling)
    parts, left = agreed(subjects)
    for one in subjects:
        prove(one, parts)
    subject = replace(subjects[0], norms=dict(ChainMap(*(one.norms for one in subjects))))
    methods = [] if scaling is not None else list(trials.method_trials(subject))
    whole = Whole(
        subject,
        _tried(subjects, [] if forward_only else methods, forward_only=forward_only),
        allowance,
        observe or (lambda _: None),
    )
    sound = whole.sifted([part for part in parts if not part.fault])
    changed = whole.changed(sound, methods) if forward_only else ()
    seen = [one for _, one in whole.proved]
    return Folded(
        built(subject, sound),
        *_outcome(subject, parts, sound, left),
        error=max((one.error for one in seen), default=0.0),
        exact=max(
            (one.precise for one in seen if one.precise is not None),
            default=None if sound else 0.0,
        ),
        noise=max((one.noise for one in seen if one.noise is not None), default=None),
        proved=tuple(dict.fromkeys(label for label, _ in whole.proved)),
        unproved=(*whole.unproved, *_unseen(subjects)),
        changed=changed,
        plan=plan_of(subject, sound),
    )


def _subjects(model: nn.Module, examples: Sequence[Any], scaling: Scaling | None) -> list[Subject]:
    subjects = []
    for i, example in enumerate(examples):
        try:
            subjects.append(Subject.of(model, example, scaling))
        except InputError as error:
            raise error if i == 0 else InputError(f"examples[{i - 1}]: {error}") from error
    return subjects


def _tried(
    subjects: list[Subject], methods: list[trials.Trial], *, forward_only: bool
) -> list[list[trials.Trial]]:
    flags = [] if forward_only else [t for s in subjects for t in trials.flag_trials(s)]
    sizes = [choices for subject in subjects for choices in trials.size_trials(subject)]
    return [
        *([one] for one in trials.example_trials(subjects)),
        *sizes,
        *([one] for one in (*flags, *methods)),
    ]


def _unseen(subjects: list[Subject]) -> list[str]:
    """What of the forward no example shows, where that can be told."""
    silent = set.intersection(*(set(trials.silent_arguments(subject)) for subject in subjects))
    readers = dict.fromkeys(name for subject in subjects for name in trials.readers(subject))
    told = []
    if silent:
        told.append(f"argument {' and '.join(sorted(silent))}: no example gives it")
    if readers:
        first = ", ".join(name or "(model)" for name in list(readers)[:_NAMED])
        more = f" and {len(readers) - _NAMED} more" if len(readers) > _NAMED else ""
        told.append(
            f"{first}{more}: reads values of tensors, and may take another way for others, which "
            "only an example of them shows"
        )
    return told


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
