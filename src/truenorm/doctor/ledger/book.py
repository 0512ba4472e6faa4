"""What a ledger keeps: forwards and what became of them, each layer's counts, records in detail."""

from __future__ import annotations

import math
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.layers.batch_norm import BatchNorm

KEPT = 256  # detailed records kept for each layer; the counts are of all

# Of an average, made by new batches: with momentum 0.1 the last 29 make up 95 % of it.
RENEWED = 0.95

Fate = Literal["pending", "stepped", "discarded", "inputs only", "unreached", "no gradients"]
Stray = Literal["no gradients", "unreached", "discarded", "attack"]


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
    rested: Sequence[Layer] = ()
    gradient: Gradient | None = None
    mark: weakref.ref[Mark] | None = None
    key: tuple[Any, ...] = ()

    def __init__(self, step: int = 0, *, grad: bool = True, inside: bool = False) -> None:
        self.step, self.grad, self.inside = step, grad, inside
        self.writes: list[Layer] = []


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
        held: the forwards behind its present gradient.
        passes: the backward passes behind it.
    """

    def __init__(self, parameter: nn.Parameter, accumulated: Any) -> None:
        self.parameter, self._accumulated = parameter, accumulated
        self.held: list[Forward] = []
        self.passes = 0
        self.fresh = True  # whether the last gradient found no other to be added to
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks on."""
        self._handles = [
            self.parameter.register_hook(self._before),  # type: ignore[no-untyped-call]
            self.parameter.register_post_accumulate_grad_hook(self._after),  # type: ignore[no-untyped-call]
        ]

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: Tensor) -> None:
        if self.held:
            old = self.parameter.grad
            self.fresh = old is None or (old.layout == torch.strided and not bool(old.any()))

    def _after(self, _: Tensor) -> None:
        self._accumulated(self)


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
        checked: writes and steps when the statistics were last seen to be finite.
        bad: first and last step that can have made them not finite.
        broken: they were not finite when the block began.
        weight: as it was at the first write while frozen.
        within, call: its last forward, and number of its last call in that.
        shape: rows and values of its last input that was written.
        usual, usually: calls and writes to be expected of a forward while it is seen from afar;
            None where writes are none of a forward's.
        trains, weight_learns: how it was when that began.
        unseen: writes made in no forward that was seen.
        then: batches tracked and writes when that began.
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
    bad: tuple[int, int] | None = None
    checked: tuple[int, int] = (0, 0)
    broken: bool = False
    weight: Tensor | None = None
    was_frozen: bool = False
    by_value: bool = False
    within: Forward | None = None
    call: int = 0
    shape: tuple[int, int] = (0, 0)
    usual: int = 0
    usually: int | None = 0
    trains: bool = True
    weight_learns: bool = True
    unseen: int = 0
    then: tuple[int, int] = (0, 0)
    state: int | None = None  # after the last call; see look_up()
    kept: tuple[int, int, Tensor] | None = None  # see keep()
    gradient: Gradient | None = None  # by which the fate of a forward is seen
    counted: int | None = None  # batches tracked when the block began
    momentum: float | None = None  # when the block began
    version: int = 0  # of the running mean, which torch's kernel does not count up
    afresh: int = -1
    last: int = -1

    def __post_init__(self) -> None:
        self.ours = isinstance(self.module, BatchNorm)
        self.look()

    def look(self) -> None:
        """Take in the statistics as they are, at the beginning of a block."""
        module, mean = self.module, self.module.running_mean
        self.momentum = module.momentum
        self.counted = self.now_counted()
        batches = module.num_batches_tracked
        self.by_value = batches is not None and (
            batches.is_inference() or (self.ours and batches.is_cpu)
        )
        readable = mean is not None and not nn.parameter.is_lazy(mean) and not mean.is_meta
        if readable and self.bad is None:
            self.broken = not self.finite()
        self.version = mean._version if readable and not mean.is_inference() else 0
        self.state, self.kept = self.look_up(), None

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
        return self.ours and self.module.options.commit == "step"

    @property
    def learns(self) -> bool:
        """Whether weight or bias needs a gradient."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))

    def now_counted(self) -> int | None:
        """Batches tracked; None if they are not."""
        counted = self.module.num_batches_tracked
        return None if counted is None or counted.is_meta else int(counted)

    def look_up(self) -> int | None:
        """A number that changes with each write; None if the layer keeps none.

        The count itself for truenorm's layers, which take a write back that was not finite. Else
        its version: that costs less and waits for no device.
        """
        counted: Tensor | None = self.module._buffers.get("num_batches_tracked")
        if counted is None:
            return None
        return int(counted) if self.by_value else counted._version

    def moved(self) -> bool:
        """Whether the call in train mode that has just ended moved the statistics."""
        before, self.state = self.state, self.look_up()
        module = self.module
        if self.ours and not module._direct and (module.options.frozen or self.pooled):
            return False
        if self.state is None:
            return bool(module.track_running_stats) and module.running_mean is not None
        return self.state != before

    @property
    def foreseeable(self) -> bool:
        """Whether its writes can be told from a number that it keeps."""
        return self.state is not None

    def foresee(self) -> None:
        """From now on calls are not seen: there will be as many in each forward as in the last."""
        self.usual = self.call + 1 if self.forwards else 0
        self.trains, self.state = self.module.training, self.look_up()
        self.then = self.now_counted() or 0, self.writes
        weight = self.module._parameters.get("weight")
        self.weight_learns = weight is not None and weight.requires_grad
        self.usually = self.usual if self.trains else 0
        if self.ours and (self.module.options.frozen or self.pooled):
            self.usually = None

    def as_foreseen(self) -> bool:
        """Whether it did in the forward that has just ended what it did before."""
        weight = self.module._parameters.get("weight")
        return (
            (self.usually is None or self.look_up() == self.state + self.usually)  # type: ignore[operator]
            and self.module.training is self.trains
            and (weight is not None and weight.requires_grad) is self.weight_learns
        )

    def pass_by(self, number: int, *, trained: bool, grad: bool) -> None:
        """Count the calls of ``number`` forwards that were seen from afar."""
        if not self.usual:
            return
        self.forwards += number
        if not trained:
            self.rested += self.usual * number
            return
        self.trained += self.usual * number
        self.learning += number * grad
        self.later += (self.usual - 1) * number

    def repeat(self, number: int, shape: tuple[int, int] | None) -> None:
        """Count as many forwards as foreseen."""
        writes = (self.usually or 0) * number
        self.pass_by(number, trained=self.trains, grad=True)
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
        if self.usually is None:
            return 0, False
        before, self.state = self.state, self.look_up()
        moved = (self.state or 0) - (before or 0)
        expected = self.usual if self.module.training else 0
        if moved == expected:
            return moved, False
        counted, writes = self.then
        if moved > 0 and (self.now_counted() or 0) - counted == self.writes - writes + moved:
            unseen = max(0, moved - expected)
            self.unseen += unseen
            self.writes += unseen
            return moved - unseen, True
        return min(max(moved, 0), expected), True

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
        module, batches = self.module, self.now_counted()
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

    def finite(self) -> bool:
        """Whether its statistics are finite; cheaply, as a square hides nothing."""
        held = self.module._buffers
        mean, var = held["running_mean"], held["running_var"]
        flat = var if var.dtype.itemsize >= 4 else var.float()
        if math.isfinite(flat.dot(flat).item()):
            return True
        return bool(torch.isfinite(var).all()) and bool(torch.isfinite(mean).all())

    def look_for_bad(self, step: int) -> None:
        """Look whether the statistics are finite still."""
        if self.bad is None and not self.broken:
            if self.finite():
                self.checked = self.writes, step
            else:
                exact = self.checked[0] + 1 == self.writes
                self.bad = (step if exact else self.checked[1], step)

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
            afresh = self.now_counted() == 1
        else:
            afresh = self.afresh == self.writes - 1
        if afresh:
            self.afresh = self.writes
        return afresh or module.momentum != self.momentum

    def step_on(self, step: int, *, passes: int = 1, times: int | None = None) -> None:
        """A write has been stepped with; or ``times`` forwards, the last at ``step``."""
        if times == 0:
            return
        writes = 1 if times is None else times * (self.usually or 0)
        if not self.trains and times is not None:
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
            if not layer.calls and layer.now_counted() != layer.counted
        ]
        return moved + new


def worth(x: Tensor, var: Tensor, examples: int) -> float:
    """Independent values per channel that the mean of ``x`` (N, C, *S) is worth.

    The mean's own variance is ``var`` over it: that between the rows' means over their number,
    where rows of one example, as the frames of a video, count as one.
    """
    x = x.detach().float() if x.dtype.itemsize < 4 else x.detach()
    rows = x.flatten(2).mean(2) if x.ndim > 2 else x
    number, n = len(rows), x.numel() // max(1, x.shape[1])
    if number < 2:
        return 1.0
    several = 1 < examples < number and number % examples == 0
    if x.ndim == 2 and not several:
        return float(number)
    variance = rows.var(0) / number
    if several:
        for grouped in (rows.view(examples, -1, rows.shape[1]).mean(1),
                        rows.view(-1, examples, rows.shape[1]).mean(0)):  # fmt: skip
            variance = torch.maximum(variance, grouped.var(0) / examples)
    ratio = (var / variance.clamp(min=1e-12)).median().item()
    return min(max(ratio, 1.0), float(n)) if math.isfinite(ratio) else 1.0
