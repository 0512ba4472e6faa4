"""What became of each write: whether a step followed, and a gradient came."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from truenorm.doctor.ledger.book import Book, Layer
from truenorm.doctor.ledger.forward import Fate, Forward, Gradient, Mark

WAITING = 256  # forwards whose fate is open
UPSTREAM = 8  # operations between a model's input and the tensor that wants its gradient
# Steps with one forward each, after which it is presumed that a forward is stepped with, and its
# layers make the calls they made before, as long as counts and shapes bear it out. To hook every
# call costs a small model a tenth of its time.
ENOUGH = 16


class Fates:
    """The forwards whose fate is open, and the gradients and steps that decide it.

    Attributes:
        pending: forwards with gradients that have reached no parameter yet.
        bare: those with none, unless they are recomputed.
        alone: steps in a row that were made with one forward each.
        enough: as many of them as it takes to presume that of the next.
        open: a forward with gradients has been since the last step.
        fresh: a forward of any kind has been since the last step that counted.
        last_optimizer: which made the last step.
    """

    def __init__(self, book: Book, optimizer: Optimizer | None) -> None:
        self._book, self._optimizer = book, optimizer
        self._inner = book.model
        self.pending: list[Forward] = []
        self.bare: deque[Forward] = deque(maxlen=WAITING)
        self.alone, self.enough = 0, ENOUGH
        self.open = self.fresh = False
        self.last_optimizer: Any = None
        self._second = False  # a forward with gradients has followed another in this step
        self._by_inner = False  # see _counts()
        self._hooked = False  # the gradients bear hooks
        self._gradients: dict[int, Gradient] = {}
        self._optimizers: dict[int, tuple[Any, int, frozenset[int]]] = {}

    # -- the block ----------------------------------------------------------------------------

    def begin(self) -> None:
        """A block begins."""
        self._inner = _inside(self._book.model)

    def close(self) -> None:
        """It is over: nothing that is open still will be decided."""
        self.pending, self._optimizers, self.last_optimizer = [], {}, None
        self.unhook()
        for layer in self._book.layers.values():
            layer.gradient = None
        self._gradients = {}

    def hook(self) -> None:
        """See each gradient that comes."""
        self._hooked = True
        for gradient in self._gradients.values():
            gradient.attach()

    def unhook(self) -> None:
        """See none: from now on it is presumed that they come."""
        self._hooked = False
        for gradient in self._gradients.values():
            gradient.remove()

    @property
    def presumable(self) -> bool:
        """Whether steps have borne it out that each is made with one forward."""
        return self.alone >= self.enough

    def presume_nothing(self) -> None:
        """What was presumed is not so: it takes longer than the last time to presume it again."""
        self.alone, self.enough = 0, 4 * max(self.enough, self.alone)

    # -- forwards -----------------------------------------------------------------------------

    def follow(self, forward: Forward, layer: Layer, outermost: nn.Module, out: Any) -> None:
        """See to it that the fate of ``forward`` will be known, by a layer's output in it."""
        node = out.grad_fn if isinstance(out, Tensor) else None
        if node is None:
            return
        gradient = layer.gradient
        if gradient is None or not gradient.parameter.requires_grad:
            gradient = layer.gradient = self._gradient_of(layer.module, outermost)
        forward.gradient = gradient
        if self.alone >= self.enough and gradient and not (self.open or forward.attacks):
            forward.presumed = True
            return
        mark = Mark(forward)
        node.register_prehook(mark)
        forward.mark = weakref.ref(mark)

    def add(self, forward: Forward) -> None:
        """A forward has returned, and waits for what becomes of it."""
        if forward.gradient is not None or forward.mark is not None:
            self.pending.append(forward)
            self._second |= self.open
            self.open = True
            if len(self.pending) > WAITING:  # someone keeps every graph
                del self.pending[0]
        elif forward.writes:
            if len(self.bare) == WAITING:
                self._tally_bare(self.bare.popleft())
            self.bare.append(forward)

    def link(self, layer: Layer, outermost: nn.Module) -> None:
        """A checkpoint's first forward ran without gradients; here it is repeated with them."""
        for forward in reversed(self.bare):
            if forward.writes[0] is layer:
                forward.linked = forward.reached = forward.fired = True
                forward.gradient = self._gradient_of(layer.module, outermost)
                self.bare.remove(forward)
                self.pending.append(forward)
                return

    def _gradient_of(self, module: nn.Module, outermost: nn.Module) -> Gradient | None:
        """That of its weight or bias, or of the first parameter that learns upstream."""
        own = (module._parameters.get(name) for name in ("weight", "bias"))
        for parameter in own:
            if parameter is not None and parameter.requires_grad:
                break
        else:
            learning = (p for p in outermost.parameters() if p.requires_grad)
            parameter = next(learning, None)
        if parameter is None or not parameter.is_leaf:
            return None
        known = self._gradients.get(id(parameter))
        if known is None:
            known = self._gradients[id(parameter)] = Gradient(parameter, self._accumulated)
        elif self._hooked:
            known.attach()  # it may have been frozen when the others were hooked
        return known

    def _accumulated(self, gradient: Gradient) -> None:
        """A backward pass has given a parameter its gradient."""
        forwards = [f for f in self.pending if f.gradient is gradient and (f.fired or f.presumed)]
        if not forwards:
            return
        if gradient.forwards and gradient.fresh:
            # Without any optimizer in sight, parameters are moved by hand.
            by_hand = self._optimizer is self.last_optimizer is None
            self._release(gradient, "stepped" if by_hand else "discarded")
        gradient.forwards += forwards
        gradient.passes += 1
        self.pending = [f for f in self.pending if f not in forwards]

    # -- what is decided ----------------------------------------------------------------------

    def settle(self) -> None:
        """Decide what can be decided without another step."""
        self._settle_bare()
        self.sort_out()

    def sort_out(self) -> None:
        """Between forwards: those whose graph is gone will have no gradient any more."""
        waiting, self.pending = self.pending, []
        for forward in waiting:
            gone = forward.mark is not None and forward.mark() is None
            gone |= forward.linked and forward.gradient is not None
            gone |= forward.presumed and not self.open  # a step went by without it
            if gone:
                _tally(forward, "inputs only" if forward.reached else "unreached")
            else:
                forward.fired = forward.kept
                self.pending.append(forward)

    def _tally_bare(self, forward: Forward) -> None:
        if not forward.grad:  # else nothing in it needed a gradient
            _tally(forward, "no gradients")

    def _settle_bare(self) -> None:
        while self.bare:
            self._tally_bare(self.bare.popleft())

    def _release(self, gradient: Gradient, fate: Fate) -> None:
        forwards, gradient.forwards = gradient.forwards, []
        for forward in forwards:
            forward.passes = gradient.passes if fate == "stepped" else 0
            _tally(forward, fate)
        gradient.passes = 0

    # -- steps --------------------------------------------------------------------------------

    def stepped(self, optimizer: Any, parameters: frozenset[int]) -> bool:
        """A step of ``parameters`` was made: whether this refutes what was presumed."""
        if self._counts(optimizer):
            self.count_step()
        self._settle_bare()
        released = self._step_with(parameters)
        refuted = False
        if released == 1 and not self._second:
            self.alone += 1
        else:
            refuted = bool(self.alone and (released or self.open))
        self.open = self._second = False
        self.last_optimizer = optimizer
        return refuted

    def count_step(self) -> None:
        """Enter a step into the book."""
        self.fresh = False
        book = self._book
        book.steps += 1
        if not (book.model.training and self._inner.training):
            book.resting_steps += 1

    def parameters_of(self, optimizer: Any) -> frozenset[int]:
        """Ids of its parameters; none if it has none of the model's."""
        groups = len(optimizer.param_groups)
        known = self._optimizers.get(id(optimizer))
        if known is None or known[0] is not optimizer or known[1] != groups:
            ids = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
            if ids.isdisjoint(map(id, self._book.model.parameters())):
                ids = frozenset()
            known = self._optimizers[id(optimizer)] = optimizer, groups, ids
        return known[2]

    def _step_with(self, parameters: frozenset[int]) -> int:
        """With how many forwards a step of ``parameters`` was made."""
        sure = [f for f in self.pending if self._surely_stepped(f)]
        for forward in sure:
            self.pending.remove(forward)
            _tally(forward, "stepped")
        released = len(sure)
        for gradient in self._gradients.values():
            moved = id(gradient.parameter) in parameters or not self._owned(gradient)
            if gradient.forwards and moved:
                released += len(gradient.forwards)
                self._release(gradient, "stepped")
        return released

    def _surely_stepped(self, forward: Forward) -> bool:
        """Whether a waiting forward needs no gradient seen to be one that was stepped with."""
        if forward.linked:
            return forward.gradient is None
        return forward.presumed and not self._hooked

    def _counts(self, optimizer: Any) -> bool:
        """Whether it made a step by itself, and not as a part of another one."""
        outer = self._optimizer
        if outer is None:
            return self.fresh or self.last_optimizer is optimizer
        if optimizer is outer:
            counts = self.fresh or not self._by_inner
            self._by_inner = False
            return counts
        wrapped = any(value is optimizer for value in getattr(outer, "__dict__", {}).values())
        self._by_inner |= wrapped
        return wrapped

    def _owned(self, gradient: Gradient) -> bool:
        return any(id(gradient.parameter) in ids for _, _, ids in self._optimizers.values())


def _tally(forward: Forward, fate: Fate) -> None:
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


def wants_gradient(x: Tensor) -> bool:
    """Whether ``x`` is made of a tensor that wants its gradient and is no parameter.

    So is what an attack feeds to a model. What a generator made comes from parameters.
    """
    if x.grad_fn is None:
        return not isinstance(x, nn.Parameter)
    nodes, wants = [x.grad_fn], False
    for _ in range(UPSTREAM):
        if not nodes:
            break
        node = nodes.pop(0)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            return False
        wants |= isinstance(variable, Tensor)
        nodes += [before for before, _ in node.next_functions if before is not None]
    return wants and not nodes


def _inside(model: nn.Module) -> nn.Module:
    """What a wrapper, of data-parallel training or a compiler, has inside; or the model itself."""
    while not model._parameters and not model._buffers and len(model._modules) == 1:
        (child,) = model._modules.values()
        if child is None:
            break
        model = child
    return model
