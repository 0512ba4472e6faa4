"""Running statistics that are written when the optimizer steps, or not at all."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from truenorm.errors import InputError
from truenorm.layers.batch_norm import BatchNorm


class Attachment:
    """What ties a model's statistics to an optimizer; ``remove()`` or leaving a ``with`` unties it.

    After each step of the optimizer the statistics of the forwards behind it are committed,
    unless a gradient is not finite: then they are dropped. What ``zero_grad()`` throws away was
    never stepped on (a step skipped by a gradient scaler, a loss found to be NaN), so the
    statistics of those forwards go with the gradients; a forward still waiting for its backward
    is kept.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        self._step = optimizer.register_step_post_hook(self._after_step)
        zero_grad = optimizer.zero_grad

        @functools.wraps(zero_grad)
        def zero_grad_and_drop(*args: Any, **kwargs: Any) -> None:
            for layer in transactional(model):
                layer.rollback(spent_only=True)
            zero_grad(*args, **kwargs)

        optimizer.zero_grad = zero_grad_and_drop  # type: ignore[method-assign]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        finite = all(bool(torch.isfinite(g.sum())) or bool(torch.isfinite(g).all()) for g in grads)
        for layer in transactional(self._model):
            if finite:
                layer.commit()
            else:
                layer.refuse()

    def remove(self) -> None:
        """Untie; what is pending stays pending."""
        self._step.remove()
        del self._optimizer.zero_grad

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


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
    if "zero_grad" in vars(optimizer):
        raise InputError("this optimizer is attached already; remove() the first attachment.")
    return Attachment(optimizer, model)


def commit(model: nn.Module) -> None:
    """Write what is pending in every batch norm of ``model``, as a step of the optimizer does."""
    for layer in transactional(model):
        layer.commit()


def rollback(model: nn.Module) -> int:
    """Drop what is pending in every batch norm of ``model``; return how many forwards that was."""
    return sum(layer.rollback() for layer in transactional(model))
