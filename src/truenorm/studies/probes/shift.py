"""Internal covariate shift and smoothness along a training (Santurkar et al. 2018).

"How does batch normalization help optimization?", https://arxiv.org/abs/1805.11604: the shift
is definition 2.1; loss and gradient along the gradient's direction are those of figure 4.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from truenorm.calling.call import Call
from truenorm.data.batches import Batch, gather, in_order
from truenorm.data.datasets import Splits
from truenorm.layers.settling import chosen, settle
from truenorm.models import ModelSpec
from truenorm.studies.probes.layers import (
    Spread,
    State,
    WeightedLayer,
    gradients,
    inputs_of,
    layers_of,
    state_of,
    without_dropout,
)
from truenorm.studies.probes.setup import alone, built, mean, scores_of, stepper_of
from truenorm.training.config import TrainConfig
from truenorm.training.steps import Stepper

MEASURES = 40  # steps that are measured, evenly over the training
LENGTHS = (0.05, 0.1, 0.2, 0.4)  # 1/2, 1, 2 and 4 times the rate of 0.1
SETTLED = 8192  # training examples that the running statistics are taken from at the end
PROBE = 512  # training examples whose way through the layers is followed


class Shift(NamedTuple):
    """How one layer's gradient changes when all before it take their step."""

    relative: float  # ||G - G'|| / ||G||
    absolute: float  # ||G - G'||
    cosine: float  # of G and G'


class Landscape(NamedTuple):
    """What is met along the gradient's direction, over the lengths of step."""

    loss_range: float  # largest loss - smallest
    grad_range: float  # of ||gradient there - gradient here||, largest - smallest
    smoothness: float  # largest ||gradient there - gradient here|| / distance


def shift(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """Train for ``config.epochs`` and measure shift and smoothness at up to 40 steps.

    The measured steps are evenly spaced, from the first. The steps are fit's, by the config's
    optimizer; measures are in train mode, on the step's own batch, and without dropout. Figures
    are means over measured steps, those of layers over all layers but the first:

    - ``shift``, ``shift_abs``, ``shift_cos``: see :func:`shifts`;
    - ``loss_range``, ``grad_range``, ``smoothness``: see :func:`landscape`;
    - ``input_shift``: how far the means of a layer's inputs moved from one measured step to the
      next, see :meth:`truenorm.studies.probes.layers.Spread.moved`, on 512 training examples;
    - ``train_loss``: over the last tenth of steps;
    - ``test_accuracy``: in eval mode at the end, after batch norms were given the exact statistics
      of the first 8,192 training examples: few steps, or noise, leave the tracked ones far off;
    - ``diverged``: 1 where the loss ceased to be finite; all others are then NaN.
    """
    with alone(config):
        stepper = stepper_of(built(spec, config, splits), splits, config)
        steps: list[dict[str, float]] = []
        return watched(stepper, steps) | _means(steps, (*_SHIFTS, *Landscape._fields))


_SHIFTS = {"shift": "relative", "shift_abs": "absolute", "shift_cos": "cosine"}


def watched(stepper: Stepper, steps: list[dict[str, float]] | None = None) -> dict[str, float]:
    """Take all steps of ``stepper`` and measure how layers' inputs move, loss and accuracy.

    The figures of measured steps are appended to ``steps``, if given; it is emptied where the
    loss ceases to be finite.
    """
    model, splits = stepper.model, stepper.splits
    few = torch.arange(min(PROBE, len(splits.train)))
    probe = gather(splits.train, few, splits.scaling, stepper.device).x
    layers = layers_of(model, probe[:2])
    every = max(1, stepper.steps // MEASURES)
    losses: list[float] = []
    spreads: list[list[Spread]] = []
    for number, batches in stepper.all_steps():
        measured = number % every == 0
        if measured:
            spreads.append(inputs_of(model, layers, probe))
        before = state_of(model) if measured and steps is not None else None
        losses.append(stepper.update(number, batches)[0].item())
        if not math.isfinite(losses[-1]):
            if steps is not None:
                steps.clear()
            return dict.fromkeys(("train_loss", "test_accuracy", "input_shift"), math.nan) | {
                "diverged": 1.0
            }
        if before is not None and steps is not None:
            steps.append(_step(stepper, layers, before, batches[0]))
    return {
        "train_loss": mean(losses[-max(1, len(losses) // 10) :]),
        "test_accuracy": _settled_accuracy(model, splits),
        "input_shift": mean(_moves(spreads)),
        "diverged": 0.0,
    }


def _settled_accuracy(model: nn.Module, splits: Splits) -> float:
    """Test accuracy in eval mode, with the exact running statistics of training examples."""
    data = splits.train.take(torch.arange(min(SETTLED, len(splits.train))))
    call = Call(model)
    model.eval()
    settle(call, chosen(model), [b.x for b in in_order(data, splits.scaling, call.device)])
    return scores_of(model, splits, splits.test).accuracy


def _moves(spreads: list[list[Spread]]) -> list[float]:
    pairs = itertools.pairwise(spreads)
    return [a.moved(b) for was, now in pairs for a, b in zip(was, now, strict=True)]


def _step(
    stepper: Stepper, layers: list[WeightedLayer], before: State, batch: Batch
) -> dict[str, float]:
    """All figures of one step, from ``before`` to the model as it is now."""
    model, smoothing = stepper.model, stepper.config.label_smoothing
    with without_dropout(model):
        moved = shifts(model, layers, before, state_of(model), batch, smoothing=smoothing)
        around = landscape(model, before, batch, smoothing=smoothing)
    of_layers = {
        name: mean(getattr(one, field) for one in moved[1:]) for name, field in _SHIFTS.items()
    }
    return of_layers | around._asdict()


def _means(steps: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, float]:
    return {name: mean(step[name] for step in steps) for name in names}


def shifts(
    model: nn.Module,
    layers: list[WeightedLayer],
    before: State,
    after: State,
    batch: Batch,
    *,
    smoothing: float = 0.0,
) -> list[Shift]:
    """Each layer's shift by one step from ``before`` to ``after``, on one batch.

    G is the gradient of the loss for the layer's weights before the step; G' the same once all
    parameters of the modules called before it, norms' included, have taken the step, while it
    and what follows have not (definition 2.1). In the first layer G' is G. Relative and cosine
    are NaN where a gradient is zero.
    """
    names = tuple(name for layer in layers for name in layer.weights)
    _, now = gradients(model, before, batch, names, smoothing)
    here = dict(zip(names, now, strict=True))
    found = []
    for layer in layers:
        mixed = {name: (after if name in layer.before else before)[name] for name in before}
        _, then = gradients(model, mixed, batch, layer.weights, smoothing)
        found.append(_compared(_flat([here[name] for name in layer.weights]), _flat(then)))
    return found


def _compared(g: Tensor, then: Tensor) -> Shift:
    size, other = g.norm(), then.norm()
    distance = (g - then).norm().item()
    if not (size > 0 and other > 0):
        return Shift(math.nan, distance, math.nan)
    return Shift(distance / size.item(), distance, (g @ then / (size * other)).item())


def landscape(model: nn.Module, state: State, batch: Batch, *, smoothing: float = 0.0) -> Landscape:
    """Loss and gradient of one batch at ``state`` - length * gradient, for each of ``LENGTHS``.

    The lengths are the same for every model and optimizer: half to four times the rate of 0.1.
    """
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    _, here = gradients(model, state, batch, names, smoothing)
    losses, changes = [], []
    for length in LENGTHS:
        moved = {n: state[n] - length * g for n, g in zip(names, here, strict=True)}
        loss, there = gradients(model, {**state, **moved}, batch, names, smoothing)
        losses.append(loss.item())
        changes.append((_flat(there) - _flat(here)).norm().item())
    size = _flat(here).norm().item()
    steepest = max(change / length for change, length in zip(changes, LENGTHS, strict=True))
    return Landscape(
        max(losses) - min(losses),
        max(changes) - min(changes),
        steepest / size if size > 0 else math.nan,
    )


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).double()
