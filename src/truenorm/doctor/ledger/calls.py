"""What a ledger enters into its book of each call of a norm."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from truenorm.doctor.ledger.book import Book, Layer
from truenorm.doctor.ledger.detail import record_of
from truenorm.doctor.ledger.fates import Fates
from truenorm.doctor.ledger.forward import Forward
from truenorm.doctor.ledger.pace import Pace, clock


class Calls:
    """The part of a ledger that sees the calls of norms, and what each has written."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._book, self._pace = Book(model), Pace()
        self._fates = Fates(self._book, optimizer)
        self._outermost, self._forward = model, Forward()

    def called(self, layer: Layer, module: Any, args: Any, out: Any) -> None:
        """A batch norm was called in a forward; ``out`` is None if that failed."""
        forward = self._forward
        if layer.within is forward:
            layer.call += 1
        else:
            layer.within, layer.call = forward, 0
            layer.forwards += 1
        if not module.training:
            layer.rested += 1
            forward.rested = [*forward.rested, layer]
            wrote = False
        elif out is None:
            layer.failed += 1
            layer.foreseen.state = layer.foreseen.look_up()
            return
        else:
            layer.trained += 1
            if layer.call:
                layer.later += 1
            elif forward.grad:
                layer.learning += 1
            wrote = layer.foreseen.moved()
            if wrote:
                layer.shape = out.size(0), out.numel()
                self._wrote(forward, layer, module, layer.shape)
        if forward.grad and forward.gradient is None and forward.mark is None:
            self._fates.follow(forward, layer, self._outermost, out)
        if forward.detailed:
            self._record(layer, args, out, wrote=wrote)

    def repeated(self, layer: Layer, module: Any, args: Any, out: Any) -> None:
        """A batch norm was called in a backward pass.

        ``out`` may be None then: a repetition ends as soon as all is there that is needed.
        """
        wrote = module.training and layer.foreseen.moved()
        layer.writes += wrote
        layer.in_backward += wrote
        layer.repeated += not wrote
        if self._fates.bare:
            self._fates.link(layer, self._outermost)
        if self._pace.detailed and out is not None:
            self._record(layer, args, out, wrote=wrote, backward=True)

    def _wrote(
        self, forward: Forward, layer: Layer, module: Any, shape: tuple[int, int] | None
    ) -> None:
        layer.writes += 1
        if not layer.call and shape is not None:
            layer.shapes[shape] += 1
        if forward.checked:
            self._check(layer)
        if not forward.grad:
            layer.without += 1
            if layer.recalibrates():
                layer.recalibrating += 1
                return
        weight = module._parameters.get("weight")
        if weight is None or (weight.requires_grad and not layer.was_frozen):
            layer.unfrozen += 1
        else:
            layer.freeze(weight)
        forward.writes.append(layer)

    def _check(self, layer: Layer) -> None:
        """Look whether its statistics are finite still, where no device must be waited for."""
        start = clock()
        finiteness = layer.finiteness
        if layer.module._buffers["running_var"].is_cpu and finiteness.lasts:
            finiteness.check(layer.writes, self._book.steps)
            self._pace.looked(start)

    def _record(
        self, layer: Layer, args: Any, out: Any, *, wrote: bool, backward: bool = False
    ) -> None:
        start, step = clock(), self._book.steps
        if wrote and not layer.module.running_var.is_cpu:
            layer.finiteness.check(layer.writes, step)
        layer.detailed += 1
        layer.records.append(
            record_of(layer, self._forward, args, out, step=step, wrote=wrote, backward=backward)
        )
        self._pace.recorded(start)
