"""The ledger: who wrote which running statistic, when, and in what circumstances."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.doctor.checks import FEW_VALUES, Found, NotApplicable, Severity
from truenorm.doctor.diagnosis import Diagnosis, examined
from truenorm.doctor.facts import Facts
from truenorm.layers import BatchNorm

KEPT = 512  # records kept for each layer; the counts are of all
# Accumulated micro-batches below it are noisier than the batch they make up by a sixth or more.
SMALL_MICRO_BATCH = 32
# Batch means that swing from side to side at each step: their correlation with the step before.
SWINGING, SWING = -0.7, 0.2


@dataclass(frozen=True)
class Record:
    """One forward of a batch norm.

    Attributes:
        layer: dotted name.
        call: number of the call in its forward of the whole model.
        step: steps that the optimizer had made.
        phase: "train" or "eval", the layer's mode.
        grad: whether the whole model's forward was called with gradients enabled.
        backward: whether it ran inside a backward pass, as recomputed forwards do.
        n: values per channel.
        wrote: whether it moved the running statistics.
        finite: whether the running statistics are finite after it.
        mean, var: the batch's mean and unbiased variance, (C,), as its write shows them; None if
            nothing was written, or under the cumulative average.
    """

    layer: str
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


@dataclass
class _Layer:
    """What is kept of one layer while it is watched."""

    name: str
    module: Any
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=KEPT))
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    before: tuple[int, Tensor, Tensor] | None = None
    first_bad: Record | None = None

    def state(self) -> tuple[int, Tensor, Tensor] | None:
        module = self.module
        if module.running_mean is None or module.num_batches_tracked is None:
            return None
        counted = int(module.num_batches_tracked)
        return counted, module.running_mean.clone(), module.running_var.clone()


class Ledger:
    """What was written while the block ran; made by :func:`watch`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._model, self._optimizer = model, optimizer
        self._layers = {
            name: _Layer(name, module)
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm)
        }
        self.steps = 0
        self.forwards = 0  # of the whole model, in train mode with gradients
        self._grad = True
        self._calls: Counter[str] = Counter()
        self._handles: list[Any] = []

    def __enter__(self) -> Ledger:
        self._handles = [self._model.register_forward_pre_hook(self._begin, prepend=True)]
        for layer in self._layers.values():
            self._handles += [
                layer.module.register_forward_pre_hook(self._before(layer)),
                layer.module.register_forward_hook(self._after(layer)),
            ]
        if self._optimizer is not None:
            self._handles.append(self._optimizer.register_step_post_hook(self._stepped))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- what hooks see ---------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # the whole model recomputed: not a forward of its own
        self._grad = torch.is_grad_enabled()
        self._calls.clear()
        self.forwards += model.training and self._grad

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1

    def _before(self, layer: _Layer) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            layer.before = layer.state() if module.training else None

        return hook

    def _after(self, layer: _Layer) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            x = args[0] if args and isinstance(args[0], Tensor) else None
            n = 0 if x is None or x.ndim < 2 else x.numel() // (x.shape[1] or 1)
            self._note(layer, n)

        return hook

    def _note(self, layer: _Layer, n: int) -> None:
        backward = torch._C._current_graph_task_id() != -1
        before, after, mean, var, wrote = layer.before, None, None, None, False
        if before is not None:
            after = layer.state()
        finite = True
        if before is not None and after is not None:
            wrote = after[0] != before[0]
            finite = math.isfinite(after[2].double().square().sum().item())
            momentum = layer.module.momentum
            if wrote and momentum:
                mean = (after[1] - (1 - momentum) * before[1]) / momentum
                var = (after[2] - (1 - momentum) * before[2]) / momentum
        call = self._calls[layer.name]
        if not backward:
            self._calls[layer.name] += 1
        phase = "train" if layer.module.training else "eval"
        record = Record(
            layer.name, call, self.steps, phase, self._grad, backward, n, wrote, finite, mean, var
        )
        layer.records.append(record)
        self._count(layer, record)

    def _count(self, layer: _Layer, record: Record) -> None:
        counts = layer.counts
        counts["forwards"] += 1
        counts[record.phase] += 1
        counts["writes"] += record.wrote
        counts["writes in backward"] += record.wrote and record.backward
        counts["repeats in backward"] += record.backward and not record.wrote
        counts["writes without gradients"] += (
            record.wrote and not record.grad and not record.backward
        )
        counts["later calls"] += record.phase == "train" and record.call > 0 and not record.backward
        counts["eval with gradients"] += record.phase == "eval" and record.grad
        own = list(layer.module.parameters(recurse=False))
        counts["writes while frozen"] += (
            record.wrote and bool(own) and not any(p.requires_grad for p in own)
        )
        if record.phase == "train":
            layer.sizes[record.n] += 1
        if not record.finite and layer.first_bad is None:
            layer.first_bad = record

    # -- what is told ------------------------------------------------------------------------

    @property
    def records(self) -> list[Record]:
        """The last :data:`KEPT` records of each layer."""
        return [record for layer in self._layers.values() for record in layer.records]

    def table(self) -> str:
        """A line for each layer: forwards, writes, and in what circumstances."""
        columns = ("forwards", "train", "eval", "writes", "writes without gradients",
                   "writes in backward", "writes while frozen")  # fmt: skip
        rows = [
            [layer.name or "(model)", *(str(layer.counts[c]) for c in columns)]
            for layer in self._layers.values()
        ]
        cells = [["layer", *columns], *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
        lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([f"{self.steps} steps, {self.forwards} training forwards", *lines])

    def diagnosis(self) -> Diagnosis:
        """Judge what was seen, with all that can be said of the model as it stands."""
        judged: dict[str, Callable[[Facts], Iterator[Found]]] = {
            "TN102": self._not_finite,
            "TN201": self._wrong_mode,
            "TN202": self._half_frozen,
            "TN203": self._without_gradients,
            "TN204": self._twice,
            "TN302": self._last_batch,
            "TN303": self._accumulated,
            "TN305": self._swinging,
            "TN306": self._called_again,
        }
        return examined(self._model, self._optimizer, judged)

    def _watched(self) -> list[_Layer]:
        layers = [layer for layer in self._layers.values() if layer.counts["forwards"]]
        if not layers:
            raise NotApplicable("no batch norm was called while it was watched")
        return layers

    def _not_finite(self, facts: Facts) -> Iterator[Found]:
        bad = [layer for layer in self._watched() if layer.first_bad is not None]
        for layer in bad:
            assert layer.first_bad is not None
            evidence = {"first at step": layer.first_bad.step, "layers": len(bad)}
            yield Found(layer.name, "error", "a batch that was not finite was written", evidence)

    def _wrong_mode(self, facts: Facts) -> Iterator[Found]:
        for layer in self._watched():
            learns = any(p.requires_grad for p in layer.module.parameters(recurse=False))
            trained = self.steps and layer.counts["eval with gradients"] and learns
            if trained and not layer.counts["train"]:
                evidence = {"steps": self.steps, "forwards in train mode": 0}
                yield Found(layer.name, "warning", "training ran in eval mode", evidence)

    def _half_frozen(self, facts: Facts) -> Iterator[Found]:
        for layer in self._watched():
            moved = layer.counts["writes while frozen"]
            if moved:
                cause = "weight and bias are frozen, and its statistics were moved"
                yield Found(layer.name, "error", cause, {"writes": moved})

    def _without_gradients(self, facts: Facts) -> Iterator[Found]:
        for layer in self._watched():
            # A checkpoint's first forward runs without gradients, and is repeated in backward.
            repeated = layer.counts["writes in backward"] + layer.counts["repeats in backward"]
            stray = layer.counts["writes without gradients"] - repeated
            if 0 < stray < layer.counts["writes"]:  # all of them: a recalibration
                cause = "forwards under no_grad ran in train mode"
                evidence = {"such writes": stray, "of": layer.counts["writes"]}
                yield Found(layer.name, "error", cause, evidence)

    def _twice(self, facts: Facts) -> Iterator[Found]:
        for layer in self._watched():
            again = layer.counts["writes in backward"]
            if again:
                cause = "a forward that was repeated in the backward pass counted again"
                evidence = {"writes in backward": again, "of": layer.counts["writes"]}
                yield Found(layer.name, "warning", cause, evidence)

    def _last_batch(self, facts: Facts) -> Iterator[Found]:
        for layer in self._watched():
            if not layer.sizes:
                continue
            least, (usual, _) = min(layer.sizes), layer.sizes.most_common(1)[0]
            if least < FEW_VALUES and least * 4 <= usual:
                cause = "a batch was too small for statistics and counted as a full one"
                evidence = {"values per channel": least, "in most batches": usual}
                yield Found(layer.name, "warning", cause, evidence)

    def _accumulated(self, facts: Facts) -> Iterator[Found]:
        if not self.steps:
            raise NotApplicable("needs watch(model, optimizer), and steps")
        per_step = self.forwards / self.steps
        for layer in self._watched():
            pooled = isinstance(layer.module, BatchNorm) and layer.module.options.commit == "step"
            if per_step < 1.9 or pooled or not layer.sizes:
                continue
            usual = layer.sizes.most_common(1)[0][0]
            severity: Severity = "warning" if usual < SMALL_MICRO_BATCH else "note"
            cause = "each micro-batch is normalized by itself and counts as a batch"
            evidence = {"forwards per step": per_step, "values per channel": usual}
            yield Found(layer.name, severity, cause, evidence)

    def _swinging(self, facts: Facts) -> Iterator[Found]:
        found = []
        for layer in self._watched():
            rows = [r for r in layer.records if r.mean is not None and r.call == 0 and r.finite]
            if len(rows) < 16:
                continue
            means = torch.stack([r.mean for r in rows if r.mean is not None]).double()
            std = torch.stack([r.var for r in rows if r.var is not None]).double().mean(0).sqrt()
            moves = means - means.mean(0)
            with_last = (moves[1:] * moves[:-1]).mean(0) / moves.square().mean(0).clamp(min=1e-30)
            swing = float((moves.square().mean(0).sqrt() / std.clamp(min=1e-12)).median())
            if float(with_last.median()) < SWINGING and swing > SWING:
                found.append((swing, layer.name))
        if found:
            size, name = max(found)
            cause = "batches of two distributions take turns: the mean swings at each forward"
            evidence = {"swing in standard deviations": size, "layers": len(found)}
            yield Found(name, "warning", cause, evidence)

    def _called_again(self, facts: Facts) -> Iterator[Found]:
        for layer in self._watched():
            again = layer.counts["later calls"]
            if again:
                evidence = {"calls beyond the first": again, "forwards": self.forwards}
                cause = "each forward moves its statistics once per call"
                yield Found(layer.name, "warning", cause, evidence)


def watch(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Ledger:
    """Keep a ledger of ``model``'s running statistics while a block runs.

    >>> with truenorm.watch(model, optimizer) as ledger:  # doctest: +SKIP
    ...     train(model, optimizer)
    >>> print(ledger.diagnosis())  # doctest: +SKIP

    Args:
        model: any module; hooks are put on it and taken off.
        optimizer: to count steps by.
    """
    return Ledger(model, optimizer)
