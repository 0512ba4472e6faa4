"""Adam, AdamW and SGD through torch's functional forms, and which parameters decay.

The update is torch's own. What is left out is the bookkeeping of ``Optimizer.step`` (hooks,
capture checks, lookups by parameter), which costs a small network a fifth of each step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from truenorm.config import TrainConfig
from truenorm.errors import InputError
from truenorm.layers import NORMS

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices whose fused update torch has


def decaying(model: nn.Module) -> set[Tensor]:
    """The parameters that weight decay is meant for: no bias and nothing of a normalization.

    Decay pulls gamma towards zero, and so the layer's whole output, without making the
    function simpler; a bias does not overfit either.
    """
    of_norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
    return {p for p in model.parameters() if p.ndim > 1 and p not in of_norms}


@dataclass
class _Group:
    """Parameters that share their decay, with the state the update keeps for each."""

    params: list[nn.Parameter]
    weight_decay: float
    l1: float
    first: list[Tensor] = field(init=False)  # Adam's first moment, SGD's momentum
    second: list[Tensor] = field(init=False)  # Adam's second moment
    steps: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.steps = [torch.zeros((), device=p.device) for p in self.params]


class Optimizer:
    """One update rule over the trainable parameters of a model.

    Raises:
        InputError: the model has nothing to train.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise InputError("the model has no parameter with requires_grad; nothing to train.")
        self.rule, self.clip_norm = config.optimizer, config.clip_norm
        self.params = trainable
        self.fused = True if all(p.device.type in _FUSED for p in trainable) else None
        decay, l1 = config.weight_decay, config.l1
        if not (decay or l1):
            self.groups = [_Group(trainable, 0.0, 0.0)]
            return
        chosen = set(trainable) if config.decay_all else decaying(model)
        parts = ([p for p in trainable if p in chosen], [p for p in trainable if p not in chosen])
        groups = (_Group(parts[0], decay, l1), _Group(parts[1], 0.0, 0.0))
        self.groups = [g for g in groups if g.params]

    def zero_grad(self) -> None:
        """Drop all gradients; the next backward pass then writes instead of adding."""
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.params, self.clip_norm, foreach=True)
        for group in self.groups:
            self._update(group, lr)

    def _update(self, group: _Group, lr: float) -> None:
        # A parameter the forward pass did not use has no gradient, and keeps its state.
        used = [i for i, p in enumerate(group.params) if p.grad is not None]
        if not used:
            return
        params, first, second, steps = (
            held if len(used) == len(held) else [held[i] for i in used]
            for held in (group.params, group.first, group.second, group.steps)
        )
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[union-attr, misc]
        if group.l1:
            torch._foreach_add_(grads, [p.sign() for p in params], alpha=group.l1)
        rate: dict[str, Any] = {"lr": lr, "weight_decay": group.weight_decay, "maximize": False}
        if self.rule == "sgd":
            torch._foreach_add_(steps, 1)
            # Fused SGD cannot start from no momentum; zeros give the same first step.
            sgd(params, grads, first, fused=self.fused, momentum=0.9, dampening=0.0,
                nesterov=True, **rate)  # fmt: skip
            return
        update = adam if self.rule == "adam" else adamw
        update(params, grads, first, second, [], steps, fused=self.fused, amsgrad=False,
               beta1=0.9, beta2=0.999, eps=1e-8, **rate)  # fmt: skip

    def state(self) -> dict[str, list[Tensor]]:
        """The live state tensors, in a fixed order."""
        return {
            name: [t for group in self.groups for t in getattr(group, name)]
            for name in ("first", "second", "steps")
        }

    @torch.no_grad()
    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Copy back what :meth:`state` gave."""
        for name, held in self.state().items():
            for mine, stored in zip(held, state[name], strict=True):
                mine.copy_(stored)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``.

    constant: lr. cosine: lr * (1 + cos(pi t)) / 2 with t = step / steps. onecycle: from a
    tenth of lr up to lr in the first ``warmup`` part, then in a straight line to zero
    (after Smith and Topin 2017, https://arxiv.org/abs/1708.07120).
    """
    done = step / steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if done < config.warmup:
        return config.lr * (0.1 + 0.9 * done / config.warmup)
    return config.lr * (1 - done) / (1 - config.warmup)
