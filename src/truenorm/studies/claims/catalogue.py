"""The claims made for batch norm, each a small paired study with a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from truenorm.models import ModelSpec
from truenorm.studies.claims.claim import (
    AS_GOOD,
    BETTER,
    DOUBLE,
    POINT,
    TENTH,
    WORSE,
    Arm,
    Claim,
    Lab,
    Part,
    Plot,
    Scores,
    Size,
)
from truenorm.studies.paired import Decision
from truenorm.studies.trial import Row
from truenorm.training.config import TrainConfig

# -- the studies ----------------------------------------------------------------------------------

MLP = (100, 100, 100)  # Ioffe and Szegedy's own for MNIST
CNN = (8, 16)
BATCH = 60


def _arm(
    label: str, size: Size, *, probe: str = "", spec: dict[str, Any] | None = None, **config: Any
) -> Arm:
    norm = label.split(",", maxsplit=1)[0].split(" ", maxsplit=1)[0]
    asked = {"name": "mlp", "norm": norm, **(spec or {})}
    widths = {"mlp": MLP, "convnet": CNN, "resnet": CNN, "transformer": (32, 32)}
    asked.setdefault("widths", widths[asked["name"]])
    told = {
        "batch_size": BATCH,
        "lr": 0.003,
        "patience": size.epochs,
        "min_delta": 0.0,
        "device": "cpu",
        **config,
        "epochs": size.epochs,
    }
    return Arm(label, ModelSpec(**asked), TrainConfig(**told), probe)


def _accuracy(rows: Sequence[Row]) -> Scores:
    return [math.nan if r.test_accuracy is None else r.test_accuracy for r in rows]


def _figure(rows: Sequence[Row], name: str) -> Scores:
    return [r.figures.get(name, math.nan) for r in rows]


def _log2(values: Scores) -> Scores:
    return [math.log2(v) if v > 0 else math.nan for v in values]


def _bars(title: str, groups: Mapping[str, Scores]) -> Plot:
    return Plot(title, "", {"": list(groups.items())})


def faster(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Steps to 98 % of the plain network's best validation accuracy."""
    arms = [_arm(n, size, optimizer="sgd") for n in ("batch", "none")]
    rows = lab.run(lab.tuned(arms, size, size.values), size)
    ways: dict[str, Scores] = {"batch": [], "none": []}
    for batch, none in zip(rows["batch"], rows["none"], strict=True):
        goal = 0.98 * max((accuracy for _, accuracy, _ in none.curve), default=math.nan)
        for row in (batch, none):
            ways[row.variant].append(math.log2(_crossing(row, goal, size.epochs)))
    part = Part(
        "batch",
        "none",
        ways["batch"],
        ways["none"],
        DOUBLE / 2,
        BETTER,
        False,
        "doublings of steps",
        1,
    )
    curves: dict[str, list[tuple[float | str, Scores]]] = {
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


def higher_rate(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Largest rate with validation accuracy within 2 points of the arm's best, by seed."""
    parts, series = [], {}
    for optimizer, least in (("sgd", 1.0), ("adam", 0.1)):
        rates = [least * v for v in size.values]
        arms = [_arm(f"{n}, {optimizer}, {r:g}", size, optimizer=optimizer, lr=r)
                for n in ("batch", "none") for r in rates]  # fmt: skip
        rows = lab.run(arms, size)
        tops: dict[str, Scores] = {}
        for n in ("batch", "none"):
            reached = [
                [
                    0.0 if r.diverged else r.valid_accuracy or 0.0
                    for r in rows[f"{n}, {optimizer}, {rate:g}"]
                ]
                for rate in rates
            ]
            tops[n] = [
                math.log2(max(r for r, v in zip(rates, own, strict=True) if v >= max(own) - 0.02))
                for own in zip(*reached, strict=True)
            ]
            series[f"{n}, {optimizer}"] = list(zip(rates, reached, strict=True))
        parts.append(
            Part(
                f"batch, {optimizer}",
                f"none, {optimizer}",
                tops["batch"],
                tops["none"],
                DOUBLE,
                unit="doublings of rate",
                factor=1,
            )
        )
    return parts, Plot("Validation accuracy", "learning rate", series, True)  # type: ignore[arg-type]


def regularizes(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Gap of accuracy between training and test part, and dropout's replacement."""
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "alone": ({}, {}),
        "dropout": ({"dropout": 0.3}, {}),
        "weight decay": ({}, {"weight_decay": 1e-3}),
        "L1": ({}, {"l1": 1e-4}),
    }
    arms = [_arm(f"{n}, {w}", size, probe="train_part", spec=s, **c)
            for w, (s, c) in ways.items() for n in ("batch", "none")]  # fmt: skip
    rows = lab.run(arms, size)
    gaps = {label: _figure(rs, "gap_accuracy") for label, rs in rows.items()}
    parts = [Part(f"batch, {w}", f"none, {w}", gaps[f"batch, {w}"], gaps[f"none, {w}"], POINT / 2,
                  BETTER, False, "points of gap") for w in ways]  # fmt: skip
    parts.append(
        Part(
            "batch, alone (test)",
            "none, dropout (test)",
            _accuracy(rows["batch, alone"]),
            _accuracy(rows["none, dropout"]),
            POINT,
            AS_GOOD,
        )
    )
    return parts, _bars("Accuracy on the training part - test part", gaps)


def init(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Spread of test accuracy over scales of the initial weights."""
    arms = [_arm(f"{n}, {s:g}", size, spec={"init_scale": s})
            for n in ("batch", "none") for s in size.values]  # fmt: skip
    rows = lab.run(arms, size)
    spreads, series = {}, {}
    for n in ("batch", "none"):
        reached = [_accuracy(rows[f"{n}, {s:g}"]) for s in size.values]
        spreads[n] = [max(own) - min(own) for own in zip(*reached, strict=True)]
        series[n] = list(zip(size.values, reached, strict=True))
    part = Part(
        "batch",
        "none",
        spreads["batch"],
        spreads["none"],
        POINT,
        BETTER,
        False,
        "points of spread over scales",
    )
    return [part], Plot("Test accuracy", "factor of the initial weights", series, True)  # type: ignore[arg-type]


def small_batch(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Batch against group norm, batch size by batch size, at rates of sqrt(size)."""
    sizes = [int(v) for v in size.values]
    arms = [_arm(f"{n}, {b}", size, spec={"name": "convnet"}, batch_size=b,
                 lr=0.01 * math.sqrt(b / 64))
            for n in ("batch", "group") for b in sizes]  # fmt: skip
    scores = {label: _accuracy(rs) for label, rs in lab.run(arms, size).items()}
    asked: dict[int, tuple[Decision, ...]] = {2: WORSE, 16: WORSE, 32: AS_GOOD}
    parts = [Part(f"batch, {b}", f"group, {b}", scores[f"batch, {b}"], scores[f"group, {b}"],
                  POINT, expects) for b, expects in asked.items() if b in sizes]  # fmt: skip
    series: dict[str, list[tuple[float | str, Scores]]] = {
        n: [(b, scores[f"{n}, {b}"]) for b in sizes] for n in ("batch", "group")
    }
    behind = {b: float(np.nanmean(scores[f"batch, {b}"]) - np.nanmean(scores[f"group, {b}"]))
              for b in sizes}  # fmt: skip
    told = ", ".join(f"{b}: {100 * d:+.1f}" for b, d in behind.items())
    note = f"Mean difference batch - group in points, by batch size: {told}."
    return parts, Plot("Test accuracy", "batch size", series, True, note)


def alternatives(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Layer, group and renorm at batches of 4; ghost, which needs large ones, at 256."""
    small, large = ("batch", "layer", "group", "renorm"), ("batch", "ghost")
    arms = [_arm(f"{n}, {b}", size, spec={"name": "convnet"}, batch_size=b, lr=lr)
            for ns, b, lr in ((small, 4, 0.0025), (large, 256, 0.02)) for n in ns]  # fmt: skip
    scores = {label: _accuracy(rs) for label, rs in lab.run(arms, size).items()}
    others = [("layer", 4), ("group", 4), ("renorm", 4), ("ghost", 256)]
    parts = [Part(f"{n}, {b}", f"batch, {b}", scores[f"{n}, {b}"], scores[f"batch, {b}"], POINT / 2)
             for n, b in others]  # fmt: skip
    return parts, _bars("Test accuracy", scores)


def position(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Before against after the activation."""
    arms = [_arm(f"batch {p}, {m}", size, spec={"name": m, "norm_position": p})
            for m in ("mlp", "convnet") for p in ("before", "after")]  # fmt: skip
    scores = {label: _accuracy(rs) for label, rs in lab.run(arms, size).items()}
    parts = [Part(f"batch before, {m}", f"batch after, {m}", scores[f"batch before, {m}"],
                  scores[f"batch after, {m}"], POINT / 2) for m in ("mlp", "convnet")]  # fmt: skip
    return parts, _bars("Test accuracy", scores)


def inference_cost(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Milliseconds in eval mode: norm, none, folded."""
    models = ("mlp", "convnet")
    rows = lab.run(
        [_arm(f"batch, {m}", size, probe="cost", spec={"name": m}) for m in models],
        size,
        alone=True,
    )
    parts: list[Part] = []
    shown: dict[str, Scores] = {}
    for m in models:
        for n in (1, 64):
            times = {k: _log2(_figure(rows[f"batch, {m}"], f"{k}_ms_{n}"))
                     for k in ("with_norm", "none", "folded")}  # fmt: skip
            shown |= {f"{k}, {m}, {n}": [2**v for v in t] for k, t in times.items()}
            parts.append(
                Part(
                    f"folded, {m}, {n}",
                    f"none, {m}, {n}",
                    times["folded"],
                    times["none"],
                    TENTH,
                    AS_GOOD,
                    False,
                    "doublings of time",
                    1,
                )
            )
    return parts, _bars("Milliseconds a batch", shown)


def online(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Learning from a stream, one example at a time; divergence counts as chance."""
    asked = {
        "batch": "online",
        "layer": "online",
        "none": "online",
        "batch, running": "online_running",
    }
    arms = [_arm(label, size, probe=probe, spec={"name": "convnet"}, lr=0.001)
            for label, probe in asked.items()]  # fmt: skip
    scores = {
        label: [
            r.figures.get("online_accuracy", 1 / lab.classes if r.diverged else math.nan)
            for r in rs
        ]
        for label, rs in lab.run(arms, size).items()
    }
    parts = [Part("batch", n, scores["batch"], scores[n], POINT, WORSE) for n in ("layer", "none")]
    return parts, _bars("Accuracy over the stream's second half", scores)


def cnn(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """A residual network with batch norm and without, each at its own rate."""
    arms = [_arm(n, size, spec={"name": "resnet"}) for n in ("batch", "none")]
    scores = {k: _accuracy(v) for k, v in lab.run(lab.tuned(arms, size, size.values), size).items()}
    return [Part("batch", "none", scores["batch"], scores["none"], POINT / 2)], _bars(
        "Test accuracy", scores
    )


def transformer(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Batch against layer norm, each at its own rate."""
    arms = [_arm(n, size, spec={"name": "transformer"}) for n in ("batch", "layer")]
    scores = {k: _accuracy(v) for k, v in lab.run(lab.tuned(arms, size, size.values), size).items()}
    return [Part("batch", "layer", scores["batch"], scores["layer"], POINT, WORSE)], _bars(
        "Test accuracy", scores
    )


def covariate_shift(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Is the shift smaller, and does adding it back hurt?"""
    asked = {"batch": "shift", "none": "shift", "batch, noisy": "noisy"}
    arms = [_arm(label, size, probe=p, optimizer="sgd", lr=0.03) for label, p in asked.items()]
    rows = lab.run(arms, size)
    moved = {n: _log2(_figure(rows[n], "shift")) for n in ("batch", "none")}
    return [
        Part("batch", "none", moved["batch"], moved["none"], TENTH, BETTER, False,
             "doublings of shift", 1),
        Part("batch, noisy", "batch", _accuracy(rows["batch, noisy"]), _accuracy(rows["batch"]),
             POINT, WORSE),
    ], _bars("Relative change of a layer's gradient by the layers before it",
             {n: _figure(rows[n], "shift") for n in moved})  # fmt: skip


def train_eval(lab: Lab, size: Size) -> tuple[list[Part], Plot]:
    """Running against batch statistics after few steps, at two momenta."""
    arms = [_arm(f"batch, momentum {m:g}", size, probe="modes", spec={"norm_momentum": m})
            for m in size.values]  # fmt: skip
    parts: list[Part] = []
    shown: dict[str, Scores] = {}
    for label, rs in lab.run(arms, size).items():
        run, own = _figure(rs, "eval_accuracy"), _figure(rs, "batch_64_accuracy")
        shown |= {f"{label}, running": run, f"{label}, batches of 64": own}
        parts.append(Part(f"{label}, running", f"{label}, batches of 64", run, own, POINT, WORSE))
    return parts, _bars("Test accuracy", shown)


_IS = "Ioffe and Szegedy 2015"
_ONE = "1 point of accuracy: less would change nobody's choice."
_HALF = "half a point of accuracy, about the size of published gains from a choice of norm."
_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_CLAIMS = (
    Claim("faster", "Batch norm makes training faster.",
          f"{_IS}: the accuracy of Inception in 14 times fewer steps.",
          "mlp of 3 x 100 units, SGD, each at its own tuned rate; steps to 98 % of the plain "
          "network's best validation accuracy; never reached counts as all steps.",
          "half a doubling of steps: less is lost in the choice of the rate.",
          Size(12, 6000, 12, _RATES), Size(8, 1000, 10, (0.01, 0.03, 0.1)), faster),
    Claim("higher-rate", "Batch norm allows much higher learning rates.",
          f"{_IS}: BN-x30 trains at 30 times Inception's rate.",
          "mlp of 3 x 100 units; largest rate within 2 points of the best validation accuracy; SGD "
          "and Adam (whose rates are a tenth).",
          "a factor of two: half a step of usual grids.",
          Size(12, 3000, 4, _GRID), Size(8, 1000, 3, _GRID), higher_rate),
    Claim("regularizes", "Batch norm regularizes, and makes dropout unnecessary.",
          f"{_IS}: dropout removed, and L2 regularization reduced by a factor of 5.",
          "mlp of 3 x 100 units on few examples, best epoch by validation loss; "
          "training minus test accuracy.",
          "half a point of gap; for dropout's replacement 1 point of accuracy.",
          Size(12, 2000, 20), Size(10, 1000, 10), regularizes),
    Claim("init", "With batch norm the initial weights' scale matters less.",
          f"{_IS}: less careful about initialization; no number is given.",
          "mlp of 3 x 100 units, Adam; range of test accuracy over the scales.", _ONE,
          Size(12, 3000, 5, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
          Size(8, 1000, 4, (0.01, 0.1, 1.0, 10.0)), init),
    Claim("small-batch", "Batch norm breaks at small batches: 16 is too few, 32 is enough.",
          "Wu and He 2018: error of ResNet-50 at 2 images a worker 34.7 %, of group norm 24.1 %.",
          "convnet of 8 and 16 channels, Adam at a rate of sqrt(batch); beside group norm.", _ONE,
          Size(12, 3000, 4, (2, 4, 8, 16, 32, 64, 128, 256)), Size(8, 1200, 3, (2, 16, 32, 256)),
          small_batch),
    Claim("alternatives", "At small batches other norms beat batch norm, and ghost norm at large.",
          "Wu and He 2018: at 2 images a worker group norm has 10.6 points less error.",
          "convnet of 8 and 16 channels; layer, group, renorm at 4; ghost (of 16) at 256.", _HALF,
          Size(12, 3000, 4), Size(8, 1200, 3), alternatives),
    Claim("position", "Batch norm belongs before the activation.",
          "ducha-aiki's caffenet-benchmark (ImageNet, 128 pixels, with scale and bias): before "
          "47.8 %, after 49.3 %.",
          "mlp of 3 x 100 units and convnet of 8 and 16 channels, Adam.", _HALF,
          Size(12, 6000, 5), Size(8, 1000, 3), position),
    Claim("inference-cost", "Folded, batch norm costs nothing at inference.",
          "No number that we are sure of; folding removes the operation, so that 1.0 is expected.",
          "mlp and convnet, eval mode, one thread, one run at a time, batches of 1 and 64.",
          "a tenth of the time: what machines vary by.",
          Size(12, 1000, 1), Size(8, 600, 1), inference_cost),
    Claim("online", "Batch norm cannot learn online, from batches of one.",
          "Ioffe 2017 and Wu and He 2018 name it as a limit; no number is given.",
          "convnet of 8 and 16 channels, one pass of steps of one example, each predicted first.",
          _ONE, Size(12, 3000, 1), Size(8, 800, 1), online),
    Claim("cnn", "A residual network is better with batch norm.",
          f"{_IS}: 73.0 % after 2.1 million steps (BN-x5), Inception 72.2 % after 31.0 million.",
          "resnet of 8 and 16 channels, Adam, each at its own tuned rate.", _HALF,
          Size(12, 3000, 5, (0.001, 0.003, 0.01, 0.03), tuning=1),
          Size(8, 1000, 3, (0.003, 0.01, 0.03)), cnn),
    Claim("transformer", "In a transformer batch norm is worse than layer norm.",
          "Shen et al. 2020 (PowerNorm) report a significant loss in translation; BERT itself uses "
          "layer norm.",
          "two blocks of width 32, Adam, each norm at its own tuned rate.", _ONE,
          Size(12, 6000, 6, (0.001, 0.003, 0.01), tuning=1), Size(8, 1000, 4, (0.003, 0.01)),
          transformer),
    Claim("covariate-shift", "Batch norm helps because it reduces internal covariate shift.",
          "Santurkar et al. 2018: the shift is not reduced; adding it back by noise does not hurt.",
          "mlp of 3 x 100 units, SGD at 0.03; gradient's relative change, their definition 2.1.",
          "a tenth of the shift; 1 point of accuracy.",
          Size(12, 3000, 4), Size(8, 1000, 2), covariate_shift),
    Claim("train-eval", "After few steps batch norm is worse by running than by batch statistics.",
          "Ioffe 2017 names the difference of the two modes; no number is given.",
          "mlp of 3 x 100 units, Adam, one epoch; momentum (weight of the new value) 0.1 and 0.01.",
          _ONE, Size(12, 3000, 1, (0.1, 0.01)), Size(8, 1000, 1, (0.1, 0.01)), train_eval),
)  # fmt: skip
CLAIMS = {claim.name: claim for claim in _CLAIMS}
ON_IMAGES = ("small-batch", "alternatives", "position", "inference-cost", "online", "cnn")
