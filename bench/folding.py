"""What folding gives: every public architecture of tests/zoo.py folded and compared, and speed.

Speed is of inference, folded against unfolded and against torch.fx's fuse, in turn. Targets: never
slower than 0.98 of the speed, at least 1.25 times as fast on the resnet at batch 64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import harness
import truenorm as tn
import zoo
from truenorm.calling.call import Call
from truenorm.calling.nested import tensors_in

SLOWEST, RESNET_64 = 0.98, 1.25
Inference = Callable[[Tensor], Any]


def main() -> None:
    """Fold all, time some, print the tables and keep them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=25)
    options.add_argument("--only", choices=["zoo", "speed"])
    told = options.parse_args()
    warnings.simplefilter("ignore")
    about = harness.provenance("python bench/folding.py")
    record: dict[str, Any] = {"provenance": about}
    if told.only != "speed":
        record["zoo"] = [_row(name) for name in zoo.NAMES if zoo.ZOO[name].norms]
        harness.save("folding_zoo", _zoo_text(record["zoo"]), record)
    if told.only != "zoo":
        record = {"provenance": about, "speed": _speeds(told.rounds)}
        harness.save("folding", _speed_text(record["speed"], told.rounds), record)


# -- the zoo --------------------------------------------------------------------------------------


def _row(name: str) -> dict[str, Any]:
    """One architecture with random statistics: what folds, the errors, and what fuse does."""
    model = zoo.with_random_statistics(zoo.build(name).eval(), 1)
    given = Call(model).prepare(zoo.batches(name)[0])
    folded = tn.fold(model, given.kwargs or given.args)
    forms = [pair.form for pair in folded.pairs]
    called = zoo.ZOO[name].norms - sum("not called" in left.reason for left in folded.left)
    row = {
        "name": name,
        "source": zoo.ZOO[name].source,
        "norms": called,
        "producer": forms.count("into producer"),
        "consumer": forms.count("into consumer") + forms.count("into norm"),
        "alone": forms.count("scale and shift"),
        "left": [left._asdict() for left in folded.left if "not called" not in left.reason],
        "error": folded.error,
        "exact": folded.exact,
        **_fused(model, given),
    }
    print(row["name"], row["norms"], row["producer"], f"{row['error']:.1e}", flush=True)
    return row


def _fused(model: nn.Module, given: Any) -> dict[str, Any]:
    """What torch.fx's fuse folds, and how far its answers are from the model's."""
    try:
        fused = fuse(model)
        rest = len(zoo.batch_norms(fused))
        with torch.no_grad():
            mine, theirs = (
                list(tensors_in(m(*given.args, **given.kwargs))) for m in (model, fused)
            )
    except Exception as error:
        return {"fx": f"refused: {type(error).__name__}", "fx_folded": 0, "fx_error": None}
    sizes = [
        (float((a - b).abs().max()), float(a.abs().max()))
        for a, b in zip(mine, theirs, strict=True)
    ]
    worst = max((apart / (size or 1.0) for apart, size in sizes), default=0.0)
    return {"fx": "", "fx_folded": len(zoo.batch_norms(model)) - rest, "fx_error": worst}


def _zoo_text(rows: list[dict[str, Any]]) -> str:
    whole = {
        key: sum(row[key] for row in rows) for key in ("norms", "producer", "consumer", "alone")
    }
    fx = sum(row["fx_folded"] for row in rows)
    gone = whole["producer"] + whole["consumer"]
    wrong = [row["name"] for row in rows if row["fx_error"] is not None and row["fx_error"] > 1e-4]
    rest, alone = whole["norms"] - gone - whole["alone"], whole["alone"]
    worst, refused = max(row["error"] for row in rows), sum(bool(row["fx"]) for row in rows)
    lines = [
        f"{len(rows)} architectures with random statistics, {whole['norms']} batch norms that "
        f"run: {gone} ({gone / whole['norms']:.1%}) vanish into weights, {alone} become a scale "
        f"and shift, {rest} are left. Largest error from end to end: {worst:.1e} of the largest "
        f"output. torch.fx's fuse folds {fx}, refuses {refused} architectures, and is wrong by "
        f"more than 1e-4 on {len(wrong)}{': ' + ', '.join(wrong) if wrong else ''}.",
        "",
        "| architecture | source | norms | into weights before | behind | alone | left | error "
        "| in float64 | fuse folds | its error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = "" if row["exact"] is None else f"{row['exact']:.0e}"
        theirs = row["fx"] or f"{row['fx_error']:.0e}"
        lines.append(
            f"| {row['name']} | {row['source']} | {row['norms']} | {row['producer']} "
            f"| {row['consumer']} | {row['alone']} | {len(row['left'])} | {row['error']:.0e} "
            f"| {exact} | {row['fx_folded']} | {theirs} |"
        )
    lines += ["", "What is left, and why:", ""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for left in row["left"]:
            reasons.setdefault(left["reason"], []).append(row["name"])
    for reason, names in sorted(reasons.items()):
        where = ", ".join(dict.fromkeys(names))
        lines.append(f"- {reason} ({where})")
    return "\n".join([*lines, ""])


# -- speed ----------------------------------------------------------------------------------------


def _models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    torch.manual_seed(0)
    return {
        "convnet": (tn.build(tn.ModelSpec(name="convnet"), (3, 32, 32), 10, seed=0), (3, 32, 32)),
        "resnet": (tn.build(tn.ModelSpec(name="resnet"), (3, 32, 32), 10, seed=0), (3, 32, 32)),
        "transformers ResNet-18": (
            ResNetForImageClassification(
                ResNetConfig(
                    embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
                    layer_type="basic",
                )
            ),
            (3, 96, 96),
        ),
        "transformers MobileNetV2": (
            MobileNetV2ForImageClassification(MobileNetV2Config(image_size=96)), (3, 96, 96),
        ),
    }  # fmt: skip


def _speeds(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, (model, shape) in _models().items():
        zoo.with_random_statistics(model.eval(), 1)
        for size in (1, 64):
            x = torch.randn(size, *shape)
            folded = tn.fold(model, x[:2])
            try:
                fused: nn.Module | None = fuse(model)
            except Exception:
                fused = None
            rows.append(_timed(name, size, (model, folded.model, fused), x, rounds))
    rows.append(_raw_mlp(rounds))
    return rows


def _raw_mlp(rounds: int) -> dict[str, Any]:
    """The main job's network from a uint8 image: scaling and norms by hand, or in the weights."""
    model = tn.build(tn.ModelSpec(), (1, 28, 28), 10, seed=0)
    zoo.with_random_statistics(model.eval(), 1)
    x = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    scaling = tn.Scaling(None, torch.full((1,), 1 / 255))
    folded = tn.fold(model, x, scaling=scaling).model
    return _timed("MLP, uint8 image", 1, (lambda x: model(scaling(x)), folded, None), x, 4 * rounds)


def _timed(
    name: str,
    size: int,
    models: tuple[Inference, Inference, Inference | None],
    x: Tensor,
    rounds: int,
) -> dict[str, Any]:
    """Rounds of unfolded, folded, unfolded (and fused, folded): speed of the folded over theirs."""
    plain, folded, fused = models
    with torch.inference_mode():
        calls = max(1, int(0.1 / _seconds(plain, x, 2)))
        against_plain = [_ratio(plain, folded, x, calls) for _ in range(rounds + 1)][1:]
        against_fused = None
        if fused is not None:
            against_fused = [_ratio(fused, folded, x, calls) for _ in range(rounds + 1)][1:]
        ms = 1e3 * statistics.median(_seconds(folded, x, calls) for _ in range(5))
    row = {"name": name, "batch": size, "ms": ms, "plain": against_plain, "fused": against_fused}
    print(name, size, f"{statistics.median(against_plain):.3f}", flush=True)
    return row


def _ratio(other: Inference, folded: Inference, x: Tensor, calls: int) -> float:
    before, ours, after = (_seconds(run, x, calls) for run in (other, folded, other))
    return (before + after) / 2 / ours


def _seconds(run: Inference, x: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run(x)
    return (time.perf_counter() - start) / calls


def _speed_text(rows: list[dict[str, Any]], rounds: int) -> str:
    lines = [
        f"{torch.get_num_threads()} threads; n = {rounds} rounds (four times as many for the "
        "MLP) of other, folded, other; speed of the folded over the mean of its neighbours', as "
        "median (range).",
        "",
        "| model | batch | folded, ms | over unfolded | over torch.fx's fuse | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = RESNET_64 if (row["name"], row["batch"]) == ("resnet", 64) else SLOWEST
        none = "-" if row["name"].startswith("MLP") else "refused"  # fuse takes no scaling
        theirs = none if row["fused"] is None else harness.spread(row["fused"])
        met = "yes" if statistics.median(row["plain"]) >= goal else "NO"
        lines.append(
            f"| {row['name']} | {row['batch']} | {row['ms']:.3g} | {harness.spread(row['plain'])} "
            f"| {theirs} | >= {goal:g}: {met} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
