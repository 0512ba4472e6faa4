"""The one training step, behind fit and the probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.calling.call import Loss, model_device
from truenorm.data.batches import Batch
from truenorm.data.datasets import Splits
from truenorm.errors import InputError
from truenorm.layers.batch_norm import ONE_VALUE
from truenorm.layers.transaction import transactional
from truenorm.training.config import TrainConfig
from truenorm.training.devices import has_fast_bf16
from truenorm.training.evaluate import (
    AnyBatch,
    autocast,
    class_logits,
    logits_in,
    own_loss,
    share_of,
    wide,
)
from truenorm.training.feed import Feed, Given, InMemory
from truenorm.training.optimizer import Optimizer, learning_rate
from truenorm.training.user_optimizer import UserOptimizer


def cross_entropy(logits: Tensor, batch: AnyBatch, smoothing: float) -> Tensor:
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
        data: of which the training part is used.
        config: how to train.
        optimizer: by default the config's.
        loss: of the model's output, as it is, and the targets; by default what the output holds
            as its loss, or else cross entropy.

    Attributes:
        per_epoch: the number of steps of one epoch; 0 where its batches cannot be counted.
        steps: that of all of the config's epochs.
        amp: whether a step's forward runs under bf16 autocast.

    Raises:
        InputError: the model has nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Splits | Feed,
        config: TrainConfig,
        *,
        optimizer: UserOptimizer | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.model, self.config, self.loss = model, config, loss
        self.optimizer = Optimizer(model, config) if optimizer is None else optimizer
        self.device = model_device(model)
        self.feed = InMemory(data, config, self.device) if isinstance(data, Splits) else data
        self.amp = config.amp == "bf16" or (config.amp == "auto" and has_fast_bf16(self.device))
        batches = self.feed.batches
        self.per_epoch = math.ceil((batches or 0) / config.accumulate)
        self.steps = self.per_epoch * config.epochs
        scheduled = optimizer is not None and optimizer.scheduled
        if batches is None and config.schedule != "constant" and not scheduled:
            raise InputError(
                f"schedule {config.schedule!r} needs the number of steps, and the loader has no "
                "length; use schedule='constant', or give scheduler=."
            )
        # In a model in eval mode nothing was frozen: it was only evaluated before.
        self._frozen = [m for m in model.modules() if not m.training] if model.training else []
        self._transactional = transactional(model)

    @property
    def splits(self) -> Splits:
        """The data, where they are in memory."""
        return self._in_memory().splits

    def order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The order of the training examples in ``epoch``, from 1, and what draws after it."""
        return self._in_memory().order(epoch)

    def _in_memory(self) -> InMemory:
        assert isinstance(self.feed, InMemory), "only fit takes a user's own loaders"
        return self.feed

    def all_steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Number and batches of every step of every epoch, where the data are in memory."""
        self._in_memory()
        for epoch in range(1, self.config.epochs + 1):
            yield from cast(Iterator[tuple[int, list[Batch]]], self.steps_of(epoch))

    def steps_of(self, epoch: int) -> Iterator[tuple[int, list[AnyBatch]]]:
        """Number, from 0 over all epochs, and batches of every step of ``epoch``, from 1.

        The model is put in train mode at its beginning.
        """
        self.model.train()
        for module in self._frozen:
            module.eval()
        batches = self.feed.epoch(epoch)
        numbers = itertools.count((epoch - 1) * self.per_epoch)
        while together := list(itertools.islice(batches, self.config.accumulate)):
            yield next(numbers), together

    def update(self, number: int, batches: Sequence[AnyBatch]) -> tuple[Tensor, float]:
        """Take step ``number`` from ``batches`` together.

        Returns:
            The loss before it, without gradient, and its weight in an epoch's mean.

        Raises:
            LoneValues: a batch gives a batch norm one value per channel.
        """
        shares = [share_of(batch) for batch in batches]
        total = sum(shares)
        self.optimizer.zero_grad()
        parts = []
        for batch, share in zip(batches, shares, strict=True):
            loss = self._loss(batch)
            if len(batches) > 1:
                loss = loss * (share / total if total else 0.0)
            loss.backward()  # type: ignore[no-untyped-call]
            parts.append(loss.detach())
        # A loader may give more batches than its length says.
        self.optimizer.step(learning_rate(self.config, min(number, self.steps), self.steps or 1))
        for layer in self._transactional:
            layer.commit()
        return (parts[0] if len(parts) == 1 else torch.stack(parts).sum()), total

    def _loss(self, batch: AnyBatch) -> Tensor:
        try:
            with autocast(self.device, self.amp):
                output = batch.run(self.model)
                own = own_loss(output, batch, self.loss)
        except ValueError as error:
            if lacks_values(error):
                raise LoneValues(str(error), batch.examples) from error
            raise
        if own is not None:
            return own
        smoothing = self.config.label_smoothing
        if isinstance(batch, Given):  # nobody has looked at its targets before
            logits = class_logits(output, batch)
            return cross_entropy(logits, batch._replace(y=batch.y.long()), smoothing)
        return cross_entropy(wide(logits_in(output)), batch, smoothing)
