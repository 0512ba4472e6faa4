"""TN108: running statistics beyond what the weights give: a suspicion, where there are no data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from truenorm.doctor.check import Check, Found, NotApplicable, tracking
from truenorm.doctor.facts import Distance, Distances, Facts, NormFacts

# Inputs of variance 1 that do not depend on each other leave a unit with a variance of the sum of
# its squared weights. Trained layers lie around that: docs/doctor/TN108.md has the ranges.
FACTOR = 3000.0
FACTOR_OF_MOST = 300.0  # the median layer of a model varies less
LEAST_LAYERS = 3  # of which a median says something
# In MobileNetV2 trained on ImageNet one layer's median channel has a mean 24 deviations out, for
# its input has channels that are all but constant; in all other layers it is below 4.
DEVIATIONS = 100.0
# Dead channels have next to no variance. Whether variances are too small is asked of the tenth with
# the largest ratios, whether means are far out of the quarter that is least so.
LIVE, NEAREST = 0.9, 0.25
SMALLEST_MOMENTUM = 0.001  # in use; where a file does not say, initial values weigh longest with it
# Of images, which may come in 0 to 255. Convolutions of groups as narrow stand in models severally.
COLOURS, SEVERALLY = 4, 3


def out_of_proportion(facts: Facts) -> Iterator[Found]:
    """Variances that no weight beside the layer explains, and means many deviations out."""
    if facts.batches:
        raise NotApplicable("with data TN103 measures what this check can only suspect")
    weights = _Weights(facts.model)
    # What data as they come are like is in no tensor.
    judged = [n for n in tracking(facts) if _has_values(n) and n is not facts.batch_norms[0]]
    judged = [norm for norm in judged if not weights.takes_data(norm)]
    if not judged:
        raise NotApplicable("no batch norm with running statistics is behind another layer's")
    ratios = {norm: weights.ratio(norm) for norm in judged}
    known = sorted(ratio.middle for ratio in ratios.values() if ratio is not None)
    middle = known[len(known) // 2] if len(known) >= LEAST_LAYERS else 1.0
    most = not 1 / FACTOR_OF_MOST <= middle <= FACTOR_OF_MOST
    limit = FACTOR_OF_MOST if most else FACTOR
    layers = [
        Distance(norm.name, ratio.beyond(limit) or ratio.middle, _deviations(norm))
        for norm, ratio in ratios.items()
        if ratio is not None
    ]
    facts.distances = Distances("likely", "TN108", tuple(layers), limit, DEVIATIONS)
    for norm, ratio in ratios.items():
        causes, evidence = [], dict[str, Any]()
        times = None if ratio is None else ratio.beyond(limit)
        if times is not None:
            evidence["running variance over what weights give"] = times
            told = f"{times:.2g} times" if times > 1 else f"1/{1 / times:.2g} of"
            causes.append(f"running_var is {told} what the weights beside it give")
        away = _deviations(norm)
        if away > DEVIATIONS:
            evidence["running mean in running deviations"] = away
            causes.append(f"running_mean is {away:.2g} running deviations out")
        if causes:
            cause = f"a suspicion, for there are no data: {' and '.join(causes)}"
            yield Found(norm.name, "warning", cause, evidence)


TN108 = Check(
    "TN108",
    "Running statistics out of proportion",
    look=out_of_proportion,
    advice="To be sure, examine it with data: TN103 then measures it. If it is so, load an older "
    "checkpoint, or run truenorm.recalibrate(model, data).",
)


def _has_values(norm: NormFacts) -> bool:
    """Whether its statistics are a training's, and finite."""
    mean, var, _ = norm.tracked  # type: ignore[misc]
    finite = bool(torch.isfinite(mean).all()) and bool(torch.isfinite(var).all())
    return finite and len(var) > 0 and not norm.untouched and bool((var >= 0).all())


def _deviations(norm: NormFacts) -> float:
    """How many running deviations the running means are out, of the channels near to 0."""
    mean, var, _ = norm.tracked  # type: ignore[misc]
    away = mean.detach().double().abs() / (var.detach().double() + norm.eps).sqrt()
    return float(away.quantile(NEAREST))


def _initial_share(norm: NormFacts) -> float:
    """The weight that the variance of 1, which a constructor leaves, may still have."""
    batches = norm.tracked[2]  # type: ignore[index]
    if batches <= 0:  # not counted: files of torch before 0.4.1
        return 0.0
    momentum = SMALLEST_MOMENTUM if norm.momentum is None else norm.momentum
    return (1 - min(max(momentum, 0.0), 1.0)) ** batches


@dataclass(frozen=True)
class _Ratio:
    """A layer's running variance over what the likeliest of the weights beside it gives.

    Attributes:
        middle: of the median channel.
        live: of the channels with the largest ratios.
    """

    middle: float
    live: float

    def beyond(self, factor: float) -> float | None:
        """The ratio that is more than ``factor`` away from 1, if one is."""
        if self.middle > factor:
            return self.middle
        return self.live if self.live < 1 / factor else None


class _Weights:
    """The weights of a model, and which of them stand beside a norm.

    A checkpoint tells no order and no wiring. So all weights with as many units as the norm has
    channels count that are in its own module, or else in the nearest that holds any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [
            (name.split("."), p.detach())
            for name, p in model.named_parameters()
            if not is_lazy(p) and p.ndim >= 2 and p.is_floating_point()
        ]
        self._units = {p.shape[0] for _, p in self._weights}
        self._narrow = Counter(p.shape[1] for _, p in self._weights)

    def _beside(self, norm: NormFacts) -> list[tuple[Tensor, int]]:
        """Each weight as a matrix with a row for each channel, and the width of its input."""
        assert norm.tracked is not None
        channels, path = len(norm.tracked[0]), norm.name.split(".")
        for depth in reversed(range(len(path))):
            found = [
                (p.transpose(0, axis).reshape(channels, -1), p.shape[1 - axis])
                for name, p in self._weights
                if name[:depth] == path[:depth]
                for axis in (0, 1)  # of transposed convolutions units are the second
                if p.shape[axis] == channels and (axis == 0 or p.ndim > 2)
            ]
            if found:
                return found
        return []

    def takes_data(self, norm: NormFacts) -> bool:
        """Whether all weights beside it may work on the data as they come."""
        beside = self._beside(norm)
        assert norm.tracked is not None
        return bool(beside) and not any(
            self._takes_features(width, len(norm.tracked[0])) for _, width in beside
        )

    def _takes_features(self, width: int, channels: int) -> bool:
        """Whether an input of this width comes from another layer of the model."""
        if width in self._units and width > COLOURS:
            return True
        if any(width % units == 0 for units in self._units if units > COLOURS):
            return True  # maps that were flattened
        grouped = channels % width == 0 and width < channels
        return grouped and self._narrow[width] >= (SEVERALLY if width <= COLOURS else 2)

    def ratio(self, norm: NormFacts) -> _Ratio | None:
        """By the weight that explains the variance best; None if there is no weight."""
        assert norm.tracked is not None
        var = norm.tracked[1].detach().double() + norm.eps
        ratios = []
        for weight, _ in self._beside(norm):
            given = weight.double().square().sum(1) + norm.eps
            for expected in (given, given + _initial_share(norm)):
                ratio = var / expected
                ratios.append(_Ratio(float(ratio.median()), float(ratio.quantile(LIVE))))
        return min(ratios, key=lambda r: _distance(r.middle, r.live), default=None)


def _distance(middle: float, live: float) -> float:
    """From 1, as a logarithm: of what is too large, or too small."""
    return max(math.log(middle), -math.log(live), 0.0)
