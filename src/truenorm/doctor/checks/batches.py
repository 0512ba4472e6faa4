"""TN3xx: batches that cannot give the statistics that a norm wants of them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from truenorm.calling.nested import examples_of
from truenorm.doctor.check import Check, Found, NotApplicable, Severity, batch_norms
from truenorm.doctor.checks.records import (
    blocks_of,
    comparable,
    features_of,
    odds,
    pooled_moments,
)
from truenorm.doctor.facts import Facts, NormFacts, values_per_channel
from truenorm.doctor.ledger.book import Book, Record
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
        spared = options is not None and (options.renorm or (options.min_count or 0) > largest)
        severe = largest < FEW_VALUES and trains and not spared
        cause = "each batch gives a channel so few values that its statistics are noise"
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


TN301 = Check(
    "TN301",
    "Too few values per channel",
    look=few_values,
    looks_at="data",
    advice="Larger batches, sync=True over ranks, renorm, or group norm.",
)


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


def small_batch_counted(book: Book, facts: Facts) -> Iterator[Found]:
    """A batch of very few values, where most have many."""
    for layer in book.called:
        norm = facts.norms.get(layer.name)
        if not layer.sizes or layer.pooled or (norm is not None and synced(norm)):
            continue
        (rows, usual), _ = layer.sizes.most_common(1)[0]
        # As many rows with fewer positions are a small map, not a small batch.
        few = [n for number, n in layer.sizes if number < rows]
        least = min(few, default=usual)
        ours = (layer.module.options.min_count or 0) if layer.ours else 0
        if least < FEW_VALUES and least * 4 <= usual and ours <= least:
            cause = "a batch was too small for statistics and counted as a full one"
            evidence = {"values per channel": least, "in most batches": usual}
            yield Found(layer.name, "warning", cause, evidence)


TN302 = Check(
    "TN302",
    "A last batch of one or very few",
    look=last_batch,
    watched=small_batch_counted,
    looks_at="data",
    advice="drop_last=True, or min_count=2 in truenorm.BatchNorm.",
)


# Accumulated micro-batches below it are noisier than the batch they make up by a sixth or more.
SMALL_MICRO_BATCH = 32
# Means of one batch seen twice differ by less than this share of what those of two batches do.
SAME_DATA = 0.1
# Odds by chance below which the parts of a step are taken to be of different data.
ROLES = 1e-3


def accumulated(book: Book, facts: Facts) -> Iterator[Found]:
    """Several forwards and backwards a step, on micro-batches of one kind."""
    if not book.steps:
        raise NotApplicable("no step of an optimizer was seen")
    for layer in book.called:
        if layer.pooled or layer.accumulated < 2 or layer.accumulated * 2 < layer.steps:
            continue
        records = [r for r in comparable(layer) if r.passes > 1]
        if not _micro_batches(blocks_of(records, 1, steps=True)):
            continue
        (_, usual), _ = layer.sizes.most_common(1)[0]
        severity: Severity = "warning" if usual < SMALL_MICRO_BATCH else "note"
        cause = "each micro-batch is normalized by itself and counts as a batch"
        evidence = {"forwards per step": layer.stepped / layer.steps, "values per channel": usual}
        yield Found(layer.name, severity, cause, evidence)


TN303 = Check(
    "TN303",
    "Gradient accumulation does not enlarge the batch",
    watched=accumulated,
    advice="commit='step' with truenorm.attach pools the statistics of micro-batches.",
)


def _micro_batches(blocks: list[list[Record]]) -> bool:
    """Whether the parts of a step are equally large, and neither the same data nor of two kinds.

    A discriminator is given real images and others; two tasks may be given the same ones.
    """
    if not blocks:
        return False
    sizes = [Counter(r.n for r in part).most_common(1)[0][0] for part in zip(*blocks, strict=True)]
    if any(size != sizes[0] for size in sizes[:-1]) or sizes[-1] > sizes[0]:
        return False
    features = features_of(blocks)
    if len(blocks) < FEWEST_BLOCKS or features is None:
        return True
    if min(odds(feature) for feature in features) < ROLES:
        return False
    means = features[0]
    within = means.var(1).mean(0)
    between = means.mean(1).var(0) * means.shape[1]
    return float((within / between.clamp(min=1e-12)).median()) > SAME_DATA


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


# Odds by chance at which a pattern is believed: with a hundred layers and a dozen patterns in
# each it is wrong in one of a thousand trainings.
TURNS = 1e-6
LONGEST = 6  # steps after which a pattern begins again, at most
MOST_PARTS = 12  # of a pattern
FEWEST_BLOCKS, FEWEST = 6, 16  # patterns, and forwards, that it takes to tell


def in_turns(book: Book, facts: Facts) -> Iterator[Found]:
    """Data of several kinds that take turns, from step to step or within one."""
    found, judged = [], False
    for layer in book.called:
        records = comparable(layer)
        if len(records) < FEWEST:
            continue
        judged = True
        turns = _turns(records, steps=book.steps > 0)
        if turns is not None:
            found.append((turns, layer.name))
    if not judged:
        raise NotApplicable(f"fewer than {FEWEST} forwards in train mode were recorded in detail")
    if found:
        turns, name = max(found, key=lambda row: row[0].size)
        severity: Severity = "warning"
        cause = "batches of several distributions take turns: the moments swing with them"
        if turns.generated:
            severity = "note"
            cause = (
                "a discriminator's real and generated batches differ: its running statistics fit "
                "neither, which matters where it is used in eval mode"
            )
        yield Found(name, severity, cause, turns.evidence | {"layers": len(found)})


TN305 = Check(
    "TN305",
    "Several distributions through one norm",
    look=several_distributions,
    watched=in_turns,
    looks_at="data",
    advice="Shuffle the data, mix the sources in each batch, or give each source a norm.",
)


@dataclass(frozen=True)
class _Turns:
    period: int
    parts: int
    shift: float  # standard deviations
    ratio: float  # of variances
    generated: bool  # some of the parts were made by another network that learns, and some not

    @property
    def size(self) -> float:
        return max(self.shift / CALLS_SHIFT, self.ratio / CALLS_RATIO)

    @property
    def evidence(self) -> dict[str, object]:
        return {
            "shift in standard deviations": self.shift,
            "variances": self.ratio,
            "steps until they come again": self.period,
            "forwards until they come again": self.parts,
        }


def _turns(records: list[Record], *, steps: bool) -> _Turns | None:
    """The shortest pattern whose parts differ, beyond chance and by enough to harm."""
    for period in range(1 if steps else 2, LONGEST + 1):
        for chosen in (records, [r for r in records if r.grad]):
            blocks = blocks_of(chosen, period, steps=steps)
            parts = len(blocks[0]) if blocks else 0
            enough = len(blocks) >= FEWEST_BLOCKS and len(blocks) * parts >= FEWEST
            if not enough or not 1 < parts <= MOST_PARTS:
                continue
            features = features_of(blocks)
            if features is None or min(odds(feature) for feature in features) > TURNS:
                continue
            # Chance is a single batch's: a few batches that come again in the same order differ
            # by it for ever.
            pooled = [pooled_moments(list(part), one=True) for part in zip(*blocks, strict=True)]
            differ, shift, ratio = calls_differ(pooled)
            if differ:
                generated = len({record.generated for record in blocks[-1]}) > 1
                return _Turns(period, parts, shift, ratio, generated)
    return None


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


def several_calls(book: Book, facts: Facts) -> Iterator[Found]:
    """Several calls in one forward."""
    for layer in book.called:
        if not layer.later or not (layer.writes or layer.pooled):
            continue
        calls: dict[int, list[Record]] = defaultdict(list)
        for record in layer.records:
            if record.phase == "train" and record.mean is not None and not record.backward:
                calls[record.call].append(record)
        evidence: dict[str, object] = {
            "calls beyond the first": layer.later,
            "forwards": layer.trained - layer.later,
        }
        differ, cause = False, "each forward moves its statistics once per call"
        if len(calls) > 1:
            pooled = [pooled_moments(records, one=False) for records in calls.values()]
            differ, shift, ratio = calls_differ(pooled)
            evidence |= {"shift in standard deviations": shift, "variances": ratio}
            cause = (
                "its running statistics are an average over calls that differ"
                if differ
                else f"{cause}; the calls are alike"
            )
        yield Found(layer.name, "warning" if differ else "note", cause, evidence)


TN306 = Check(
    "TN306",
    "One norm called several times",
    look=called_again,
    watched=several_calls,
    looks_at="data",
    advice="truenorm.convert(model, to='per-call', example=...) gives each call a norm of its own.",
)


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
