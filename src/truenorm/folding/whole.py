"""The proof from end to end: the folded model gives what the original gives, or its folds go.

A trial is first compared in the model's own dtype, where rounding is known to stay small, else in
float64. What the model's own rounding would hide, or what would pass with spoiled weights, too,
is no proof, and told.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from truenorm.calling.borrowing import borrowed
from truenorm.calling.nested import mapped, tensors_in
from truenorm.folding.affine import Affine
from truenorm.folding.building import built
from truenorm.folding.modules import dtype_of
from truenorm.folding.plan import ChangeSet
from truenorm.folding.proof import SLACK, bound_of, distance
from truenorm.folding.subject import Subject, in_double, seeded
from truenorm.folding.trials import Trial

EXACT = 1e-9  # in float64, from end to end: some thousand roundings of 1e-16, times gains
_CHAOS = 1e-2  # of the model's own rounding: beyond it a comparison in its dtype says nothing
_TREMOR = 1e-6  # the same in float64
_RESTLESS = 100  # times that a fold may move answers as the last digits of weights do
_SPOILED = 0.01  # of a weight: less than any wrong fold is wrong by
_CHAOTIC = "the model's own rounding moves its outputs as far as a wrong fold would"
OVER = "the time that proofs may take is over"


class FoldProgress(NamedTuple):
    """How far a proof is: trials done, of how many, and what is tried now."""

    done: int
    total: int
    label: str


class Allowance:
    """The time that proofs may take: the examples are always tried, all else while there is some.

    Args:
        seconds: from now; None for as long as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether it is used up."""
        return self._end is not None and time.monotonic() >= self._end


class Candidate:
    """A model whose answers are wanted, in its dtype or in float64; each is built when asked for.

    Args:
        build: in a dtype, or as it is for None.
    """

    def __init__(self, build: Callable[[torch.dtype | None], nn.Module]) -> None:
        self._build = functools.cache(build)

    def answer(self, trial: Trial, *, wide: bool) -> list[Tensor] | None:
        """All real numbers that a trial gives, in float64 all numbers; None if it does not run."""
        model = self._build(torch.float64 if wide else None)
        try:
            if not wide:
                return self._run(trial, model)
            with in_double():
                return self._run(_in_double(trial), model)
        except Exception:  # what does not run on other inputs, or in float64, proves nothing
            return None

    @staticmethod
    def _run(trial: Trial, model: nn.Module) -> list[Tensor]:
        # A forward may change buffers and attributes; who knows what another method changes.
        with borrowed(model, parameters=trial.method != "forward"):
            out = seeded(model, trial.args, trial.kwargs, trial.method)
            return [t.detach().clone() for t in tensors_in(out)]


def _in_double(trial: Trial) -> Trial:
    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return trial._replace(args=mapped(trial.args, wide), kwargs=mapped(trial.kwargs, wide))


class Seen(NamedTuple):
    """What a trial has shown of a folded model.

    Attributes:
        same: whether its answers are the original's but for rounding; None if the trial cannot
            tell, because the original's own rounding moves its answers as far.
        error: from the original, in the model's dtype.
        precise: in float64; None where it was not looked at, or does not run.
        noise: of the original, against float64.
    """

    same: bool | None
    error: float
    precise: float | None = None
    noise: float | None = None


class Whole:
    """The original's answers to all trials, and a folded model's held against them.

    Args:
        subject: the original.
        trials: in the order of trying; of those in a list the first that the original answers.
        allowance: of time.
        observe: told of each trial.
    """

    def __init__(
        self,
        subject: Subject,
        trials: Sequence[Sequence[Trial]],
        allowance: Allowance,
        observe: Callable[[FoldProgress], None],
    ) -> None:
        self.subject, self._trials = subject, trials
        self.allowance, self._observe = allowance, observe
        self._original = Candidate(lambda dtype: built(subject, [], dtype))
        self._nudged = Candidate(lambda dtype: _nudged(built(subject, [], dtype)))
        self._answers: dict[tuple[int, bool], list[Tensor] | None] = {}  # by the trial's id
        dtype = dtype_of(subject.model)
        self._double = dtype is torch.float64
        self._bound = EXACT if self._double else bound_of(dtype)
        self._fine = bound_of(dtype) <= bound_of(torch.float32)
        self.proved: list[tuple[str, Seen]] = []
        self.unproved: list[str] = []

    def sifted(self, parts: list[ChangeSet]) -> list[ChangeSet]:
        """The parts that together leave all answers what they are; the others have a fault."""
        if not parts:
            return []
        kept = self._sifted(parts)
        while len(kept) < len(parts):  # what is left has not met all trials in this company
            parts, kept = kept, self._sifted(kept)
        if not kept or self._speaks(kept):
            return kept
        for part in kept:
            part.fault = f"could not be proved: {self._why_silent()}"
        self.proved = []
        return []

    def changed(self, parts: list[ChangeSet], trials: Iterable[Trial]) -> tuple[str, ...]:
        """Labels of the trials whose answers are others, as far as there is time to look."""
        folded, found = self._folded(parts), []
        for trial in trials:
            if self.allowance.over:
                self.unproved.append(f"{trial.label}: {OVER}")
            elif self._known(trial) is not None and self._look(trial, folded).same is False:
                found.append(trial.label)
        return tuple(found)

    def _sifted(self, parts: list[ChangeSet]) -> list[ChangeSet]:
        kept, self.proved, self.unproved = list(parts), [], []
        folded, untaken = self._folded(kept), []
        for i, choices in enumerate(self._trials):
            self._observe(FoldProgress(i, len(self._trials), choices[0].label))
            if self.allowance.over and not choices[0].example:
                self.unproved.append(f"{choices[0].label}: {OVER}")
                continue
            trial = next((one for one in choices if self._known(one) is not None), None)
            if choices[0].sized and not (trial and trial.sized):
                untaken.append(choices[0].label)
            if trial is None:
                flag = choices[0].method == "forward" and not choices[0].sized
                if flag:  # a method may be for anything
                    self.unproved.append(f"{choices[0].label}: the model does not take it")
                continue
            seen = self._look(trial, folded)
            if seen.same is False:
                kept = self._without_the_wrong(trial, kept)
                folded = self._folded(kept)
                seen = self._look(trial, folded)
            if seen.same is None:
                self.unproved.append(f"{trial.label}: {_CHAOTIC}")
            else:
                self.proved.append((trial.label, seen))
        self._observe(FoldProgress(len(self._trials), len(self._trials), ""))
        self.unproved += self._of_sizes(untaken)
        return kept

    def _of_sizes(self, untaken: list[str]) -> list[str]:
        """One line on the sizes that the model does not take, by their trials' labels."""
        tried = sum(choices[0].sized for choices in self._trials)
        if len(untaken) == tried > 1:
            return [f"inputs of other sizes: the model takes none of the {tried} tried"]
        return [f"{', '.join(untaken)}: the model does not take it"] if untaken else []

    def _without_the_wrong(self, trial: Trial, parts: list[ChangeSet]) -> list[ChangeSet]:
        """Parts, all of which fail a trial, without those that do; found by halves."""
        kept: list[ChangeSet] = []

        def halve(group: list[ChangeSet]) -> None:
            if len(group) == 1:
                group[0].fault = _told(trial)
                return
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                if self.allowance.over:
                    for part in half:
                        part.fault = OVER
                elif self._look(trial, self._folded([*kept, *half])).same is False:
                    halve(half)
                else:
                    kept.extend(half)

        halve(parts)
        return kept

    def _look(self, trial: Trial, folded: Candidate) -> Seen:
        """Hold a folded model's answers against the original's."""
        ours, theirs = self._known(trial), folded.answer(trial, wide=False)
        error = _apart(ours, theirs)
        if not trial.example and self._fine and error <= self._bound:
            return Seen(True, error)
        exact = None if self._double else self._exact(trial)
        if exact is None:
            if error <= self._bound:
                return Seen(True, error)
            return Seen(None if self._tremor(trial, wide=False) > self._bound else False, error)
        precise = _apart(exact, folded.answer(trial, wide=True), every=True)
        noise, against = _apart(exact, ours), _apart(exact, theirs)
        if not precise <= EXACT:
            tremor = self._tremor(trial, wide=True)
            same = None if tremor > _TREMOR else precise <= _RESTLESS * tremor
            if not same:
                return Seen(same, error, precise, noise)
        usual = max(noise, self._usual_noise)  # one trial's own may be small by chance
        near = error <= self._bound or against <= max(self._bound, SLACK * usual)
        return Seen(near or usual > max(_CHAOS, self._bound), error, precise, noise)

    @functools.cached_property
    def _usual_noise(self) -> float:
        """How far rounding moves the original's outputs on the examples, at most."""
        pairs = [(self._exact(trial), self._known(trial)) for trial in self._examples()]
        return max((_apart(*pair) for pair in pairs if None not in pair), default=0.0)

    def _tremor(self, trial: Trial, *, wide: bool) -> float:
        """How far the original's answers move with the last digits of its weights."""
        nudged = self._nudged.answer(trial, wide=wide)
        return _apart(self._remembered(trial, wide=wide), nudged, every=wide)

    def _speaks(self, parts: list[ChangeSet]) -> bool:
        """Whether the examples would show a wrong fold: one with spoiled weights does not pass."""
        spoiled = self._folded([_spoiled(part) for part in parts])
        return any(
            self._look(trial, spoiled).same is False
            for trial in self._examples()
            if self._known(trial) is not None
        )

    def _why_silent(self) -> str:
        answers = [t for trial in self._examples() for t in self._known(trial) or []]
        if not any(t.numel() for t in answers):
            return "the model's outputs on the example are empty"
        wide = not self._double and self._exact(self._examples()[0]) is not None
        limit = _TREMOR if wide else self._bound
        if any(self._tremor(one, wide=wide) > limit for one in self._examples()):
            return _CHAOTIC
        return "weights changed by 1 % leave the model's outputs on the example what they are"

    def _examples(self) -> list[Trial]:
        return [choices[0] for choices in self._trials if choices[0].example]

    def _folded(self, parts: list[ChangeSet]) -> Candidate:
        return Candidate(lambda dtype: built(self.subject, parts, dtype))

    def _known(self, trial: Trial) -> list[Tensor] | None:
        return self._remembered(trial, wide=False)

    def _exact(self, trial: Trial) -> list[Tensor] | None:
        return self._remembered(trial, wide=True)

    def _remembered(self, trial: Trial, *, wide: bool) -> list[Tensor] | None:
        key = (id(trial), wide)
        if key not in self._answers:
            self._answers[key] = self._original.answer(trial, wide=wide)
        return self._answers[key]


def _told(trial: Trial) -> str:
    if trial.method != "forward":
        return f"with it, the method {trial.method} is another function"
    return f"with it, the model's outputs are others on {trial.label}"


def _apart(exact: list[Tensor] | None, other: list[Tensor] | None, *, every: bool = False) -> float:
    """The largest distance of what is real, or of all numbers; infinite where there are none."""
    if exact is None or other is None or len(exact) != len(other):
        return float("inf")
    pairs = [
        (_plain(a), _plain(b))
        for a, b in zip(exact, other, strict=True)
        if every or a.is_floating_point() or a.is_complex()
    ]
    return max((distance(a, b) for a, b in pairs), default=0.0)


def _plain(t: Tensor) -> Tensor:
    """``t`` as float64."""
    return (torch.view_as_real(t) if t.is_complex() else t).double()


@torch.no_grad()
def _nudged(model: nn.Module) -> nn.Module:
    """``model`` with the last digits of each parameter and buffer changed."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            last = 4 * torch.finfo(tensor.dtype).eps
            tensor.data.copy_(_noisy(tensor, last, generator))
    return model


def _spoiled(part: ChangeSet) -> ChangeSet:
    """A part whose numbers are wrong by one in a hundred."""
    generator = torch.Generator().manual_seed(0)

    def spoil(t: Tensor) -> Tensor:
        return _noisy(t, _SPOILED, generator)

    def spoiled(affine: Affine) -> Affine:
        return Affine(*map(spoil, affine))

    destinations = [
        dataclasses.replace(
            one,
            base=one.base._replace(weight=spoil(one.base.weight)),
            before=None if one.before is None else spoiled(one.before),
            after=[spoiled(affine) for affine in one.after],
        )
        for one in part.destinations
    ]
    alone = {name: spoiled(affine) for name, affine in part.alone.items()}
    return dataclasses.replace(part, destinations=destinations, alone=alone)


def _noisy(t: Tensor, by: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
    return (t.double() * (1 + by * noise)).to(t.dtype)
