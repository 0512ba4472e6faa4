"""TN3xx: batches that cannot give the statistics that a norm wants of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from truenorm.calling.nested import examples_of
from truenorm.doctor.check import Found, NotApplicable, batch_norms
from truenorm.doctor.facts import Facts, NormFacts, values_per_channel
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.functional import Moments, joined, pool
from truenorm.layers.ranks import distributed

# The mean of n values is off by 1/sqrt(n) standard deviations: a third at 8. Group Norm's paper
# puts the break at 8 to 16 per device (23.6 % error at 32, 25 % at 8, 34.7 % at 2).
FEW_VALUES = 8
SOME_VALUES = 16


def few_values(facts: Facts) -> Iterator[Found]:
    """Too few values per channel for a usable estimate, with the noise that was measured."""
    for norm in batch_norms(facts):
        if not norm.seen or not facts.moves(norm):
            continue
        largest = max(pooled_values(norm, s.shape) for s in norm.seen)
        if largest >= SOME_VALUES:
            continue
        evidence: dict[str, Any] = {
            "values per channel": largest,
            "expected noise of the mean in standard deviations": 1 / math.sqrt(largest),
        }
        full = [s for s in norm.seen if pooled_values(norm, s.shape) == largest]
        if len(full) > 2:
            means = torch.cat([s.moments.mean for s in full])
            std = torch.cat([s.moments.var for s in full]).mean(0).clamp(min=1e-12).sqrt()
            evidence["measured noise"] = float((means.std(0) / std).median())
        trains = norm.module.training or facts.optimizer is not None
        options = norm.module.options if isinstance(norm.module, BatchNorm) else None
        # Renorm normalizes by the running average, min_count leaves such batches out.
        held = options is not None and (options.renorm or (options.min_count or 0) > largest)
        severe = largest < FEW_VALUES and trains and not held
        cause = "each batch gives a channel so few values that its statistics are noise"
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


def pooled_values(norm: NormFacts, shape: tuple[int, ...]) -> int:
    """Values of a channel that ``norm`` pools in training, over ranks or in a ghost batch."""
    values = values_per_channel(shape)
    if synced(norm):
        return values * dist.get_world_size()
    ghost = norm.module.options.ghost if isinstance(norm.module, BatchNorm) else None
    return values * min(ghost, shape[0]) // shape[0] if ghost and shape[0] else values


def synced(norm: NormFacts) -> bool:
    """Whether it pools over several ranks."""
    if not (distributed() and dist.get_world_size() > 1):
        return False
    module = norm.module
    joint = isinstance(module, BatchNorm) and bool(module.options.sync)
    return joint or isinstance(module, nn.SyncBatchNorm)


def last_batch(facts: Facts) -> Iterator[Found]:
    """A batch that leaves a channel one value, or very few."""
    sizes = [examples_of(batch) for batch in facts.batches]
    last = sizes[-1] if facts.last is None else facts.last
    if len(sizes) < 2:
        raise NotApplicable("a single batch")
    most = max(sizes)
    for norm in batch_norms(facts):
        first = [s for s in norm.seen if s.call == 0]
        if not first or not facts.moves(norm) or synced(norm):
            continue
        usual = max(values_per_channel(s.shape) for s in first)
        least = min(values_per_channel(s.shape) for s in first)
        least = min(least, usual * last // most)
        ours = isinstance(norm.module, BatchNorm) and (norm.module.options.min_count or 0) > least
        if ours or least >= usual:
            continue
        evidence = {"values per channel": least, "in most batches": usual}
        if least == 1:
            cause = "dataset size modulo batch size is one: training raises ValueError there"
            yield Found(norm.name, "error", cause, evidence)
        elif least < FEW_VALUES and least * 4 <= usual:
            cause = "the last batch is too small for statistics, and counts as much as a full one"
            yield Found(norm.name, "warning", cause, evidence)


# Batches of N examples from one distribution differ in their means by (variance between the
# examples' means) / N; the ratio is then about 1, and above 8 in the median channel by chance in
# less than one of 1e4 pairs of batches.
DISTRIBUTIONS = 8.0


def several_distributions(facts: Facts) -> Iterator[Found]:
    """Batches of different distributions pass through one norm in turn."""
    if len(facts.batches) < 4:
        raise NotApplicable("fewer than four batches to compare")
    found = []
    for norm in batch_norms(facts):
        rows = [s for s in norm.seen if s.call == 0 and s.shape[0] >= 4]
        if len(rows) < 4 or not facts.moves(norm):
            continue
        means = torch.cat([s.moments.mean for s in rows])
        within = torch.stack([s.between / s.shape[0] for s in rows]).mean(0)
        alive = within > 1e-12
        if not bool(alive.any()):
            continue
        ratio = float((means.var(0)[alive].cpu() / within[alive]).median())
        if ratio > DISTRIBUTIONS:
            found.append((ratio, norm.name))
    if found:  # one fault of the data, seen first in one layer
        ratio, name = max(found)
        cause = "the batches do not come from one distribution: their means differ far too much"
        evidence = {"variance of batch means over what is expected": ratio, "layers": len(found)}
        yield Found(name, "warning", cause, evidence)


# Half a standard deviation between calls, or a variance of twice the other: the shared running
# statistics then fit neither. Means and variances of n values differ by chance by sqrt(2 / n) and
# 2 / sqrt(n) of that; three times as much is more than chance.
CALLS_SHIFT = 0.5
CALLS_RATIO = 2.0
CHANCE = 3.0


def called_again(facts: Facts) -> Iterator[Found]:
    """One batch norm on several inputs in a forward."""
    for norm in batch_norms(facts):
        calls = sorted({s.call for s in norm.seen})
        if len(calls) < 2 or norm.fixed:
            continue
        each = [pool(joined([s.moments for s in norm.seen if s.call == c])) for c in calls]
        differ, shift, ratio = calls_differ(each)
        warns = differ and facts.moves(norm)
        evidence = {"calls": len(calls), "shift in standard deviations": shift, "variances": ratio}
        cause = "its running statistics are an average over calls that differ"
        if not differ:
            cause = "each forward moves its statistics once per call; the calls are alike"
        yield Found(norm.name, "warning" if warns else "note", cause, evidence)


def calls_differ(calls: list[Moments]) -> tuple[bool, float, float]:
    """Whether the inputs of several calls, each (1, C), are of different distributions.

    Returns:
        that, the shift of the means in standard deviations, and the ratio of the variances; both
        of the median channel, largest over calls.
    """
    mean = torch.cat([m.mean for m in calls]).double()
    var = torch.cat([m.var for m in calls]).double()
    alive = var.mean(0) > 1e-12
    if not bool(alive.any()):
        return False, 0.0, 1.0
    mean, var = mean[:, alive], var[:, alive]
    values = min(float(m.count.min()) for m in calls)
    shift = float(((mean.amax(0) - mean.amin(0)) / var.mean(0).sqrt()).median())
    ratio = float((var.amax(0) / var.amin(0).clamp(min=1e-12)).median())
    chance = CHANCE / math.sqrt(max(values, 1))
    by_mean = shift > max(CALLS_SHIFT, math.sqrt(2) * chance)
    return by_mean or ratio > max(CALLS_RATIO, math.exp(2 * chance)), shift, ratio
