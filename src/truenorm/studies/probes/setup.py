"""What probes begin and end with: threads and generators, the model as built, its scores."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from truenorm.data.datasets import Dataset, Splits
from truenorm.errors import InputError
from truenorm.kernels.ops import use
from truenorm.models import ModelSpec, build
from truenorm.training.config import TrainConfig
from truenorm.training.devices import device_of, threads
from truenorm.training.evaluate import Scores, logits_of, score
from truenorm.training.steps import Stepper

UNDEFINED = Scores(math.nan, math.nan)


@contextlib.contextmanager
def alone(config: TrainConfig) -> Iterator[None]:
    """Run the body on the config's threads and kernels; torch's generators are given back."""
    device = device_of(config.device)
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), threads(config.threads), use(config.kernels):
        yield


def built(spec: ModelSpec, config: TrainConfig, splits: Splits) -> nn.Module:
    """The model of ``spec`` with the weights of the config's seed, on its device."""
    model = build(spec, splits.input_shape, len(splits.classes), seed=config.seed)
    return model.to(device_of(config.device))


def stepper_of(model: nn.Module, splits: Splits, config: TrainConfig) -> Stepper:
    """The steps that fit takes, to the bit, each of one batch in float32.

    Raises:
        InputError: a setting under which a step is not that.
    """
    for name, plain in (("accumulate", (1,)), ("amp", ("off", "auto"))):
        if getattr(config, name) not in plain:
            raise InputError(
                f"a probe takes its steps from single batches in float32, got {name}="
                f"{getattr(config, name)!r}; use {name}={plain[0]!r}."
            )
    return Stepper(model, splits, dataclasses.replace(config, amp="off"))


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
