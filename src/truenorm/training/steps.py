"""The one training step, behind fit and the probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.calling.call import model_device
from truenorm.data.batches import Batch, chunks, in_batches, shifted
from truenorm.data.datasets import Splits
from truenorm.layers.batch_norm import ONE_VALUE
from truenorm.layers.transaction import transactional
from truenorm.training.config import TrainConfig
from truenorm.training.devices import has_fast_bf16
from truenorm.training.evaluate import autocast, wide
from truenorm.training.optimizer import Optimizer, learning_rate


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order and augmentation; torch's own, of dropout, is set alike.

    A function of seed and epoch alone, so that a checkpoint needs no generator's state.
    """
    of_epoch = (seed * 1_000_003 + epoch) % 2**63
    torch.manual_seed(of_epoch)
    return torch.Generator().manual_seed(of_epoch)


def cross_entropy(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross entropy of ``logits`` (B, K) over the batch, by example weights."""
    if batch.weight is None:
        return F.cross_entropy(logits, batch.y, label_smoothing=smoothing)
    losses = F.cross_entropy(logits, batch.y, label_smoothing=smoothing, reduction="none")
    # A batch may hold only examples of weight zero; it then has no loss.
    return (losses * batch.weight).sum() / batch.weight.sum().clamp_min(1e-12)


def lacks_values(error: ValueError) -> bool:
    """Whether a batch norm raised it because a channel had one value; torch has no own class."""
    return ONE_VALUE in str(error)


class LoneValues(ValueError):
    """A batch norm met channels with one value; ``examples`` are those of its batch."""

    def __init__(self, text: str, examples: int) -> None:
        super().__init__(text)
        self.examples = examples


class Stepper:
    """A model in training, a step at a time.

    Submodules that are in eval mode inside a model in train mode were frozen on purpose and stay
    so. There is no validation, no early stopping and no best epoch here.

    Args:
        model: any module, on the device where it is to be trained.
        splits: data, of which the training part is used.
        config: how to train.

    Attributes:
        per_epoch: the number of steps of one epoch.
        steps: that of all of the config's epochs.
        amp: whether a step's forward runs under bf16 autocast.

    Raises:
        InputError: the model has nothing to train.
    """

    def __init__(self, model: nn.Module, splits: Splits, config: TrainConfig) -> None:
        self.model, self.splits, self.config = model, splits, config
        self.optimizer = Optimizer(model, config)
        self.device = model_device(model)
        self.amp = config.amp == "bf16" or (config.amp == "auto" and has_fast_bf16(self.device))
        batches = len(chunks(torch.arange(len(splits.train)), config.batch_size))
        self.per_epoch = math.ceil(batches / config.accumulate)
        self.steps = self.per_epoch * config.epochs
        # In a model in eval mode nothing was frozen: it was only evaluated before.
        self._frozen = [m for m in model.modules() if not m.training] if model.training else []
        self._transactional = transactional(model)

    def all_steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Number and batches of every step of every epoch."""
        for epoch in range(1, self.config.epochs + 1):
            yield from self.steps_of(epoch)

    def steps_of(self, epoch: int) -> Iterator[tuple[int, list[Batch]]]:
        """Number, from 0 over all epochs, and batches of every step of ``epoch``, from 1.

        The model is put in train mode at its beginning.
        """
        self.model.train()
        for module in self._frozen:
            module.eval()
        config, splits = self.config, self.splits
        order, generator = self.order(epoch)
        batches = in_batches(splits.train, order, config.batch_size, splits.scaling, self.device)
        if config.shift and len(splits.input_shape) == 3:
            batches = (b._replace(x=shifted(b.x, config.shift, generator)) for b in batches)
        first = (epoch - 1) * self.per_epoch
        for number in range(first, first + self.per_epoch):
            yield number, list(itertools.islice(batches, config.accumulate))

    def order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The order of the training examples in ``epoch``, from 1, and what draws after it."""
        generator = seeded(self.config.seed, epoch)
        return torch.randperm(len(self.splits.train), generator=generator), generator

    def update(self, number: int, batches: list[Batch]) -> tuple[Tensor, float]:
        """Take step ``number`` from ``batches`` together.

        Returns:
            The loss before it, without gradient, and its weight in an epoch's mean.

        Raises:
            LoneValues: a batch gives a batch norm one value per channel.
        """
        shares = [len(b.y) if b.weight is None else float(b.weight.sum()) for b in batches]
        total = sum(shares)
        self.optimizer.zero_grad()
        parts = []
        for batch, share in zip(batches, shares, strict=True):
            loss = self._loss(batch)
            if len(batches) > 1:
                loss = loss * (share / total if total else 0.0)
            loss.backward()  # type: ignore[no-untyped-call]
            parts.append(loss.detach())
        self.optimizer.step(learning_rate(self.config, number, self.steps))
        for layer in self._transactional:
            layer.commit()
        return (parts[0] if len(parts) == 1 else torch.stack(parts).sum()), total

    def _loss(self, batch: Batch) -> Tensor:
        try:
            with autocast(self.device, self.amp):
                logits = self.model(batch.x)
        except ValueError as error:
            if lacks_values(error):
                raise LoneValues(str(error), len(batch.y)) from error
            raise
        return cross_entropy(wide(logits), batch, self.config.label_smoothing)
