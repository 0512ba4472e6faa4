"""Detailed records of a ledger, put together so that they can be compared."""

from __future__ import annotations

import statistics
from collections import defaultdict

import torch
from scipy import stats
from torch import Tensor

from truenorm.doctor.ledger.book import Layer, Record
from truenorm.layers.functional import Moments


def comparable(layer: Layer) -> list[Record]:
    """Detailed records of first calls in train mode with their moments, each forward once."""
    return [
        r
        for r in layer.records
        if r.phase == "train" and r.call == 0 and not r.backward and r.mean is not None and r.finite
    ]


def blocks_of(records: list[Record], period: int, *, steps: bool) -> list[list[Record]]:
    """Records of ``period`` steps each, in the order they came; only blocks of the usual make-up.

    Blocks that were not recorded from their beginning to their end are none. Without steps each
    forward stands for one.
    """
    blocks: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        blocks[(record.step if steps else record.forward) // period].append(record)
    by_steps: dict[tuple[int, ...], list[list[Record]]] = defaultdict(list)
    for block in blocks.values():
        key = tuple((r.step if steps else r.forward) % period for r in block)
        by_steps[key].append(block)
    complete = {key: of for key, of in by_steps.items() if len(set(key)) == period}
    return max(complete.values(), key=len, default=[])


def features_of(blocks: list[list[Record]]) -> tuple[Tensor, Tensor] | None:
    """Means in standard deviations, and logarithms of these: each (blocks, parts, channels)."""
    shape = (len(blocks), len(blocks[0]), -1)
    flat = [record for block in blocks for record in block]
    mean = torch.stack([r.mean for r in flat if r.mean is not None]).double().cpu()
    var = torch.stack([r.var for r in flat if r.var is not None]).double().cpu()
    alive = var.amin(0) > 1e-12
    if not bool(alive.any()):
        return None
    mean, var = mean[:, alive], var[:, alive]
    return (mean / var.mean(0).sqrt()).view(shape), (0.5 * var.log()).view(shape)


def odds(feature: Tensor) -> float:
    """Chance that parts of blocks, (blocks, parts, channels), differ as much if they are alike.

    An analysis of variance with blocks, of the median channel, as if there were no other. What
    drifts from block to block, as activations do in training, takes no part in it.
    """
    blocks, parts, _ = feature.shape
    centred = feature - feature.mean(1, keepdim=True)
    effect = centred.mean(0)
    rest = (centred - effect).square().sum((0, 1)) / ((parts - 1) * (blocks - 1))
    ratio = blocks * effect.square().sum(0) / (parts - 1) / rest.clamp(min=1e-30)
    return float(stats.f.sf(float(ratio.median()), parts - 1, (parts - 1) * (blocks - 1)))


def pooled_moments(records: list[Record], *, one: bool) -> Moments:
    """Moments of all, (1, C); the count is what the mean is worth, of one batch or of all."""
    mean = torch.stack([r.mean for r in records if r.mean is not None]).double().cpu()
    var = torch.stack([r.var for r in records if r.var is not None]).double().cpu()
    worths = [r.worth for r in records]
    count = statistics.median(worths) if one else sum(worths)
    return Moments(mean.mean(0, True), var.mean(0, True), mean.new_full((1, 1), count))
