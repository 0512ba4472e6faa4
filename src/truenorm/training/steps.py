"""One training step, behind fit and the probes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.data.batches import Batch, chunks, in_batches, shifted
from truenorm.data.datasets import Splits
from truenorm.errors import InputError
from truenorm.training.config import TrainConfig
from truenorm.training.evaluate import wide
from truenorm.training.optimizer import Optimizer, learning_rate


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order and augmentation; torch's own, of dropout, is set alike.

    A function of seed and epoch alone, so that a checkpoint needs no generator's state.
    """
    of_epoch = (seed * 1_000_003 + epoch) % 2**63
    torch.manual_seed(of_epoch)
    return torch.Generator().manual_seed(of_epoch)


def loss_of(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross entropy of ``logits`` (B, K) over the batch, by example weights."""
    if batch.weight is None:
        return F.cross_entropy(logits, batch.y, label_smoothing=smoothing)
    losses = F.cross_entropy(logits, batch.y, label_smoothing=smoothing, reduction="none")
    # A batch may hold only examples of weight zero; it then has no loss.
    return (losses * batch.weight).sum() / batch.weight.sum().clamp_min(1e-12)


class Stepper:
    """A model in training by the steps that :func:`truenorm.fit` takes, to the bit.

    It has no validation, no early stopping and no best epoch: it takes all steps.

    Raises:
        InputError: a setting under which a step is not one batch in float32.
    """

    def __init__(self, model: nn.Module, splits: Splits, config: TrainConfig) -> None:
        for name, plain in (("accumulate", (1,)), ("amp", ("off", "auto"))):
            if getattr(config, name) not in plain:
                raise InputError(
                    f"a probe takes its steps from single batches in float32, got {name}="
                    f"{getattr(config, name)!r}; use {name}={plain[0]!r}."
                )
        self.model, self.splits, self.config = model, splits, config
        self.device = next(model.parameters()).device
        self.optimizer = Optimizer(model, config)
        runs = chunks(torch.arange(len(splits.train)), config.batch_size)
        self.steps = len(runs) * config.epochs

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Number, from 0, and batch of every step, in fit's order."""
        data, config, number = self.splits.train, self.config, 0
        for epoch in range(1, config.epochs + 1):
            order, generator = self.order(epoch)
            for batch in in_batches(
                data, order, config.batch_size, self.splits.scaling, self.device
            ):
                held = batch
                if config.shift and batch.x.ndim == 4:
                    held = batch._replace(x=shifted(batch.x, config.shift, generator))
                yield number, held
                number += 1

    def order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The order of the training examples in ``epoch``, from 1, and what draws after it."""
        generator = seeded(self.config.seed, epoch)
        return torch.randperm(len(self.splits.train), generator=generator), generator

    def update(self, number: int, batch: Batch) -> float:
        """Take step ``number``; the loss before it."""
        self.model.train()
        self.optimizer.zero_grad()
        logits: Tensor = self.model(batch.x)
        loss = loss_of(wide(logits), batch, self.config.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(learning_rate(self.config, number, self.steps))
        return loss.item()
