"""How far a layer's running statistics are from exact ones, beyond what the data leave open.

Per channel, the square of the shift of the mean in standard deviations and of the logarithm of the
ratio of variances, added: 1 is a mean off by one deviation, or a variance off by e.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from truenorm.doctor.check import Severity
from truenorm.doctor.facts import NormFacts

Statistics = tuple[Tensor, Tensor]

# The mean over channels from which on it is told: variances off by 2, or means by 0.7
# deviations. Of 17 architectures after 150 steps, at a rate of 0.003 to 0.05, the running averages
# of two lagged so far behind, of one for its momentum of 0.01; settled ones are below 0.45.
TOLD = 0.5
# Of more than half of the channels: variances off by 8, or means by two deviations.
SEVERE = 4.3
MOST = 2.0  # what one channel counts at most: few rare ones do not make up for all
# Squared, how many standard errors are no chance, in a channel and in the mean over all of them.
BEYOND = 9.0
LEAST_EXAMPLES = 16  # of fewer two halves do not show how far examples differ
DEAD = 1e-4  # of the median channel's variance; below it a channel is constant in these data


@dataclass(frozen=True)
class Misfit:
    """How far the statistics of one layer are off.

    Attributes:
        size: the mean over channels, of each at most :data:`MOST`, where it is beyond chance.
        severity: "error", "warning", or None where it is not told.
    """

    size: float
    severity: Severity | None


def misfit_of(
    norm: NormFacts, running: Statistics, halves: tuple[Statistics, Statistics], examples: int
) -> Misfit:
    """The misfit of ``running`` to the exact statistics of two halves of the data, each (C,).

    Args:
        norm: the layer, with what it was seen to get.
        running: its own statistics.
        halves: those of either half.
        examples: in both halves together.
    """
    (mean, var), (others_mean, others_var) = (_wide(half) for half in halves)
    exact_mean, exact_var = (mean + others_mean) / 2, (var + others_var) / 2
    own_mean, own_var = _wide(running)
    scale = (exact_var + own_var) / 2 + norm.eps
    ratio = ((exact_var + norm.eps) / (own_var + norm.eps)).log()
    apart = (exact_mean - own_mean).square() / scale + ratio.square()
    ratio = ((var + norm.eps) / (others_var + norm.eps)).log()
    open_ = ((mean - others_mean).square() / scale + ratio.square()) / 4
    open_ = torch.maximum(open_, _of_examples(norm).to(scale) / scale)
    alive = exact_var > DEAD * exact_var.median()
    counted = alive & (apart > BEYOND * open_)
    size = float(torch.where(counted, apart.clamp(max=MOST), 0).mean())
    if examples < LEAST_EXAMPLES or size < TOLD:
        return Misfit(size, None)
    if not apart[alive].mean() > BEYOND * open_[alive].mean():
        return Misfit(size, None)
    most = float((counted & (apart > SEVERE)).double().mean())
    return Misfit(size, "error" if most > 0.5 else "warning")


def _of_examples(norm: NormFacts) -> Tensor:
    """Squared standard error of the mean, (C,): examples differ, their positions hardly add."""
    rows = sum(seen.shape[0] for seen in norm.seen)
    return torch.stack([seen.between for seen in norm.seen]).mean(0) / rows


def _wide(statistics: Statistics) -> Statistics:
    mean, var = (statistic.double() for statistic in statistics)
    return mean, var.clamp(min=0)
