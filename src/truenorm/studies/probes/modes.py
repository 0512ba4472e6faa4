"""A fitted model on the part it learned from, and by batch statistics instead of running ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.data.batches import chunks, gather
from truenorm.data.datasets import Dataset, Splits
from truenorm.models import ModelSpec
from truenorm.studies.probes.setup import UNDEFINED, alone, built, scores_of
from truenorm.training.config import TrainConfig
from truenorm.training.evaluate import Scores, score
from truenorm.training.fit import fit
from truenorm.training.steps import lacks_values

SIZES = (1, 4, 16, 64, 256)
SORTED = 64


def fitted(spec: ModelSpec, config: TrainConfig, splits: Splits) -> nn.Module | None:
    """The model at its best epoch, in eval mode; None where training had none.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    model = built(spec, config, splits)
    history = fit(model, splits, config)
    if history.stopped == "interrupted":
        raise KeyboardInterrupt
    return model if history.best_epoch else None


def train_part(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """How much better a fitted model is on its training part than on the test part.

    All in eval mode (running statistics, no dropout, no augmentation). ``gap_accuracy`` is
    train - test, ``gap_loss`` test - train: both above 0 where the model has overfitted.
    """
    with alone(config):
        model = fitted(spec, config, splits)
        train = test = UNDEFINED
        if model is not None:
            train = scores_of(model, splits, splits.train)
            test = scores_of(model, splits, splits.test)
    return {
        "train_accuracy": train.accuracy,
        "train_loss": train.loss,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "gap_accuracy": train.accuracy - test.accuracy,
        "gap_loss": test.loss - train.loss,
    }


def modes(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """The test figures of one fitted model by running statistics and by batch statistics.

    ``eval_*`` are by running statistics. ``batch_N_*`` are by those of test batches of N, in an
    order shuffled by the seed; NaN where a norm would get a single value per channel, or where
    the test part is smaller than N. ``sorted_*`` are by batches of 64 of one class each. Only batch
    norms are put in train mode: there is no dropout in any figure.
    """
    with alone(config):
        model, test = fitted(spec, config, splits), splits.test
        found = {"eval": UNDEFINED, **{f"batch_{n}": UNDEFINED for n in SIZES}}
        found["sorted"] = UNDEFINED
        if model is not None and test is not None:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(config.seed))
            found["eval"] = scores_of(model, splits, test)
            for size in SIZES:
                if len(test) >= size:
                    found[f"batch_{size}"] = by_batches(model, splits, test, chunks(order, size))
            found["sorted"] = by_batches(model, splits, test, of_one_class(test, order, SORTED))
    return {
        f"{name}_{figure}": getattr(scores, figure)
        for name, scores in found.items()
        for figure in ("accuracy", "loss")
    }


def of_one_class(data: Dataset, order: Tensor, size: int) -> list[Tensor]:
    """The examples of ``order`` (N,) in batches of at most ``size``, each of a single class."""
    classes = (order[data.y[order] == c] for c in range(len(data.classes)))
    return [run for one in classes if len(one) for run in chunks(one, size)]


@torch.no_grad()
def by_batches(
    model: nn.Module, splits: Splits, data: Dataset, batches: Iterable[Tensor]
) -> Scores:
    """Scores over ``batches`` of numbers of examples, each normalized by its own statistics.

    The model is not touched. NaN where batch statistics do not exist.
    """
    own = copy.deepcopy(model).eval()  # its running statistics move, and are thrown away
    for module in own.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    device = next(own.parameters()).device
    logits, numbers = [], []
    try:
        for index in batches:
            logits.append(own(gather(data, index, splits.scaling, device).x).cpu())
            numbers.append(index)
    except ValueError as error:
        if not lacks_values(error):
            raise
        return Scores(math.nan, math.nan)
    return score(torch.cat(logits), data.take(torch.cat(numbers)))
