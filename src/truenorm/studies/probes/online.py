"""Learning from a stream: one example at a time, each predicted before it is learned from."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from truenorm.calling.borrowing import evaluating
from truenorm.data.datasets import Splits
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.conversion import convert
from truenorm.models import ModelSpec
from truenorm.studies.probes.setup import UNDEFINED, alone, built, scores_of, stepper_of
from truenorm.training.config import TrainConfig
from truenorm.training.evaluate import score, wide
from truenorm.training.steps import Stepper, lacks_values

WINDOW = 32  # examples that move the running statistics as far as one batch does otherwise


def online(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """One pass over the training part in the seed's order, a step for each example.

    Each example is predicted in eval mode, then learned from in train mode (prequential).
    Batch norm normalizes by the one example's own positions; of a vector it has a single value,
    which it refuses: then ``undefined`` is 1 and the rest NaN. ``config.epochs`` and
    ``batch_size`` are not used.

    ``online_accuracy`` and ``online_loss`` are over the second half of the stream,
    ``test_accuracy`` is in eval mode at its end. Where the loss ceases to be finite,
    ``diverged`` is 1 and these are NaN.
    """
    with alone(config):
        return _online(built(spec, config, splits), splits, config)


def online_running(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """:func:`online` with batch norms that normalize by running statistics while they train.

    They are :class:`truenorm.BatchNorm` with a ``min_count`` of 32 times their positions, so
    that each example moves the running statistics by about a 32nd of what a batch does. Their
    gradient does not pass through the statistics. Other norms run as in :func:`online`.
    """
    with alone(config):
        model = built(spec, config, splits)
        by_running_statistics(model, splits)
        return _online(model, splits, config)


def by_running_statistics(model: nn.Module, splits: Splits) -> None:
    """Make batch norms of ``model`` such as train on one example by running statistics."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return  # nothing to convert, which convert would warn of
    convert(model, to="truenorm")
    positions: dict[BatchNorm, int] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BatchNorm)
        positions[layer] = args[0][0, 0].numel()

    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    scores_of(model, splits, splits.train.take(torch.arange(1)))
    for hook in hooks:
        hook.remove()
    for layer, count in positions.items():
        layer.min_count = max(2, WINDOW * count)


def stream(stepper: Stepper) -> Tensor:
    """The logits (N, K) of each example before it was learned from; fewer where training broke."""
    logits = []
    for number, batches in stepper.all_steps():
        with torch.no_grad(), evaluating(stepper.model):
            logits.append(wide(stepper.model(batches[0].x)).cpu())
        if not math.isfinite(stepper.update(number, batches)[0]):
            return torch.cat(logits[:-1]) if number else logits[0][:0]
    return torch.cat(logits)


def _online(model: nn.Module, splits: Splits, config: TrainConfig) -> dict[str, float]:
    stepper = stepper_of(model, splits, dataclasses.replace(config, batch_size=1, epochs=1))
    streamed = test = UNDEFINED
    diverged = undefined = 0.0
    try:
        logits = stream(stepper)
    except ValueError as error:
        if not lacks_values(error):
            raise
        undefined = 1.0
    else:
        diverged = float(len(logits) < stepper.steps)
    if not (diverged or undefined):
        order, _ = stepper.order(1)
        half = stepper.steps // 2
        streamed = score(logits[half:], splits.train.take(order[half:]))
        test = scores_of(model, splits, splits.test)
    return {
        "online_accuracy": streamed.accuracy,
        "online_loss": streamed.loss,
        "test_accuracy": test.accuracy,
        "diverged": diverged,
        "undefined": undefined,
    }
