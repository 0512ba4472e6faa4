"""Adam, AdamW and SGD by torch's fused updates, and which parameters decay.

The arithmetic is torch's own. What is left out is the bookkeeping around it in
``torch.optim`` (hooks, capture checks, grouping, lookups by parameter), which costs a small
network a fifth of each step. The fused updates have no public name; this file is the one
place that calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.errors import InputError
from truenorm.layers.norms import NORMS
from truenorm.training.config import TrainConfig


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
    steps: list[Tensor] = field(init=False)  # one tensor, many times, while all move together

    def __post_init__(self) -> None:
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.steps = [torch.zeros((), device=self.params[0].device)] * len(self.params)


class Optimizer:
    """One update rule over the trainable parameters of a model.

    Attributes:
        lr: the rate of the last step.

    Raises:
        InputError: the model has nothing to train.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise InputError("the model has no parameter with requires_grad; nothing to train.")
        self.rule, self.clip_norm = config.optimizer, config.clip_norm
        self.params = trainable
        self.lr = config.lr
        decay, l1 = config.weight_decay, config.l1
        if not (decay or l1):
            self.groups = [_Group(trainable, 0.0, 0.0)]
            return
        chosen = set(trainable) if config.decay_all else decaying(model)
        parts = (
            ([p for p in trainable if p in chosen], decay, l1),
            ([p for p in trainable if p not in chosen], 0.0, 0.0),
        )
        self.groups = [_Group(*part) for part in parts if part[0]]

    def zero_grad(self) -> None:
        """Drop all gradients; the next backward pass then writes instead of adding."""
        for p in self.params:
            p.grad = None

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient."""
        self.lr = lr
        with torch.no_grad():
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.params, self.clip_norm, foreach=True)
            for group in self.groups:
                self._update(group, lr)

    def _update(self, group: _Group, lr: float) -> None:
        params: list[Tensor] = list(group.params)
        first, second, steps = group.first, group.second, group.steps
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return
        if len(grads) < len(params):
            # What the forward pass did not use has no gradient, and keeps its state.
            steps = group.steps = [s.clone() for s in steps]
            used = [i for i, p in enumerate(params) if p.grad is not None]
            params, first, second, steps = (
                [tensors[i] for i in used] for tensors in (params, first, second, steps)
            )
        for counter in {id(s): s for s in steps}.values():
            counter.add_(1)
        if group.l1:
            torch._foreach_add_(grads, [p.sign() for p in params], alpha=group.l1)
        rate: dict[str, Any] = {"lr": lr, "weight_decay": group.weight_decay, "maximize": False}
        if self.rule == "sgd":
            # Zero momentum is where torch's SGD, whose first step sets it, would start from.
            torch._fused_sgd_(
                params, grads, first,
                momentum=0.9, dampening=0.0, nesterov=True, is_first_step=False, **rate,
            )  # fmt: skip
            return
        update = torch._fused_adam_ if self.rule == "adam" else torch._fused_adamw_
        update(
            params, grads, first, second, [], steps,
            beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, **rate,
        )  # fmt: skip

    def end_epoch(self, valid_loss: float) -> None:
        """Nothing: the rate is the config's, step by step."""

    def state(self) -> list[dict[str, list[Tensor]]]:
        """The live state tensors of each group."""
        names = ("first", "second", "steps")
        return [{name: getattr(group, name) for name in names} for group in self.groups]

    def load(self, state: list[dict[str, list[Tensor]]]) -> None:
        """Take over what :meth:`state` gave, on each parameter's own device."""
        for group, stored in zip(self.groups, state, strict=True):
            for name, tensors in stored.items():
                live = getattr(group, name)
                moved = [t.to(own.device) for t, own in zip(tensors, live, strict=True)]
                setattr(group, name, moved)


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
