"""The ledger: who wrote which running statistic, when, and in what circumstances."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from truenorm.calling.nested import examples_of, tensors_in
from truenorm.doctor.diagnosis import Diagnosis, examined
from truenorm.doctor.ledger.book import (
    Book,
    Fate,
    Forward,
    Gradient,
    Layer,
    Mark,
    Record,
    worth,
)
from truenorm.doctor.ledger.fates import WAITING, wants_gradient
from truenorm.doctor.ledger.hooks import Called, Enter, Leave
from truenorm.doctor.ledger.pace import CHECK_SHARE, DETAIL_SHARE, LONG_WAY, MOST, WINDOW, clock
from truenorm.errors import InputError

# Steps with one forward each, after which it is presumed that a forward is stepped with, and its
# layers make the calls they made before, as long as counts and shapes bear it out. To look closely
# costs a small model a tenth of its time.
_PLAIN = 16
_SMALL_FACTOR = 1e-3  # a write with less weight shows its batch in too few digits


class Ledger:
    """What was written while the block ran; made by :func:`watch`.

    Numbers in :meth:`table` are of all calls, and exact. Records hold the moments of single calls;
    when these get too dear for the loop they are kept in windows of :data:`WINDOW` forwards.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._book, self._optimizer = Book(model), optimizer
        self._handles: list[Any] = []
        self._gradients: dict[int, Gradient] = {}
        self._pending: list[Forward] = []  # with gradients that have reached no parameter yet
        self._bare: deque[Forward] = deque(maxlen=WAITING)  # with none, unless recomputed
        self._optimizers: dict[int, tuple[Any, int, frozenset[int]]] = {}
        self._last_optimizer: Any = None
        self._fresh = self._by_inner = False  # see _count()
        self._open = False  # a forward with gradients has been since the last step
        self._plain, self._needed, self._second = 0, _PLAIN, False
        self._clock = 0  # when this window of forwards began
        self._left, self._detailed, self._saved, self._spent = WINDOW, True, 0, 0
        self._every, self._dearest = 1, 0  # forwards from check to check; ns of a layer's
        self._close: list[Any] = []  # the norms' hooks; none while it is looked from afar
        self._layers_in: dict[nn.Module, list[Layer]] = {}
        # One forward a step, all alike: these are counted first and written down later.
        self._swift, self._swift_open, self._swift_key = 0, False, None  # type: int, bool, Any
        # Rows and values of each layer's input, by a forward's module and shapes of arguments.
        self._known: dict[Hashable, dict[Layer, tuple[int, int]]] = {}
        self._outermost = self._inner = model
        self._forward = self._none = Forward()
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
        self._clock, self.depth = clock(), 0
        self._inner = _inside(self._book.model)
        self._take_in_layers()
        on = self._handles.append
        by_module = {layer.module: layer for layer in self._book.layers.values()}
        for module in self._book.model.modules():
            layers = [by_module[part] for part in module.modules() if part in by_module]
            if layers and module not in by_module:
                self._layers_in[module] = layers
                enter, leave = Enter(self, module), Leave(self, module)
                on(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                on(module.register_forward_hook(leave, always_call=True))
        self._look_closely()
        on(register_optimizer_step_post_hook(self._stepped))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in (*self._handles, *self._close):
            handle.remove()
        self._handles, self._close = [], []
        self._settle()
        self._pending, self._optimizers, self._last_optimizer = [], {}, None
        self._swift_key = None
        for gradient in self._gradients.values():
            gradient.remove()
        for layer in self._book.layers.values():
            layer.gradient = None
        self._gradients, self._layers_in = {}, {}

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
        grad = torch.is_grad_enabled()
        key: list[Any] = [module]
        wanting = False
        for given in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(given, Tensor):
                key.append(given.shape)
                wanting |= given.requires_grad
        self._left -= 1
        if self._left < 0:
            self._next_window()
        self._outermost, self._fresh = module, True
        if key == self._swift_key and grad and module.training and not wanting and self._plainly():
            self._forward = self._none
            return
        self._write_down()
        if self._pending:
            self._sort_out()
        self._forward = forward = Forward(self._book.steps, grad=grad, inside=self._open)
        forward.key = tuple(key)
        if wanting and grad:
            forward.attacks = any(map(wants_gradient, tensors_in((args, kwargs))))
            forward.generated = not forward.attacks
        if self._detailed:
            forward.detailed = True
            forward.examples = examples_of((args, kwargs))
        forward.checked = self._detailed or not self._left % self._every
        if not self._close:
            if grad and (self._open or forward.attacks):
                self._not_plain()
            elif module.training and forward.key not in self._known:
                self._look_closely()

    def end(self) -> None:
        """It has returned, or raised."""
        forward, self._forward = self._forward, self._none
        if forward is self._none:
            if self._as_foreseen():
                return
            forward = Forward(self._book.steps)
            forward.key, forward.checked = tuple(self._swift_key), True
            self._write_down()
        if not self._close:
            self._sum_up(forward)
        elif forward.writes and forward.key not in self._known:
            self._known[forward.key] = {layer: layer.shape for layer in forward.writes}
        if forward.gradient is not None or forward.mark is not None:
            self._pending.append(forward)
            self._second |= self._open
            self._open = True
            if len(self._pending) > WAITING:  # someone keeps every graph
                del self._pending[0]
        elif forward.writes:
            if len(self._bare) == WAITING:
                self._tally_bare(self._bare.popleft())
            self._bare.append(forward)

    # -- closely or from afar -----------------------------------------------------------------

    def _next_window(self) -> None:
        """Decide anew what there is time for."""
        self._write_down()
        now = clock()
        gone, self._clock = now - self._clock, now
        self._saved = min(MOST, self._saved + int(DETAIL_SHARE * gone) - self._spent)
        self._detailed, self._left, self._spent = self._saved >= 0, WINDOW - 1, 0
        check = self._dearest * (len(self._book.layers) + LONG_WAY)
        self._every = 1 + int(check * WINDOW / (CHECK_SHARE * gone + 1))
        plain = self._plain >= self._needed and not self._open
        if self._detailed or not plain:
            self._look_closely()
        elif all(layer.foreseeable for layer in self._book.layers.values()):
            self._look_from_afar()

    def _look_closely(self) -> None:
        """See each call of a norm."""
        if self._close:
            return
        for layer in self._book.layers.values():
            hook = layer.module.register_forward_hook(Called(self, layer), always_call=True)
            self._close.append(hook)
        for gradient in self._gradients.values():
            gradient.attach()

    def _look_from_afar(self) -> None:
        """See forwards as a whole, and sum up what their norms have written."""
        for handle in self._close:
            handle.remove()
        self._close = []
        for gradient in self._gradients.values():
            gradient.remove()
        for layer in self._book.layers.values():
            layer.foresee()

    def _not_plain(self) -> None:
        """What was presumed is not so: look closely, and for longer than the last time."""
        self._plain, self._needed, self._swift_key = 0, 4 * max(self._needed, self._plain), None
        self._look_closely()

    def _sum_up(self, forward: Forward) -> None:
        """What the norms in a forward have done that was seen from afar."""
        shapes = self._known.get(forward.key, {})
        surprises = False
        for layer in self._layers_in.get(self._outermost, ()):
            module = layer.module
            layer.pass_by(1, trained=module.training, grad=forward.grad)
            if layer.usual and not module.training:
                forward.rested = [*forward.rested, layer]
            writes, surprise = layer.written()
            surprises |= surprise
            for layer.call in range(writes):
                self._wrote(forward, layer, module, shapes.get(layer))
            if forward.grad:
                forward.gradient = forward.gradient or layer.gradient
        forward.presumed = forward.gradient is not None
        if surprises:
            self._not_plain()
        elif forward.presumed and self._outermost.training:
            self._swift_key = list(forward.key)

    def _plainly(self) -> bool:
        """Whether nothing but forwards and steps in turn has been of late."""
        return not (self._close or self._open or self._swift_open or self._pending or self._bare)

    def _as_foreseen(self) -> bool:
        """Whether the norms in a forward seen from afar have done what they do always."""
        layers = self._layers_in[self._outermost]
        for layer in layers:
            if not layer.as_foreseen():
                return False
        for layer in layers:
            if layer.usually:
                layer.state += layer.usually  # type: ignore[operator]
        self._swift_open = True
        if not self._left % self._every:
            self._write_down()
            for layer in layers:
                self._check(layer)
        return True

    def _write_down(self) -> None:
        """Enter into the book what was only counted."""
        number, waiting = self._swift, self._swift_open
        self._swift, self._swift_open = 0, False
        if not (number or waiting):
            return
        forward = Forward(self._book.steps)
        forward.key, forward.presumed = tuple(self._swift_key), True
        shapes = self._known[forward.key]
        for layer in self._layers_in[self._swift_key[0]]:
            layer.repeat(number + waiting, shapes.get(layer))
            layer.step_on(self._book.steps - 1, times=number)
            if waiting:
                forward.gradient = forward.gradient or layer.gradient
                forward.writes += [layer] * (layer.usually or 0)
                forward.rested = [*forward.rested, *([] if layer.trains else [layer])]
        if waiting:
            self._pending.append(forward)
            self._open = True

    # -- calls --------------------------------------------------------------------------------

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
            layer.state = layer.look_up()
            return
        else:
            layer.trained += 1
            if layer.call:
                layer.later += 1
            elif forward.grad:
                layer.learning += 1
            wrote = layer.moved()
            if wrote:
                layer.shape = out.size(0), out.numel()
                self._wrote(forward, layer, module, layer.shape)
        if forward.grad and forward.gradient is None and forward.mark is None:
            self._follow(forward, layer, module, out)
        if forward.detailed:
            self._record(layer, module, args, out, wrote=wrote)

    def repeated(self, layer: Layer, module: Any, args: Any, out: Any) -> None:
        """A batch norm was called in a backward pass.

        ``out`` may be None then: a repetition ends as soon as all is there that is needed.
        """
        wrote = module.training and layer.moved()
        layer.writes += wrote
        layer.in_backward += wrote
        layer.repeated += not wrote
        if self._bare:
            self._link(layer)
        if self._detailed and out is not None:
            self._record(layer, module, args, out, wrote=wrote, backward=True)

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
        if layer.module._buffers["running_var"].is_cpu and not (layer.bad or layer.broken):
            layer.look_for_bad(self._book.steps)
            self._dearest = max(self._dearest // 2, clock() - start)

    def _follow(self, forward: Forward, layer: Layer, module: Any, out: Any) -> None:
        """See to it that the forward's fate will be known."""
        node = out.grad_fn if isinstance(out, Tensor) else None
        if node is None:
            return
        gradient = layer.gradient
        if gradient is None or not gradient.parameter.requires_grad:
            gradient = layer.gradient = self._gradient_of(module)
        forward.gradient = gradient
        if self._plain >= self._needed and gradient and not (self._open or forward.attacks):
            forward.presumed = True
            return
        mark = Mark(forward)
        node.register_prehook(mark)
        forward.mark = weakref.ref(mark)

    def _gradient_of(self, module: Any) -> Gradient | None:
        """That of its weight or bias, or of the first parameter that learns upstream."""
        own = (module._parameters.get(name) for name in ("weight", "bias"))
        for parameter in own:
            if parameter is not None and parameter.requires_grad:
                break
        else:
            learning = (p for p in self._outermost.parameters() if p.requires_grad)
            parameter = next(learning, None)
        if parameter is None or not parameter.is_leaf:
            return None
        known = self._gradients.get(id(parameter))
        if known is None:
            known = self._gradients[id(parameter)] = Gradient(parameter, self._accumulated)
        return known

    def _link(self, layer: Layer) -> None:
        """A checkpoint's first forward ran without gradients; here it is repeated with them."""
        for forward in reversed(self._bare):
            if forward.writes[0] is layer:
                forward.linked = forward.reached = forward.fired = True
                forward.gradient = self._gradient_of(layer.module)
                self._bare.remove(forward)
                self._pending.append(forward)
                return

    def _record(
        self, layer: Layer, module: Any, args: Any, out: Any, *, wrote: bool, backward: bool = False
    ) -> None:
        start = clock()
        forward = self._forward
        x = args[0].detach() if args and isinstance(args[0], Tensor) else None
        first, forward.recorded = not forward.recorded, True
        if wrote and not module.running_var.is_cpu:
            layer.look_for_bad(self._book.steps)
        tracked = layer.settled() if first and not module.training else None
        if module.training:
            mean, var = _moments(layer, module, x, wrote=wrote)
        else:
            mean, var = (None, None) if tracked is None else _of_input(x)
        known = x is not None and var is not None
        layer.detailed += 1
        layer.records.append(
            Record(
                layer=layer.name,
                forward=layer.forwards - 1,
                call=layer.call,
                step=self._book.steps,
                phase="train" if module.training else "eval",
                grad=forward.grad,
                backward=backward,
                n=out.numel() // (module.num_features or 1),
                wrote=wrote,
                finite=layer.bad is None and not layer.broken,
                mean=mean,
                var=var,
                worth=worth(x, var, forward.examples) if known else 0.0,  # type: ignore[arg-type]
                tracked=tracked,
                _within=forward,
            )
        )
        self._spent += clock() - start

    # -- what becomes of forwards -------------------------------------------------------------

    def _sort_out(self) -> None:
        """Between forwards: those whose graph is gone will have no gradient any more."""
        waiting, self._pending = self._pending, []
        for forward in waiting:
            gone = forward.mark is not None and forward.mark() is None
            gone |= forward.linked and forward.gradient is not None
            gone |= forward.presumed and not self._open  # a step went by without it
            if gone:
                self._tally(forward, "inputs only" if forward.reached else "unreached")
            else:
                forward.fired = forward.kept
                self._pending.append(forward)

    def _accumulated(self, gradient: Gradient) -> None:
        """A backward pass has given a parameter its gradient."""
        forwards = [f for f in self._pending if f.gradient is gradient and (f.fired or f.presumed)]
        if not forwards:
            return
        if gradient.held and gradient.fresh:
            # Without any optimizer in sight, parameters are moved by hand.
            by_hand = self._optimizer is self._last_optimizer is None
            self._release(gradient, "stepped" if by_hand else "discarded")
        gradient.held += forwards
        gradient.passes += 1
        self._pending = [f for f in self._pending if f not in forwards]

    def _release(self, gradient: Gradient, fate: Fate) -> None:
        forwards, gradient.held = gradient.held, []
        for forward in forwards:
            forward.passes = gradient.passes if fate == "stepped" else 0
            self._tally(forward, fate)
        gradient.passes = 0

    def _tally(self, forward: Forward, fate: Fate) -> None:
        forward.fate = fate
        for layer in forward.rested:
            layer.rested_stepped += fate == "stepped"
        for layer in forward.writes:
            if fate == "stepped":
                layer.step_on(forward.step, passes=forward.passes)
            elif fate == "no gradients" or fate == "unreached":  # noqa: PLR1714  mypy narrows so
                layer.stray(fate, inside=forward.inside)
            else:
                layer.stray("attack" if forward.attacks else "discarded", inside=forward.inside)

    def _tally_bare(self, forward: Forward) -> None:
        if not forward.grad:  # else nothing in it needed a gradient
            self._tally(forward, "no gradients")

    def _settle_bare(self) -> None:
        while self._bare:
            self._tally_bare(self._bare.popleft())

    def _settle(self) -> None:
        self._write_down()
        self._settle_bare()
        self._sort_out()

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._swift_open and optimizer is self._last_optimizer and not self.depth:
            self._swift_open = False
            self._swift += 1
            self._plain += 1
            self._count_step()
            return
        self._write_down()
        held = self._parameters_of(optimizer)
        if not held:
            return
        if self.depth:  # a forward that trains in itself, as a wrapped training_step may
            self.depth = 0
            self.end()
        if self._counts(optimizer):
            self._count_step()
        self._settle_bare()
        released = self._step_with(held)
        if released == 1 and not self._second:
            self._plain += 1
        elif self._plain and (released or self._open):
            self._not_plain()
        self._open = self._second = False
        self._last_optimizer = optimizer

    def _count_step(self) -> None:
        self._fresh = False
        self._book.steps += 1
        if not (self._book.model.training and self._inner.training):
            self._book.resting_steps += 1

    def _step_with(self, held: frozenset[int]) -> int:
        """A step of the parameters ``held`` was made: with how many forwards."""
        sure = [f for f in self._pending if self._surely_stepped(f)]
        for forward in sure:
            self._pending.remove(forward)
            self._tally(forward, "stepped")
        released = len(sure)
        for gradient in self._gradients.values():
            if gradient.held and (id(gradient.parameter) in held or not self._owned(gradient)):
                released += len(gradient.held)
                self._release(gradient, "stepped")
        return released

    def _surely_stepped(self, forward: Forward) -> bool:
        """Whether a waiting forward needs no gradient seen to be one that was stepped with."""
        if forward.linked:
            return forward.gradient is None
        return forward.presumed and not self._close

    def _counts(self, optimizer: Any) -> bool:
        """Whether it made a step by itself, and not as a part of another one."""
        given = self._optimizer
        if given is None:
            return self._fresh or self._last_optimizer is optimizer
        if optimizer is given:
            counts = self._fresh or not self._by_inner
            self._by_inner = False
            return counts
        wrapped = any(value is optimizer for value in getattr(given, "__dict__", {}).values())
        self._by_inner |= wrapped
        return wrapped

    def _parameters_of(self, optimizer: Any) -> frozenset[int]:
        """Ids of its parameters; none if it holds none of the model's."""
        groups = len(optimizer.param_groups)
        known = self._optimizers.get(id(optimizer))
        if known is None or known[0] is not optimizer or known[1] != groups:
            held = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
            if held.isdisjoint(map(id, self._book.model.parameters())):
                held = frozenset()
            known = self._optimizers[id(optimizer)] = optimizer, groups, held
        return known[2]

    def _owned(self, gradient: Gradient) -> bool:
        return any(id(gradient.parameter) in held for _, _, held in self._optimizers.values())

    # -- what is told ------------------------------------------------------------------------

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
        told = f"{detailed} of {calls} calls recorded in detail{share}"
        head = f"{self.steps} steps, {self.forwards} training forwards; {told}"
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


def _inside(model: nn.Module) -> nn.Module:
    """What a wrapper, of data-parallel training or a compiler, has inside; or the model itself."""
    while not model._parameters and not model._buffers and len(model._modules) == 1:
        (child,) = model._modules.values()
        if child is None:
            break
        model = child
    return model


def _moments(
    layer: Layer, module: Any, x: Tensor | None, *, wrote: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Mean and unbiased variance of a call in train mode, by its write or else by its input."""
    factor = module.momentum
    if wrote and factor is None and module.num_batches_tracked is not None:
        factor = 1 / max(1, int(module.num_batches_tracked))
    if wrote and factor and factor > _SMALL_FACTOR and layer.shows_batch:
        before = layer.before()
        after = layer.keep()
        if before is not None:
            mean, var = before + (after - before) / factor
            return mean, var
    return _of_input(x)


def _of_input(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if x is None or x.ndim < 2 or x.numel() <= x.shape[1] or not x.is_floating_point():
        return None, None
    wide = x.float() if x.dtype.itemsize < 4 else x
    var, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != 1])
    return mean, var


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
