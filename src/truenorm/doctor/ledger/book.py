"""What a ledger keeps of a model: each layer's counts, and records of single calls in detail."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.doctor.ledger.foreseen import Finiteness, Foreseen, batches_tracked
from truenorm.doctor.ledger.forward import Fate, Forward, Gradient, Stray

KEPT = 256  # detailed records kept for each layer; the counts are of all

# Of an average, made by new batches: with momentum 0.1 the last 29 make up 95 % of it.
RENEWED = 0.95


@dataclass(frozen=True)
class Record:
    """One call of a batch norm, in detail.

    Attributes:
        layer: dotted name.
        forward: number of the forward as this layer counts them; a forward is a call of the
            outermost module that holds the layer.
        call: number of the call in that forward.
        step: steps that the optimizer had made.
        phase: "train" or "eval", the layer's mode.
        grad: whether the forward was called with gradients enabled.
        backward: whether it ran inside a backward pass, as recomputed forwards do.
        n: values per channel.
        wrote: whether it moved the running statistics.
        finite: whether the running statistics are finite after it.
        mean, var: the batch's mean and unbiased variance, (C,), as its write shows them; those of
            its input if it runs in train mode without a write; else None.
        worth: independent values per channel that the mean is worth, by how far the examples'
            means lie apart; positions of one map are not independent.
        tracked: running mean and variance, (2, C), that a forward's first norm used in eval mode,
            if training has made nearly all of them; the moments are then those of its input.
    """

    layer: str
    forward: int
    call: int
    step: int
    phase: str
    grad: bool
    backward: bool
    n: int
    wrote: bool
    finite: bool
    mean: Tensor | None = None
    var: Tensor | None = None
    worth: float = 0.0
    tracked: Tensor | None = None
    _within: Forward = field(default_factory=Forward, repr=False, compare=False)

    @property
    def fate(self) -> Fate:
        """What became of the forward's gradient; see :class:`Forward`."""
        return self._within.fate

    @property
    def generated(self) -> bool:
        """Whether its forward's input came from other parameters; see :class:`Forward`."""
        return self._within.generated

    @property
    def passes(self) -> int:
        """Backward passes behind the step that was made with its forward; 0 if none was."""
        return self._within.passes


@dataclass
class Strays:
    """Writes of one layer that belong to no step, by where they lie among those that do.

    Attributes:
        leading: before the first that was stepped with.
        between: followed by one.
        tail: after the last.
        runs: how often one or more were followed by one that was stepped with.
        longest: of these runs.
        inside: came after a forward with gradients of the same step.
    """

    leading: int = 0
    between: int = 0
    tail: int = 0
    runs: int = 0
    longest: int = 0
    inside: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.leading + self.between + self.tail

    def close(self, *, first: bool) -> None:
        """A write that was stepped with has come; ``first``: none has come before."""
        if self.tail:
            self.runs += 1
            self.longest = max(self.longest, self.tail)
            if first:
                self.leading = self.tail
            else:
                self.between += self.tail
            self.tail = 0


@dataclass(eq=False)
class Layer:
    """What is kept of one batch norm while it is watched. Plain numbers count calls, exactly.

    Attributes:
        detailed: calls that were recorded in detail.
        forwards: forwards that it was called in.
        failed: calls in train mode that raised an error.
        trained: calls in train mode that did not.
        learning: those of them in forwards with gradients.
        rested: calls in eval mode.
        rested_stepped: those of them in forwards that were stepped with.
        writes: calls that moved the statistics, recomputed ones included.
        in_backward: those of them inside a backward pass.
        repeated: calls inside a backward pass that moved nothing.
        without: writes in forwards without gradients.
        recalibrating: those of them with another momentum, or onto statistics that were reset.
        later: calls in train mode beyond the first of their forward.
        frozen, unfrozen: writes while weight and bias needed no gradient, and while one did.
        toggles: how often it changed between the two.
        stepped: writes in forwards that were stepped with.
        steps: steps made with them.
        accumulated: steps made with two or more backward passes of this layer.
        shapes: how many writes were of how many rows and how many values, in first calls.
        strays: writes that belong to no step.
        finiteness: whether the statistics are finite.
        weight: as it was at the first write while frozen.
        within, call: its last forward, and number of its last call in that.
        shape: rows and values of its last input that was written.
        foreseen: what each forward writes as far as is foreseen, and the number that shows it.
        afresh: writes when the last was made without gradients onto statistics reset before.
        last: step of the last write that was stepped with.
    """

    name: str
    module: Any
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=KEPT))
    detailed: int = 0
    forwards: int = 0
    failed: int = 0
    trained: int = 0
    learning: int = 0
    rested: int = 0
    rested_stepped: int = 0
    writes: int = 0
    in_backward: int = 0
    repeated: int = 0
    without: int = 0
    recalibrating: int = 0
    later: int = 0
    frozen: int = 0
    unfrozen: int = 0
    toggles: int = 0
    stepped: int = 0
    steps: int = 0
    accumulated: int = 0
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    strays: dict[Stray, Strays] = field(default_factory=dict)
    weight: Tensor | None = None
    was_frozen: bool = False
    within: Forward | None = None
    call: int = 0
    shape: tuple[int, int] = (0, 0)
    kept: tuple[int, int, Tensor] | None = None  # see keep()
    gradient: Gradient | None = None  # by which the fate of a forward is seen
    counted: int | None = None  # batches tracked when the block began
    momentum: float | None = None  # when the block began
    version: int = 0  # of the running mean, which torch's kernel does not count up
    afresh: int = -1
    last: int = -1

    def __post_init__(self) -> None:
        self.foreseen = Foreseen(self.module)
        self.finiteness = Finiteness(self.module)
        self.ours = self.foreseen.ours
        self.look()

    def look(self) -> None:
        """Take in the statistics as they are, at the beginning of a block."""
        module, mean = self.module, self.module.running_mean
        self.momentum = module.momentum
        self.counted = batches_tracked(module)
        readable = mean is not None and not nn.parameter.is_lazy(mean) and not mean.is_meta
        if readable:
            self.finiteness.look()
        self.version = mean._version if readable and not mean.is_inference() else 0
        self.foreseen.look()
        self.kept = None

    @property
    def bad(self) -> tuple[int, int] | None:
        """First and last step that can have made the statistics not finite."""
        return self.finiteness.bad

    @property
    def calls(self) -> int:
        """All calls that were seen."""
        return self.trained + self.rested + self.failed + self.in_backward + self.repeated

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many writes were of how many rows and values per channel."""
        channels = self.module.num_features or 1
        return Counter({(rows, n // channels): k for (rows, n), k in self.shapes.items()})

    @property
    def pooled(self) -> bool:
        """Whether its statistics are written when the optimizer steps."""
        return self.foreseen.pooled

    @property
    def learns(self) -> bool:
        """Whether weight or bias needs a gradient."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))

    def foresee(self) -> None:
        """From now on calls are not seen: there will be as many in each forward as in the last."""
        self.foreseen.begin(self.call + 1 if self.forwards else 0, self.writes)

    def pass_by(self, number: int, *, trained: bool, grad: bool) -> None:
        """Count the calls of ``number`` forwards in which it was not hooked."""
        calls = self.foreseen.calls
        if not calls:
            return
        self.forwards += number
        if not trained:
            self.rested += calls * number
            return
        self.trained += calls * number
        self.learning += number * grad
        self.later += (calls - 1) * number

    def repeat(self, number: int, shape: tuple[int, int] | None) -> None:
        """Count as many forwards as foreseen."""
        writes = (self.foreseen.writes or 0) * number
        self.pass_by(number, trained=self.foreseen.trains, grad=True)
        self.writes += writes
        if writes and shape is not None:
            self.shapes[shape] += number
        if self.was_frozen:
            self.frozen += writes
        else:
            self.unfrozen += writes

    def written(self) -> tuple[int, bool]:
        """Writes of the forward that has just ended, and whether there is more than was foreseen.

        More may have been written between forwards, or statistics may have been loaded.
        """
        written, besides, surprise = self.foreseen.sum_up(self.writes)
        self.writes += besides
        return written, surprise

    @property
    def shows_batch(self) -> bool:
        """Whether a write is the moments of the batch times the momentum."""
        options = self.module.options if self.ours else None
        return options is None or options.ghost is options.min_count is None

    def keep(self) -> Tensor:
        """The statistics as they are, (2, C), to compare with those after the next write."""
        mean, var = self.module.running_mean, self.module.running_var
        now = torch.stack((mean, var))
        self.kept = self.writes, mean._version, now
        return now

    def settled(self) -> Tensor | None:
        """The statistics as they are, (2, C), if few of their initial values are left."""
        module, batches = self.module, batches_tracked(self.module)
        if module.running_mean is None or not batches:
            return None
        if module.momentum is not None and (1 - min(module.momentum, 1)) ** batches > 1 - RENEWED:
            return None
        return torch.stack((module.running_mean, module.running_var))

    def before(self) -> Tensor | None:
        """The statistics before the last write, (2, C), if that before it was kept."""
        if self.kept is None:
            return None
        writes, version, then = self.kept
        same = writes + 1 == self.writes and version == self.module.running_mean._version
        return then if same and then.device == self.module.running_mean.device else None

    def freeze(self, weight: Tensor) -> None:
        """Count a write by whether ``weight`` and the bias were frozen."""
        bias = self.module._parameters.get("bias")
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        self.toggles += frozen is not self.was_frozen
        self.was_frozen = frozen
        if frozen:
            self.frozen += 1
            if self.weight is None:
                self.weight = weight.detach().clone()
        else:
            self.unfrozen += 1

    def recalibrates(self) -> bool:
        """Whether a write without gradients, just made, is one of a recalibration.

        Such writes have a momentum of their own, None or 1, or go onto statistics that were reset:
        what torch.optim.swa_utils.update_bn and "precise" batch norm do.
        """
        module = self.module
        version = module.running_mean._version
        if version != self.version:
            self.version = version
            afresh = batches_tracked(module) == 1
        else:
            afresh = self.afresh == self.writes - 1
        if afresh:
            self.afresh = self.writes
        return afresh or module.momentum != self.momentum

    def step_on(self, step: int, *, passes: int = 1, times: int | None = None) -> None:
        """A write has been stepped with; or ``times`` forwards, the last at ``step``."""
        if times == 0:
            return
        writes = 1 if times is None else times * (self.foreseen.writes or 0)
        if not self.foreseen.trains and times is not None:
            self.rested_stepped += times
        if not writes:
            return
        for strays in self.strays.values():
            strays.close(first=self.stepped == 0)
        self.stepped += writes
        if step != self.last:
            self.last = step
            self.steps += times or 1
            self.accumulated += passes > 1

    def stray(self, kind: Stray, *, inside: bool) -> None:
        """A write belongs to no step."""
        strays = self.strays.get(kind)
        if strays is None:
            strays = self.strays[kind] = Strays()
        strays.tail += 1
        strays.inside += inside


@dataclass
class Book:
    """All that has been seen of a model.

    Attributes:
        model: as given.
        layers: its batch norms, by dotted name.
        steps: made by the optimizer; without one, by all that hold parameters of the model.
        resting_steps: those of them that were made while the model was in eval mode.
    """

    model: nn.Module
    layers: dict[str, Layer] = field(default_factory=dict)
    steps: int = 0
    resting_steps: int = 0

    @property
    def called(self) -> list[Layer]:
        """The layers that were seen."""
        return [layer for layer in self.layers.values() if layer.calls]

    @property
    def forwards(self) -> int:
        """Training forwards: in train mode, with gradients, as many as the busiest layer saw."""
        return max((layer.learning for layer in self.layers.values()), default=0)

    def unseen(self) -> list[str]:
        """Batch norms that moved though no call of theirs was seen, or that came in later."""
        known = {layer.module for layer in self.layers.values()}
        new = [
            n for n, m in self.model.named_modules() if isinstance(m, _BatchNorm) and m not in known
        ]
        moved = [
            name
            for name, layer in self.layers.items()
            if not layer.calls and batches_tracked(layer.module) != layer.counted
        ]
        return moved + new
