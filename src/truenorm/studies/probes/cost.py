"""What a norm costs in evaluation, and whether folding takes the cost away."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from truenorm.data.batches import gather
from truenorm.data.datasets import Splits
from truenorm.folding.fold import fold
from truenorm.models import ModelSpec
from truenorm.studies.probes.setup import alone, built, stepper_of
from truenorm.training.config import TrainConfig

BATCHES = (1, 64)
ROUNDS = 15
BLOCK_SECONDS = 0.004  # a block of calls lasts at least this: far above the clock's grain
STEPS = 30  # of training, so that statistics and affine maps are not those of the start


def cost(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """Milliseconds per batch in eval mode, with the norm, without, and with the norm folded.

    For batches of 1 and 64: the median over 15 rounds of ``with_norm_ms_N``, ``none_ms_N`` and
    ``folded_ms_N``. A round runs the three and then the three in reverse, so that a drift falls
    on all alike; a ratio (``norm_over_none_N``, ``folded_over_none_N``, ``folded_over_norm_N``)
    is the median of the rounds' own. Where one thread of a CPU computes, they are its processor
    time, which other programs' work does not lengthen, and ``away`` is the share of the real time
    for which the thread had no processor; else times are real, and it is not known (NaN).
    ``fold_error`` is the largest difference of the folded
    model's outputs, over the largest output. The model has trained for up to 30 steps; only batch
    norms can be folded, with any other norm the folded model is an equal copy.
    """
    with alone(config):
        model = _begun(built(spec, config, splits), splits, config)
        none = built(dataclasses.replace(spec, norm="none"), config, splits).eval()
        device = next(model.parameters()).device
        rows = torch.arange(max(BATCHES)) % len(splits.train)
        x = gather(splits.train, rows, splits.scaling, device).x
        folded = fold(model, x)
        found: dict[str, float] = {"fold_error": folded.error}
        clock = _clock_for(x)
        began, worked = time.perf_counter(), clock()
        for size in BATCHES:
            found |= _timed((model, none, folded.model), x[:size], size, clock)
        share = (clock() - worked) / (time.perf_counter() - began)
    return {**found, "away": math.nan if clock is time.perf_counter else max(0.0, 1 - share)}


def _clock_for(x: Tensor) -> Callable[[], float]:
    """Processor time where it is all of the work, and fine enough; else real time."""
    fine = time.get_clock_info("thread_time").resolution < BLOCK_SECONDS / 1000
    alone_on_cpu = not x.is_cuda and torch.get_num_threads() == 1
    return time.thread_time if fine and alone_on_cpu else time.perf_counter


def _begun(model: nn.Module, splits: Splits, config: TrainConfig) -> nn.Module:
    """``model`` after the first steps of its training, in eval mode."""
    stepper = stepper_of(model, splits, config)
    for number, batches in itertools.islice(stepper.all_steps(), STEPS):
        if not math.isfinite(stepper.update(number, batches)[0]):
            break
    return model.eval()


@torch.inference_mode()
def _timed(
    models: tuple[nn.Module, ...], x: Tensor, size: int, clock: Callable[[], float]
) -> dict[str, float]:
    calls = max(1, math.ceil(BLOCK_SECONDS / min(_seconds(m, x, 3, clock) for m in models)))
    rounds = []
    for _ in range(ROUNDS):
        there = [_seconds(model, x, calls, clock) for model in models]
        back = [_seconds(model, x, calls, clock) for model in reversed(models)]
        rounds.append([(a + b) / 2 for a, b in zip(there, reversed(back), strict=True)])
    norm, none, folded = zip(*rounds, strict=True)
    return {
        f"with_norm_ms_{size}": 1e3 * statistics.median(norm),
        f"none_ms_{size}": 1e3 * statistics.median(none),
        f"folded_ms_{size}": 1e3 * statistics.median(folded),
        f"norm_over_none_{size}": _ratio(norm, none),
        f"folded_over_none_{size}": _ratio(folded, none),
        f"folded_over_norm_{size}": _ratio(folded, norm),
    }


def _ratio(over: tuple[float, ...], under: tuple[float, ...]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _seconds(model: nn.Module, x: Tensor, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (clock() - start) / calls
