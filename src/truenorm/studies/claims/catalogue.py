"""The claims made for batch norm, each a small paired study with a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from truenorm.models import ModelSpec
from truenorm.studies.claims.claim import (
    AS_GOOD,
    DOUBLE,
    POINT,
    TENTH,
    WORSE,
    Arm,
    Claim,
    Lab,
    Part,
    Plot,
    SeedScores,
    StudySize,
)
from truenorm.studies.paired import Decision
from truenorm.studies.trial import Row
from truenorm.training.config import TrainConfig

# What the studies share ----------------------------------------------------------------------

WIDTHS = {
    "mlp": (100, 100, 100),  # Ioffe and Szegedy's own for MNIST
    "convnet": (8, 16),
    "resnet": (8, 16),
    "transformer": (32, 32),
}
BATCH = 60
BUSY = 0.2  # share of the time that others have a processor; on an idle machine it is below 0.05

Points = list[tuple[float | str, SeedScores]]  # of a series: a value of the axis and its scores
PartsAndPlot = tuple[list[Part], Plot]

_IS = "Ioffe and Szegedy 2015"
_ONE = "1 point of accuracy: less would change nobody's choice."
_HALF = "half a point of accuracy, about the size of published gains from a choice of norm."


def _arm(
    label: str,
    size: StudySize,
    *,
    probe: str = "",
    spec: dict[str, Any] | None = None,
    **config: Any,
) -> Arm:
    """The arm whose norm is the first word of its label."""
    norm = label.split(",", maxsplit=1)[0].split(" ", maxsplit=1)[0]
    model = {"name": "mlp", "norm": norm, **(spec or {})}
    model.setdefault("widths", WIDTHS[model["name"]])
    training = {
        "batch_size": BATCH,
        "lr": 0.003,
        "patience": size.epochs,
        "min_delta": 0.0,
        "device": "cpu",
        **config,
        "epochs": size.epochs,
    }
    return Arm(label, ModelSpec(**model), TrainConfig(**training), probe)


def _part(a: str, b: str, scores: Mapping[str, SeedScores], margin: float, **how: Any) -> Part:
    """The comparison of two labels of ``scores``."""
    return Part(a, b, scores[a], scores[b], margin, **how)


def _accuracy(rows: Sequence[Row]) -> SeedScores:
    return [math.nan if r.test_accuracy is None else r.test_accuracy for r in rows]


def _accuracies(lab: Lab, arms: Sequence[Arm], size: StudySize) -> dict[str, SeedScores]:
    """Run the arms, and return each one's test accuracies."""
    return {label: _accuracy(rows) for label, rows in lab.run(arms, size).items()}


def _figure(rows: Sequence[Row], name: str) -> SeedScores:
    return [r.figures.get(name, math.nan) for r in rows]


def _log2(values: SeedScores) -> SeedScores:
    return [math.log2(v) if v > 0 else math.nan for v in values]


def _bars(title: str, groups: Mapping[str, SeedScores]) -> Plot:
    return Plot(title, "", {"": list(groups.items())})


# How training goes ---------------------------------------------------------------------------


def faster(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Steps to 98 % of the plain network's best validation accuracy."""
    arms = [_arm(n, size, optimizer="sgd") for n in ("batch", "none")]
    rows = lab.run(lab.tuned(arms, size, size.values), size)
    steps: dict[str, SeedScores] = {"batch": [], "none": []}
    for batch, none in zip(rows["batch"], rows["none"], strict=True):
        goal = 0.98 * max((accuracy for _, accuracy, _ in none.curve), default=math.nan)
        for row in (batch, none):
            steps[row.variant].append(math.log2(_crossing(row, goal, size.epochs)))
    part = _part(
        "batch",
        "none",
        steps,
        DOUBLE / 2,
        higher_is_better=False,
        unit="doublings of steps",
        factor=1,
    )
    curves: dict[str, Points] = {
        n: [(e + 1, [r.curve[e][1] for r in rs if len(r.curve) > e]) for e in range(size.epochs)]
        for n, rs in rows.items()
    }
    return [part], Plot("Validation accuracy", "epoch", curves)


def _crossing(row: Row, goal: float, most: int) -> float:
    """Epochs to the goal, linear between epochs; as many as there were if it was not reached."""
    before = 0.0
    for epoch, (_, accuracy, _) in enumerate(row.curve):
        if accuracy >= goal:
            gained = accuracy - before
            return epoch + (goal - before) / gained if gained > 0 else float(epoch + 1)
        before = accuracy
    return float(most)


FASTER = Claim(
    "faster",
    "Batch norm makes training faster.",
    f"{_IS}: the accuracy of Inception in 14 times fewer steps.",
    "mlp of 3 x 100 units, SGD, each at its own tuned rate; steps to 98 % of the plain "
    "network's best validation accuracy; never reached counts as all steps.",
    "half a doubling of steps: less is lost in the choice of the rate.",
    StudySize(12, 6000, 12, (0.003, 0.01, 0.03, 0.1, 0.3)),
    StudySize(8, 1000, 10, (0.01, 0.03, 0.1)),
    faster,
)


def higher_rate(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Largest rate with validation accuracy within 2 points of the arm's best, by seed."""
    parts: list[Part] = []
    series: dict[str, Points] = {}
    for optimizer, least in (("sgd", 1.0), ("adam", 0.1)):
        rates = [least * v for v in size.values]
        names = batch, none = f"batch, {optimizer}", f"none, {optimizer}"
        arms = [
            _arm(f"{name}, {r:g}", size, optimizer=optimizer, lr=r) for name in names for r in rates
        ]
        rows = lab.run(arms, size)
        tops: dict[str, SeedScores] = {}
        for name in names:
            reached = [_undiverged(rows[f"{name}, {rate:g}"]) for rate in rates]
            tops[name] = [
                math.log2(max(r for r, v in zip(rates, own, strict=True) if v >= max(own) - 0.02))
                for own in zip(*reached, strict=True)
            ]
            series[name] = list(zip(rates, reached, strict=True))
        parts.append(_part(batch, none, tops, DOUBLE, unit="doublings of rate", factor=1))
    return parts, Plot("Validation accuracy", "learning rate", series, log=True)


def _undiverged(rows: Sequence[Row]) -> SeedScores:
    """Validation accuracies; zero where training diverged."""
    return [0.0 if r.diverged else r.valid_accuracy or 0.0 for r in rows]


_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HIGHER_RATE = Claim(
    "higher-rate",
    "Batch norm allows much higher learning rates.",
    f"{_IS}: BN-x30 trains at 30 times Inception's rate.",
    "mlp of 3 x 100 units; largest rate within 2 points of the best validation accuracy; SGD "
    "and Adam (whose rates are a tenth).",
    "a factor of two: half a step of usual grids.",
    StudySize(12, 3000, 4, _GRID),
    StudySize(8, 1000, 3, _GRID),
    higher_rate,
)


def regularizes(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Gap of accuracy between training and test part, and dropout's replacement."""
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "alone": ({}, {}),
        "dropout": ({"dropout": 0.3}, {}),
        "weight decay": ({}, {"weight_decay": 1e-3}),
        "L1": ({}, {"l1": 1e-4}),
    }
    arms = [
        _arm(f"{n}, {way}", size, probe="train_part", spec=spec, **config)
        for way, (spec, config) in ways.items()
        for n in ("batch", "none")
    ]
    rows = lab.run(arms, size)
    gaps = {label: _figure(rs, "gap_accuracy") for label, rs in rows.items()}
    less = {"higher_is_better": False, "unit": "points of gap"}
    parts = [_part(f"batch, {way}", f"none, {way}", gaps, POINT / 2, **less) for way in ways]
    alone, dropout = "batch, alone (test)", "none, dropout (test)"
    tested = {
        alone: _accuracy(rows["batch, alone"]),
        dropout: _accuracy(rows["none, dropout"]),
    }
    parts.append(_part(alone, dropout, tested, POINT, expects=AS_GOOD))
    return parts, _bars("Accuracy on the training part - test part", gaps)


REGULARIZES = Claim(
    "regularizes",
    "Batch norm regularizes, and makes dropout unnecessary.",
    f"{_IS}: dropout removed, and L2 regularization reduced by a factor of 5.",
    "mlp of 3 x 100 units on few examples, best epoch by validation loss; "
    "training minus test accuracy.",
    "half a point of gap; for dropout's replacement 1 point of accuracy.",
    StudySize(12, 2000, 20),
    StudySize(10, 1000, 10),
    regularizes,
)


def init(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Spread of test accuracy over scales of the initial weights."""
    norms = ("batch", "none")
    arms = [_arm(f"{n}, {s:g}", size, spec={"init_scale": s}) for n in norms for s in size.values]
    scores = _accuracies(lab, arms, size)
    spreads: dict[str, SeedScores] = {}
    series: dict[str, Points] = {}
    for n in norms:
        reached = [scores[f"{n}, {s:g}"] for s in size.values]
        spreads[n] = [max(own) - min(own) for own in zip(*reached, strict=True)]
        series[n] = list(zip(size.values, reached, strict=True))
    unit = "points of spread over scales"
    part = _part("batch", "none", spreads, POINT, higher_is_better=False, unit=unit)
    return [part], Plot("Test accuracy", "factor of the initial weights", series, log=True)


INIT = Claim(
    "init",
    "With batch norm the initial weights' scale matters less.",
    f"{_IS}: less careful about initialization; no number is given.",
    "mlp of 3 x 100 units, Adam; range of test accuracy over the scales.",
    _ONE,
    StudySize(12, 3000, 5, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    StudySize(8, 1000, 4, (0.01, 0.1, 1.0, 10.0)),
    init,
)


# Batches, and the norm's place ---------------------------------------------------------------


def small_batch(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Batch against group norm, batch size by batch size, at rates of sqrt(size)."""
    sizes = [int(v) for v in size.values]
    norms, convnet = ("batch", "group"), {"name": "convnet"}
    arms = [
        _arm(f"{n}, {b}", size, spec=convnet, batch_size=b, lr=0.01 * math.sqrt(b / 64))
        for n in norms
        for b in sizes
    ]
    scores = _accuracies(lab, arms, size)
    asked: dict[int, tuple[Decision, ...]] = {2: WORSE, 16: WORSE, 32: AS_GOOD}
    parts = [
        _part(f"batch, {b}", f"group, {b}", scores, POINT, expects=expects)
        for b, expects in asked.items()
        if b in sizes
    ]
    series: dict[str, Points] = {n: [(b, scores[f"{n}, {b}"]) for b in sizes] for n in norms}
    means = {label: float(np.nanmean(values)) for label, values in scores.items()}
    behind = [f"{b}: {100 * (means[f'batch, {b}'] - means[f'group, {b}']):+.1f}" for b in sizes]
    note = f"Mean difference batch - group in points, by batch size: {', '.join(behind)}."
    return parts, Plot("Test accuracy", "batch size", series, log=True, note=note)


SMALL_BATCH = Claim(
    "small-batch",
    "Batch norm breaks at small batches: 16 is too few, 32 is enough.",
    "Wu and He 2018: error of ResNet-50 at 2 images a worker 34.7 %, of group norm 24.1 %.",
    "convnet of 8 and 16 channels, Adam at a rate of sqrt(batch); beside group norm.",
    _ONE,
    StudySize(12, 3000, 4, (2, 4, 8, 16, 32, 64, 128, 256)),
    StudySize(8, 1200, 3, (2, 16, 32, 256)),
    small_batch,
    needs_images=True,
)


def alternatives(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Layer, group and renorm at batches of 4; ghost, which needs large ones, at 256."""
    small, large = ("batch", "layer", "group", "renorm"), ("batch", "ghost")
    arms = [
        _arm(f"{n}, {b}", size, spec={"name": "convnet"}, batch_size=b, lr=lr)
        for norms, b, lr in ((small, 4, 0.0025), (large, 256, 0.02))
        for n in norms
    ]
    scores = _accuracies(lab, arms, size)
    others = [("layer", 4), ("group", 4), ("renorm", 4), ("ghost", 256)]
    parts = [_part(f"{n}, {b}", f"batch, {b}", scores, POINT / 2) for n, b in others]
    return parts, _bars("Test accuracy", scores)


ALTERNATIVES = Claim(
    "alternatives",
    "At small batches other norms beat batch norm, and ghost norm at large.",
    "Wu and He 2018: at 2 images a worker group norm has 10.6 points less error.",
    "convnet of 8 and 16 channels; layer, group, renorm at 4; ghost (of 16) at 256.",
    _HALF,
    StudySize(12, 3000, 4),
    StudySize(8, 1200, 3),
    alternatives,
    needs_images=True,
)


def position(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Before against after the activation."""
    models = ("mlp", "convnet")
    arms = [
        _arm(f"batch {p}, {m}", size, spec={"name": m, "norm_position": p})
        for m in models
        for p in ("before", "after")
    ]
    scores = _accuracies(lab, arms, size)
    parts = [_part(f"batch before, {m}", f"batch after, {m}", scores, POINT / 2) for m in models]
    return parts, _bars("Test accuracy", scores)


POSITION = Claim(
    "position",
    "Batch norm belongs before the activation.",
    "ducha-aiki's caffenet-benchmark (ImageNet, 128 pixels, with scale and bias): before "
    "47.8 %, after 49.3 %.",
    "mlp of 3 x 100 units and convnet of 8 and 16 channels, Adam.",
    _HALF,
    StudySize(12, 6000, 5),
    StudySize(8, 1000, 3),
    position,
    needs_images=True,
)


# Inference, and learning online --------------------------------------------------------------


def inference_cost(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Milliseconds in eval mode: norm, none, folded."""
    models = ("mlp", "convnet")
    arms = [_arm(f"batch, {m}", size, probe="cost", spec={"name": m}) for m in models]
    rows = lab.run(arms, size, alone=True)
    times = {
        f"{kind}, {m}, {n}": _log2(_figure(rows[f"batch, {m}"], f"{kind}_ms_{n}"))
        for m in models
        for n in (1, 64)
        for kind in ("with_norm", "none", "folded")
    }
    as_fast: dict[str, Any] = {
        "expects": AS_GOOD,
        "higher_is_better": False,
        "unit": "doublings of time",
        "factor": 1,
    }
    parts = [
        _part(f"folded, {m}, {n}", f"none, {m}, {n}", times, TENTH, **as_fast)
        for m in models
        for n in (1, 64)
    ]
    shown = {label: [2**v for v in values] for label, values in times.items()}
    away = [r.figures.get("away", math.nan) for of_arm in rows.values() for r in of_arm]
    plot = _bars("Milliseconds a batch", shown)
    return parts, dataclasses.replace(plot, note=how_busy(away))


def how_busy(away: Sequence[float]) -> str:
    """What other programs' work does to times, where it was there."""
    known = [share for share in away if not math.isnan(share)]
    most = max(known, default=0.0)
    if most < BUSY:
        return ""
    return (
        f"The machine was busy: for up to {most:.0%} of a run other programs had the processor. "
        "Times are this program's own, but caches and clock rates are shared: run it again on an "
        "idle machine before you quote it."
    )


INFERENCE_COST = Claim(
    "inference-cost",
    "Folded, batch norm costs nothing at inference.",
    "No number that we are sure of; folding removes the operation, so that 1.0 is expected.",
    "mlp and convnet, eval mode, one thread, one run at a time, batches of 1 and 64.",
    "a tenth of the time: what machines vary by.",
    StudySize(12, 1000, 1),
    StudySize(8, 600, 1),
    inference_cost,
    needs_images=True,
)


def online(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Learning from a stream, one example at a time; divergence counts as chance."""
    probes = {
        "batch": "online",
        "layer": "online",
        "none": "online",
        "batch, running": "online_running",
    }
    arms = [
        _arm(label, size, probe=probe, spec={"name": "convnet"}, lr=0.001)
        for label, probe in probes.items()
    ]
    scores = {
        label: [
            r.figures.get("online_accuracy", 1 / lab.classes if r.diverged else math.nan)
            for r in rows
        ]
        for label, rows in lab.run(arms, size).items()
    }
    parts = [_part("batch", n, scores, POINT, expects=WORSE) for n in ("layer", "none")]
    return parts, _bars("Accuracy over the stream's second half", scores)


ONLINE = Claim(
    "online",
    "Batch norm cannot learn online, from batches of one.",
    "Ioffe 2017 and Wu and He 2018 name it as a limit; no number is given.",
    "convnet of 8 and 16 channels, one pass of steps of one example, each predicted first.",
    _ONE,
    StudySize(12, 3000, 1),
    StudySize(8, 800, 1),
    online,
    needs_images=True,
)


# Architectures -------------------------------------------------------------------------------


def cnn(lab: Lab, size: StudySize) -> PartsAndPlot:
    """A residual network with batch norm and without, each at its own rate."""
    arms = [_arm(n, size, spec={"name": "resnet"}) for n in ("batch", "none")]
    scores = _accuracies(lab, lab.tuned(arms, size, size.values), size)
    return [_part("batch", "none", scores, POINT / 2)], _bars("Test accuracy", scores)


CNN = Claim(
    "cnn",
    "A residual network is better with batch norm.",
    f"{_IS}: 73.0 % after 2.1 million steps (BN-x5), Inception 72.2 % after 31.0 million.",
    "resnet of 8 and 16 channels, Adam, each at its own tuned rate.",
    _HALF,
    StudySize(12, 3000, 5, (0.001, 0.003, 0.01, 0.03), tuning=1),
    StudySize(8, 1000, 3, (0.003, 0.01, 0.03)),
    cnn,
    needs_images=True,
)


def transformer(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Batch against layer norm, each at its own rate."""
    arms = [_arm(n, size, spec={"name": "transformer"}) for n in ("batch", "layer")]
    scores = _accuracies(lab, lab.tuned(arms, size, size.values), size)
    part = _part("batch", "layer", scores, POINT, expects=WORSE)
    return [part], _bars("Test accuracy", scores)


TRANSFORMER = Claim(
    "transformer",
    "In a transformer batch norm is worse than layer norm.",
    "Shen et al. 2020 (PowerNorm) report a significant loss in translation; BERT itself uses "
    "layer norm.",
    "two blocks of width 32, Adam, each norm at its own tuned rate.",
    _ONE,
    StudySize(12, 6000, 6, (0.001, 0.003, 0.01), tuning=1),
    StudySize(8, 1000, 4, (0.003, 0.01)),
    transformer,
)


# Why, and how well it is measured ------------------------------------------------------------


def covariate_shift(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Is the shift smaller, and does adding it back hurt?"""
    probes = {"batch": "shift", "none": "shift", "batch, noisy": "noisy"}
    arms = [_arm(label, size, probe=p, optimizer="sgd", lr=0.03) for label, p in probes.items()]
    rows = lab.run(arms, size)
    shifts = {n: _figure(rows[n], "shift") for n in ("batch", "none")}
    less: dict[str, Any] = {
        "higher_is_better": False,
        "unit": "doublings of shift",
        "factor": 1,
    }
    logs = {n: _log2(values) for n, values in shifts.items()}
    accuracies = {n: _accuracy(rows[n]) for n in ("batch, noisy", "batch")}
    parts = [
        _part("batch", "none", logs, TENTH, **less),
        _part("batch, noisy", "batch", accuracies, POINT, expects=WORSE),
    ]
    title = "Relative change of a layer's gradient by the layers before it"
    return parts, _bars(title, shifts)


COVARIATE_SHIFT = Claim(
    "covariate-shift",
    "Batch norm helps because it reduces internal covariate shift.",
    "Santurkar et al. 2018: the shift is not reduced; adding it back by noise does not hurt.",
    "mlp of 3 x 100 units, SGD at 0.03; gradient's relative change, their definition 2.1.",
    "a tenth of the shift; 1 point of accuracy.",
    StudySize(12, 3000, 4),
    StudySize(8, 1000, 2),
    covariate_shift,
)


def train_eval(lab: Lab, size: StudySize) -> PartsAndPlot:
    """Running against batch statistics after few steps, at two momenta."""
    arms = [
        _arm(f"batch, momentum {m:g}", size, probe="modes", spec={"norm_momentum": m})
        for m in size.values
    ]
    parts: list[Part] = []
    scores: dict[str, SeedScores] = {}
    for label, rows in lab.run(arms, size).items():
        running, own = f"{label}, running", f"{label}, batches of 64"
        scores[running] = _figure(rows, "eval_accuracy")
        scores[own] = _figure(rows, "batch_64_accuracy")
        parts.append(_part(running, own, scores, POINT, expects=WORSE))
    return parts, _bars("Test accuracy", scores)


TRAIN_EVAL = Claim(
    "train-eval",
    "After few steps batch norm is worse by running than by batch statistics.",
    "Ioffe 2017 names the difference of the two modes; no number is given.",
    "mlp of 3 x 100 units, Adam, one epoch; momentum (weight of the new value) 0.1 and 0.01.",
    _ONE,
    StudySize(12, 3000, 1, (0.1, 0.01)),
    StudySize(8, 1000, 1, (0.1, 0.01)),
    train_eval,
)


CLAIMS = {
    claim.name: claim
    for claim in (
        FASTER,
        HIGHER_RATE,
        REGULARIZES,
        INIT,
        SMALL_BATCH,
        ALTERNATIVES,
        POSITION,
        INFERENCE_COST,
        ONLINE,
        CNN,
        TRANSFORMER,
        COVARIATE_SHIFT,
        TRAIN_EVAL,
    )
}
