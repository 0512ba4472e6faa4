"""The layers with weights in the order in which a forward calls them, and what they are given."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from truenorm.calling.borrowing import evaluating
from truenorm.data.batches import Batch
from truenorm.training.evaluate import wide
from truenorm.training.steps import cross_entropy

WEIGHTED = (nn.Linear, _ConvNd, nn.MultiheadAttention)
State = dict[str, Tensor]  # parameters by name, without gradient


class WeightedLayer(NamedTuple):
    """A linear layer, convolution or attention.

    Attributes:
        name: its dotted name.
        module: itself.
        weights: names of its matrices and kernels; biases are not among them.
        before: names of all parameters of modules called before it, norms' included.
    """

    name: str
    module: nn.Module
    weights: tuple[str, ...]
    before: frozenset[str]


@torch.no_grad()
def layers_of(model: nn.Module, x: Tensor) -> list[WeightedLayer]:
    """The layers in the order in which a forward of ``x`` (in eval mode) first calls them.

    A parameter belongs to the module that was called and owns it, itself or through parts that
    are never called themselves, as attention's output matrix. A residual block's shortcut is
    called after its body, which so counts as before it.
    """
    names = {module: name for name, module in model.named_modules()}
    called: dict[str, int] = {}

    def note(module: nn.Module, _: object) -> None:
        called.setdefault(names[module], len(called))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        with evaluating(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    owners = {name: _owner(name, called) for name, _ in model.named_parameters()}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    return [
        WeightedLayer(
            name,
            model.get_submodule(name),
            tuple(p for p, owner in owners.items() if owner == name and p in matrices),
            frozenset(p for p, owner in owners.items() if called[owner] < place),
        )
        for name, place in called.items()
        if isinstance(model.get_submodule(name), WEIGHTED)
    ]


def _owner(parameter: str, called: dict[str, int]) -> str:
    owner = parameter.rpartition(".")[0]
    while owner not in called:
        owner = owner.rpartition(".")[0]
    return owner


def state_of(model: nn.Module) -> State:
    """A copy of all parameters as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Train mode without dropout, whose noise would be taken for a change; modes are given back."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = not isinstance(module, (nn.Dropout, nn.MultiheadAttention))
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def gradients(
    model: nn.Module, state: State, batch: Batch, names: tuple[str, ...], smoothing: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """The loss with the parameters of ``state`` and its gradient for the parameters ``names``.

    In the modes the model is in; its parameters and running statistics are not touched.
    """
    wanted = {name: state[name].detach().requires_grad_() for name in names}
    logits = functional_call(model, {**state, **wanted, **_spare(model)}, (batch.x,))
    loss = cross_entropy(wide(logits), batch, smoothing)
    return loss.detach(), list(torch.autograd.grad(loss, list(wanted.values())))


def _spare(model: nn.Module) -> State:
    """Copies of the buffers, for a forward to write into."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


class Spread(NamedTuple):
    """Means and biased variances of the units of a layer's input, each (C,) float64."""

    mean: Tensor
    var: Tensor

    def moved(self, to: Spread) -> float:
        """The units' mean |difference of means|, in root mean variances of ``self``.

        One variance for the layer: a unit that is nearly dead has next to none of its own. NaN
        where the input was constant.
        """
        std = self.var.mean().sqrt()
        return ((to.mean - self.mean).abs().mean() / std).item() if std > 0 else math.nan


@torch.no_grad()
def inputs_of(model: nn.Module, layers: list[WeightedLayer], x: Tensor) -> list[Spread]:
    """What each layer but the first is given when ``x`` passes, over examples and positions.

    The first is given the data, which do not move. Norms use the statistics of ``x`` itself, as
    in training, and noise is as it is in training; there is no dropout.
    """
    seen: dict[str, Spread] = {}
    hooks = []
    for layer in layers[1:]:

        def look(module: nn.Module, args: tuple[Tensor, ...], name: str = layer.name) -> None:
            axis = 1 if isinstance(module, _ConvNd) else args[0].ndim - 1
            axes = [a for a in range(args[0].ndim) if a != axis]
            var, mean = torch.var_mean(args[0].double(), axes, correction=0)
            seen[name] = Spread(mean, var)

        hooks.append(layer.module.register_forward_pre_hook(look))
    try:
        with without_dropout(model):
            functional_call(model, _spare(model), (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[layer.name] for layer in layers[1:]]
