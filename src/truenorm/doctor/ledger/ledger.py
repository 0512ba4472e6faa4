"""The ledger: who wrote which running statistic, when, and in what circumstances.

How a write is seen goes by what there is time for, and by what steps have borne out so far:

- hooked: each norm bears a hook, and each of its calls is seen;
- summed: only forwards are; what a norm wrote in one is how far the number grew that it counts up;
- presumed: it has no mark in its graph; as each step so far was made with one forward, so will be
  the next;
- sampled: summed forwards and steps in turn, each as foreseen, are only tallied and entered
  together later; whether statistics are finite is looked at in one of so many.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from truenorm.calling.nested import examples_of, tensors_in
from truenorm.doctor.diagnosis import Diagnosis, examined
from truenorm.doctor.ledger.book import Layer, Record
from truenorm.doctor.ledger.calls import Calls
from truenorm.doctor.ledger.fates import wants_gradient
from truenorm.doctor.ledger.foreseen import Foreseen
from truenorm.doctor.ledger.forward import Forward, Written
from truenorm.doctor.ledger.hooks import Called, Enter, Leave
from truenorm.errors import InputError


class Ledger(Calls):
    """What was written while the block ran; made by :func:`watch`.

    Numbers in :meth:`table` are of all calls, and exact. Records hold the moments of single calls;
    when these get too dear for the loop they are kept in windows of ``pace.WINDOW`` forwards.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        super().__init__(model, optimizer)
        self._optimizer = optimizer
        self._handles: list[Any] = []
        self._hooks: list[Any] = []  # the norms'; none while forwards are summed
        self._layers_in: dict[nn.Module, list[Layer]] = {}
        self._foreseen_in: dict[nn.Module, list[Foreseen]] = {}
        # Steps that are tallied, whether a forward waits for its step, and by what it is known.
        self._sampled, self._sampled_open, self._sampled_key = 0, False, None  # type: int, bool, Any
        # Rows and values of each layer's input, by a forward's module and shapes of arguments.
        self._known: dict[Hashable, dict[Written, tuple[int, int]]] = {}
        self._none = self._forward
        self.depth = 0  # of calls inside calls

    # -- the block --------------------------------------------------------------------------

    def __enter__(self) -> Ledger:
        """Put the hooks on.

        Raises:
            InputError: they are on already.
        """
        if self._handles:
            raise InputError(
                "this ledger is open already; call truenorm.watch again for a second one."
            )
        self._pace.begin()
        self._fates.begin()
        self.depth = 0
        self._take_in_layers()
        on = self._handles.append
        by_module = {layer.module: layer for layer in self._book.layers.values()}
        for module in self._book.model.modules():
            layers = [by_module[part] for part in module.modules() if part in by_module]
            if layers and module not in by_module:
                self._layers_in[module] = layers
                self._foreseen_in[module] = [layer.foreseen for layer in layers]
                enter, leave = Enter(self, module), Leave(self, module)
                on(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                on(module.register_forward_hook(leave, always_call=True))
        self._hook()
        on(register_optimizer_step_post_hook(self._stepped))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in (*self._handles, *self._hooks):
            handle.remove()
        self._handles, self._hooks = [], []
        self._settle()
        self._fates.close()
        self._sampled_key = None
        self._layers_in, self._foreseen_in = {}, {}

    def _take_in_layers(self) -> None:
        layers, known = self._book.layers, {}
        for layer in layers.values():
            known[layer.module] = layer
        for name, module in self._book.model.named_modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module in known:
                known[module].look()
            else:
                layers[name] = Layer(name, module)

    # -- what hooks see ---------------------------------------------------------------------

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """An outermost module is called."""
        pace, fates = self._pace, self._fates
        grad = torch.is_grad_enabled()
        key: list[Any] = [module]
        wanting = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                key.append(value.shape)
                wanting |= value.requires_grad
        pace.left -= 1
        if pace.left < 0:
            self._next_window()
        self._outermost, fates.fresh = module, True
        if key == self._sampled_key and grad and module.training and not wanting:
            unhooked = not (self._hooks or self._sampled_open)
            if unhooked and not (fates.open or fates.pending or fates.bare):
                self._forward = self._none
                return
        self._write_down()
        if fates.pending:
            fates.sort_out()
        self._forward = forward = Forward(self._book.steps, grad=grad, inside=fates.open)
        forward.key = tuple(key)
        if wanting and grad:
            forward.attacks = any(map(wants_gradient, tensors_in((args, kwargs))))
            forward.generated = not forward.attacks
        if pace.detailed:
            forward.detailed = True
            forward.examples = examples_of((args, kwargs))
        forward.checked = pace.detailed or not pace.left % pace.every
        if not self._hooks:
            if grad and (fates.open or forward.attacks):
                self._presume_nothing()
            elif module.training and forward.key not in self._known:
                self._hook()

    def end(self) -> None:
        """It has returned, or raised."""
        forward, self._forward = self._forward, self._none
        if forward is self._none:
            if self._as_foreseen():
                return
            forward = Forward(self._book.steps)
            forward.key, forward.checked = tuple(self._sampled_key), True
            self._write_down()
        if not self._hooks:
            self._sum_up(forward)
        elif forward.writes and forward.key not in self._known:
            self._known[forward.key] = {layer: layer.shape for layer in forward.writes}
        self._fates.add(forward)

    # -- hooked or summed ---------------------------------------------------------------------

    def _next_window(self) -> None:
        """Decide anew what there is time for."""
        self._write_down()
        pace, fates, layers = self._pace, self._fates, self._book.layers
        pace.next_window(len(layers))
        if pace.detailed or fates.open or not fates.presumable:
            self._hook()
        elif all(layer.foreseen.possible for layer in layers.values()):
            self._unhook()

    def _hook(self) -> None:
        """See each call of a norm."""
        if self._hooks:
            return
        for layer in self._book.layers.values():
            hook = layer.module.register_forward_hook(Called(self, layer), always_call=True)
            self._hooks.append(hook)
        self._fates.hook()

    def _unhook(self) -> None:
        """See forwards as a whole, and sum up what their norms have written."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._fates.unhook()
        for layer in self._book.layers.values():
            layer.foresee()

    def _presume_nothing(self) -> None:
        """What was presumed is not so: hook the norms, and for longer than the last time."""
        self._fates.presume_nothing()
        self._sampled_key = None
        self._hook()

    def _sum_up(self, forward: Forward) -> None:
        """What the norms in a forward have done while they were not hooked."""
        shapes = self._known.get(forward.key, {})
        surprises = False
        for layer in self._layers_in.get(self._outermost, ()):
            module = layer.module
            layer.pass_by(1, trained=module.training, grad=forward.grad)
            if layer.foreseen.calls and not module.training:
                forward.rested = [*forward.rested, layer]
            writes, surprise = layer.written()
            surprises |= surprise
            for layer.call in range(writes):
                self._wrote(forward, layer, module, shapes.get(layer))
            if forward.grad:
                forward.gradient = forward.gradient or layer.gradient
        forward.presumed = forward.gradient is not None
        if surprises:
            self._presume_nothing()
        elif forward.presumed and self._outermost.training:
            self._sampled_key = list(forward.key)

    # -- sampled ------------------------------------------------------------------------------

    def _as_foreseen(self) -> bool:
        """Whether the norms in a sampled forward have done what they do always."""
        foreseen = self._foreseen_in[self._outermost]
        for norm in foreseen:
            if not norm.met():
                return False
        for norm in foreseen:
            if norm.writes:
                norm.state += norm.writes  # type: ignore[operator]
        self._sampled_open = True
        pace = self._pace
        if not pace.left % pace.every:
            self._write_down()
            for layer in self._layers_in[self._outermost]:
                self._check(layer)
        return True

    def _write_down(self) -> None:
        """Enter into the book what was only tallied."""
        number, waiting = self._sampled, self._sampled_open
        self._sampled, self._sampled_open = 0, False
        if not (number or waiting):
            return
        forward = Forward(self._book.steps)
        forward.key, forward.presumed = tuple(self._sampled_key), True
        shapes = self._known[forward.key]
        for layer in self._layers_in[self._sampled_key[0]]:
            layer.repeat(number + waiting, shapes.get(layer))
            layer.step_on(self._book.steps - 1, times=number)
            if waiting:
                forward.gradient = forward.gradient or layer.gradient
                forward.writes += [layer] * (layer.foreseen.writes or 0)
                rests = () if layer.foreseen.trains else (layer,)
                forward.rested = [*forward.rested, *rests]
        if waiting:
            self._fates.pending.append(forward)
            self._fates.open = True

    # -- steps --------------------------------------------------------------------------------

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        fates = self._fates
        if self._sampled_open and optimizer is fates.last_optimizer and not self.depth:
            self._sampled_open = False
            self._sampled += 1
            fates.alone += 1
            fates.count_step()
            return
        self._write_down()
        parameters = fates.parameters_of(optimizer)
        if not parameters:
            return
        if self.depth:  # a forward that trains in itself, as a wrapped training_step may
            self.depth = 0
            self.end()
        if fates.stepped(optimizer, parameters):
            self._presume_nothing()

    def _settle(self) -> None:
        self._write_down()
        self._fates.settle()

    # -- what it shows ------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Made by the optimizer; without one, by all that hold parameters of the model."""
        return self._book.steps

    @property
    def forwards(self) -> int:
        """Training forwards: in train mode with gradients, of the layer that had most."""
        self._write_down()
        return self._book.forwards

    @property
    def records(self) -> list[Record]:
        """The last detailed records of each layer, at most ``book.KEPT``."""
        return [record for layer in self._book.layers.values() for record in layer.records]

    def table(self) -> str:
        """A line for each layer: calls, writes, and in what circumstances."""
        self._settle()
        layers = self._book.layers.values()
        rows = [[layer.name or "(model)", *map(str, _columns(layer))] for layer in layers]
        widths = [max(map(len, column)) for column in zip(_HEADS, *rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:]))
            for row in (_HEADS, *rows)
        ]
        calls = sum(layer.calls for layer in layers)
        detailed = sum(layer.detailed for layer in layers)
        share = f" ({detailed / calls:.0%})" if calls else ""
        recorded = f"{detailed} of {calls} calls recorded in detail{share}"
        head = f"{self.steps} steps, {self.forwards} training forwards; {recorded}"
        unseen = self._book.unseen()
        if unseen:
            lines.append(f"not seen, as compiled or new: {', '.join(unseen)}")
        return "\n".join([head, "", *lines])

    def diagnosis(self) -> Diagnosis:
        """Judge what was seen, with all that can be said of the model as it stands."""
        self._settle()
        return examined(self._book, self._optimizer)


_HEADS = ("layer", "train", "eval", "writes", "without gradients", "not stepped with",
          "recalibrating", "in backward", "frozen")  # fmt: skip


def _columns(layer: Layer) -> tuple[int, ...]:
    unused = sum(s.total for kind, s in layer.strays.items() if kind != "no gradients")
    return (layer.trained, layer.rested, layer.writes, layer.without, unused, layer.recalibrating,
            layer.in_backward, layer.frozen)  # fmt: skip


def watch(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Ledger:
    """Keep a ledger of ``model``'s running statistics while a block runs.

    >>> with truenorm.watch(model, optimizer) as ledger:  # doctest: +SKIP
    ...     train(model, optimizer)
    >>> print(ledger.table())  # doctest: +SKIP
    >>> print(ledger.diagnosis())  # doctest: +SKIP

    Args:
        model: any module; hooks are put on it and taken off. Copies made of it inside the block
            are not watched.
        optimizer: to count steps by; without one the steps of every optimizer that holds
            parameters of ``model`` are counted.
    """
    return Ledger(model, optimizer)
