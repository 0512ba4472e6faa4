"""Running statistics that are written when the optimizer steps, or not at all."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from truenorm.errors import InputError
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.capture import graph_task

_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """What ties a model's statistics to an optimizer; ``remove()`` or leaving a ``with`` unties it.

    After each step of the optimizer the statistics of the forwards behind it are committed,
    unless a gradient of the optimizer's parameters or the model's is not finite: then they are
    dropped. A gradient that is thrown away was never stepped on (a step skipped by a gradient
    scaler, a loss found to be NaN), so the statistics of those forwards go with it, whoever throws
    it away: ``zero_grad()`` of the optimizer or the model, or ``p.grad = None``, which is found at
    the next backward pass or step. A forward still waiting for its backward is kept.

    A deep copy of model and optimizer together is attached as they are; a pickle is not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        self._attached = True
        self._pass: int | None = None  # the backward pass that was last seen
        self._gradients: int | None = None  # the sum of their versions after it; None without any
        self._hooked: list[Tensor] = []
        self._hooks: list[Any] = []
        self._step = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        self._covered = {n: vars(optimizer).get(n) for n in ("zero_grad", "__deepcopy__")}
        self._covers = {
            "zero_grad": self._dropping(optimizer.zero_grad),
            "__deepcopy__": self._copied_with_model,
        }
        vars(optimizer).update(self._covers)
        self._hook_parameters()
        _attachments.add(self)

    # -- backward passes -------------------------------------------------------------------------

    def _hook_parameters(self) -> None:
        """Be told of each backward pass by the parameters that learn, which may change."""
        learning = [p for p in _parameters(self._optimizer) if p.requires_grad]
        if [id(p) for p in learning] == [id(p) for p in self._hooked]:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooked = learning
        self._hooks = [p.register_hook(self._on_gradient) for p in learning]  # type: ignore[no-untyped-call]

    def _on_gradient(self, _: Tensor) -> None:
        """A gradient is about to be added to its parameter, the first one of this pass or not."""
        if graph_task() == self._pass:
            return
        self._pass = graph_task()
        self._drop_what_was_cleared()
        Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        layers = transactional(self._model)
        _settle(layers, backward=True)
        self._gradients = self._versions()

    def _drop_what_was_cleared(self) -> None:
        """If the gradients of earlier passes are gone, so is what they came from."""
        if self._gradients is None or self._gradients == self._versions():
            return
        if not any(bool(_values(g).any()) for g in _gradients(_parameters(self._optimizer))):
            self._gradients = None
            for layer in transactional(self._model):
                layer.rollback(spent_only=True)

    def _versions(self) -> int | None:
        gradients = _gradients(_parameters(self._optimizer))
        return sum(g._version for g in gradients) if gradients else None

    # -- the optimizer's methods -----------------------------------------------------------------

    def _dropping(self, zero_grad: Any) -> Any:
        @functools.wraps(zero_grad)
        def zero_grad_and_drop(*args: Any, **kwargs: Any) -> None:
            if self._attached:
                self._hook_parameters()
                layers = transactional(self._model)
                _settle(layers)
                for layer in layers:
                    layer.rollback(spent_only=True)
                self._gradients = None
            zero_grad(*args, **kwargs)

        return zero_grad_and_drop

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._drop_what_was_cleared()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # All of the model's: what another optimizer is to step on comes of the same forwards.
        parameters = {id(p): p for p in (*_parameters(optimizer), *self._model.parameters())}
        finite = all(_finite(g) for g in _gradients(parameters.values()))
        layers = transactional(self._model)
        _settle(layers)
        for layer in layers:
            if finite:
                layer.commit()
            else:
                layer.refuse()
        self._hook_parameters()

    def _copied_with_model(self, memo: dict[int, Any]) -> torch.optim.Optimizer:
        """The copy of the optimizer, tied to that of the model, whichever is copied first."""
        cover = vars(self._optimizer).pop("__deepcopy__")
        try:
            twin = copy.deepcopy(self._optimizer, memo)
        finally:
            vars(self._optimizer)["__deepcopy__"] = cover
        Attachment(twin, copy.deepcopy(self._model, memo))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        if not self._attached:
            return self
        attached = _attachment_of(copy.deepcopy(self._optimizer, memo))
        assert attached is not None
        return attached

    # -- its end ---------------------------------------------------------------------------------

    def remove(self) -> None:
        """Untie; what is pending stays pending."""
        if not self._attached:
            return
        self._attached = False
        for hook in (*self._step, *self._hooks):
            hook.remove()
        _attachments.discard(self)
        own = vars(self._optimizer)
        for name, cover in self._covers.items():
            if own.get(name) is not cover:
                continue  # covered by another, within which this one does nothing any more
            del own[name]
            if self._covered[name] is not None:
                own[name] = self._covered[name]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _attachment_of(optimizer: torch.optim.Optimizer) -> Attachment | None:
    return next((a for a in _attachments if a._optimizer is optimizer), None)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _gradients(parameters: Any) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _finite(gradient: Tensor) -> bool:
    values = _values(gradient)
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _settle(layers: list[BatchNorm], *, backward: bool = False) -> None:
    """Decide which forwards of ``layers`` have had their part in a backward pass that has ended.

    A norm before everything that learns records no gradient: its forward goes with the next one
    behind it that did, in the network and so in time; if there is none, with the ``backward``
    pass that has just ended.
    """
    forwards = list(itertools.chain.from_iterable(layer._pending for layer in layers))
    behind = backward
    for forward in sorted(forwards, key=lambda f: f.number, reverse=True):
        if forward.recorded:
            behind = forward.reached_by_gradient
        elif forward.learning and behind:
            forward.reached_by_gradient = True
        forward.spent = forward.reached_by_gradient


def transactional(model: nn.Module) -> list[BatchNorm]:
    """The batch norms of ``model`` that wait for a commit."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.options.commit == "step"]


def attach(optimizer: torch.optim.Optimizer, model: nn.Module) -> Attachment:
    """Let each step of ``optimizer`` commit the statistics of ``model``'s ``commit="step"`` layers.

    Layers added or switched to ``commit="step"`` later are found, too.

    Args:
        optimizer: any torch optimizer.
        model: the model it trains.

    Raises:
        InputError: no layer of ``model`` has ``commit="step"``, or the optimizer is attached.
    """
    if not transactional(model):
        raise InputError(
            "attach needs a layer with commit='step', and the model has none; "
            "truenorm.convert(model, to='truenorm', commit='step') gives it."
        )
    if _attachment_of(optimizer) is not None:
        raise InputError("this optimizer is attached already; remove() the first attachment.")
    return Attachment(optimizer, model)


def commit(model: nn.Module) -> None:
    """Write what is pending in every batch norm of ``model``, as a step of the optimizer does."""
    layers = transactional(model)
    _settle(layers)
    for layer in layers:
        layer.commit()


def rollback(model: nn.Module) -> int:
    """Drop what is pending in every batch norm of ``model``; return how many forwards that was."""
    return sum(layer.rollback() for layer in transactional(model))
