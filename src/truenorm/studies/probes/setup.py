"""Training a step at a time, so that a probe can look between the steps."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from truenorm.data.datasets import Batch, Dataset, Splits, chunks, in_batches, shifted
from truenorm.errors import InputError
from truenorm.models import ModelSpec, build
from truenorm.training.config import TrainConfig
from truenorm.training.evaluate import Scores, logits_of, score, wide
from truenorm.training.fit import device_of, loss_of, seeded, threads
from truenorm.training.optimizer import Optimizer, learning_rate

UNDEFINED = Scores(math.nan, math.nan)


@contextlib.contextmanager
def alone(config: TrainConfig) -> Iterator[None]:
    """Run the body on the config's threads; torch's generators are given back after it."""
    device = device_of(config.device)
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), threads(config.threads):
        yield


def built(spec: ModelSpec, config: TrainConfig, splits: Splits) -> nn.Module:
    """The model of ``spec`` with the weights of the config's seed, on its device."""
    model = build(spec, splits.input_shape, len(splits.classes), seed=config.seed)
    return model.to(device_of(config.device))


def scores_of(model: nn.Module, splits: Splits, part: Dataset | None) -> Scores:
    """Scores in eval mode, NaN where there is no such part."""
    if part is None:
        return UNDEFINED
    device = next(model.parameters()).device
    return score(logits_of(model, part, splits.scaling, device), part)


def mean(values: Iterable[float]) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else math.nan


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
