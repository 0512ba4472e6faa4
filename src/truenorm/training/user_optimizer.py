"""A user's own optimizer and scheduler of torch.optim, in the place of the config's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from truenorm.errors import InputError, choose
from truenorm.training.config import TrainConfig
from truenorm.training.optimizer import decaying

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer] | torch.optim.Optimizer
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler] | LRScheduler
Every = Literal["step", "epoch"]


class UserOptimizer:
    """What takes the steps of :class:`truenorm.training.optimizer.Optimizer` by torch.optim.

    Without a scheduler the config's schedule scales the optimizer's own rates.

    Args:
        model: whose parameters are trained.
        config: how to train.
        optimizer: one over the model's parameters, what makes one of them, or None for the
            config's, made by torch.optim.
        scheduler: one over the optimizer, what makes one of it, or None.
        every: whether the scheduler moves with each step or each epoch. ReduceLROnPlateau moves
            with each epoch, by the validation loss.

    Attributes:
        lr: the first group's rate in the last step.

    Raises:
        InputError: there is nothing to train, or these do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
        every: Every = "step",
    ) -> None:
        choose("scheduler_every", every, get_args(Every))
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise InputError("the model has no parameter with requires_grad; nothing to train.")
        self._clip_norm, self._config = config.clip_norm, config
        self._optimizer = _optimizer_of(model, self.params, config, optimizer)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._scheduler = None if scheduler is None else _scheduler_of(self._optimizer, scheduler)
        plateau = isinstance(self._scheduler, ReduceLROnPlateau)
        self._every = "epoch" if plateau else every
        self.lr = float(self._rates[0])

    @property
    def scheduled(self) -> bool:
        """Whether a scheduler of the user's says what the rate is."""
        return self._scheduler is not None

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> None:
        """Update by the optimizer's rates, times the config's ``lr`` of now over its peak."""
        if self._scheduler is None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * (lr / self._config.lr)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.params, self._clip_norm)
        self.lr = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        if self._scheduler is not None and self._every == "step":
            self._scheduler.step()

    def end_epoch(self, valid_loss: float) -> None:
        """Move a scheduler that moves with the epochs."""
        if self._scheduler is None or self._every == "step":
            return
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(valid_loss)
        else:
            self._scheduler.step()

    def state(self) -> dict[str, Any]:
        """The state dicts of both."""
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {"optimizer": self._optimizer.state_dict(), "scheduler": scheduler}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def _optimizer_of(
    model: nn.Module,
    params: list[nn.Parameter],
    config: TrainConfig,
    given: OptimizerFactory | None,
) -> torch.optim.Optimizer:
    if given is None:
        return _of_config(model, params, config)
    for name in ("weight_decay", "l1", "decay_all"):
        if getattr(config, name):
            raise InputError(
                f"{name} is for the config's own optimizer, got {getattr(config, name)!r} and "
                "optimizer=; set it in your optimizer."
            )
    made = given if isinstance(given, torch.optim.Optimizer) else given(params)
    if not isinstance(made, torch.optim.Optimizer) or isinstance(made, torch.optim.LBFGS):
        raise InputError(
            "optimizer= must be a torch.optim.Optimizer whose step needs no closure, or make one "
            f"of a list of parameters, got {type(made).__name__}."
        )
    own = {id(p) for p in model.parameters()}
    if not all(id(p) in own for group in made.param_groups for p in group["params"]):
        raise InputError(
            "optimizer= holds parameters that are not the model's; make it of this model's."
        )
    return made


def _of_config(
    model: nn.Module, params: list[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """The config's optimizer, by the numbers of :mod:`truenorm.training.optimizer`."""
    if config.l1:
        raise InputError(
            f"l1 is for the config's own optimizer and schedule, got {config.l1!r} and scheduler=; "
            "leave one out."
        )
    chosen = set(params) if config.decay_all else decaying(model)
    groups = [
        {"params": [p for p in params if p in chosen], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p not in chosen], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True)
    rule = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return rule(groups, config.lr)


def _scheduler_of(optimizer: torch.optim.Optimizer, given: SchedulerFactory) -> LRScheduler:
    made = given if isinstance(given, LRScheduler) else given(optimizer)
    if not isinstance(made, LRScheduler):
        raise InputError(
            "scheduler= must be a torch.optim.lr_scheduler.LRScheduler, or make one of an "
            f"optimizer, got {type(made).__name__}."
        )
    if made.optimizer is not optimizer:
        raise InputError(
            "scheduler= moves another optimizer than the one that trains; give a function of an "
            "optimizer, like lambda o: StepLR(o, 10)."
        )
    return made
