"""What whole training steps gain: torch.nn's layers, the same accelerated, and fused.

Each arm is a copy of one model with the same SGD step on the same batch; the second runs under
``truenorm.accelerate()``, the third is what ``truenorm.convert(fuse=True)`` makes of it. Beside
the ratios stand the bytes that autograd keeps between forward and backward, and the share of a
step that normalization, residual additions and activations take.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import harness
import truenorm
from truenorm.kernels import ops
from truenorm.models import ModelSpec, build

ARMS = ("torch.nn", "accelerate()", "fuse=True")
# Of the profiler's own times: what is not convolution, matrix product, pooling, optimizer.
NORMALIZING = (
    "batch_norm", "relu", "threshold", "hardtanh", "clamp", "aten::add", "truenorm::", "aten::ge",
    "aten::lt", "aten::le", "logical", "masked_fill",
)  # fmt: skip


def of_transformers(name: str) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    """ResNet-50 or MobileNetV2 from its configuration, at batch 8 and 128 pixels."""

    def make() -> tuple[nn.Module, Tensor, Tensor]:
        import transformers

        kind = getattr(transformers, f"{name}ForImageClassification")
        model = kind(getattr(transformers, f"{name}Config")(num_labels=10, return_dict=False))
        return model, torch.randn(8, 3, 128, 128), torch.randint(10, (8,))

    return make


def of_ours(name: str) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    """A model of the package on MNIST's training part, at batch 64."""

    def make() -> tuple[nn.Module, Tensor, Tensor]:
        part = truenorm.load("mnist").train
        x, y = torch.as_tensor(part.x[:64]), torch.as_tensor(part.y[:64])
        return (
            build(ModelSpec(name=name), tuple(x.shape[1:]), 10, seed=0),
            x.float() / 255,
            y.long(),
        )

    return make


MODELS: dict[
    str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], tuple[float | None, ...]]
] = {
    "convnet, MNIST, batch 64": (of_ours("convnet"), (None, 1.25)),
    "resnet, MNIST, batch 64": (of_ours("resnet"), (None, 1.15)),
    "transformers' ResNet-50, (8, 3, 128, 128)": (of_transformers("ResNet"), (1.08, None)),
    "transformers' MobileNetV2, (8, 3, 128, 128)": (of_transformers("MobileNetV2"), (1.08, None)),
}


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits_of(model(x)), y).backward()
        optimizer.step()

    return step


def logits_of(out: Any) -> Tensor:
    """The first tensor of what a model returns."""
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


def kept_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """What autograd keeps for the backward pass, parameters and the batch aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x, y)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(logits_of(model(x)), y)
        loss.backward()
    return sum(kept.values())


def share(step: Callable[[], None]) -> float:
    """The part of a step's processor time in normalization, additions and activations."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
    times = {row.key: row.self_cpu_time_total for row in found.key_averages()}
    of_norms = sum(t for key, t in times.items() if any(n in key.lower() for n in NORMALIZING))
    return of_norms / sum(times.values())


def measured(name: str, rounds: int) -> dict[str, Any]:
    """All arms of one model, in turn."""
    torch.manual_seed(0)
    model, x, y = MODELS[name][0]()
    model.train()
    fused = copy.deepcopy(model)
    truenorm.convert(fused, to="truenorm", fuse=True, example=x)
    models = (model, copy.deepcopy(model), fused)
    steps = [step_of(m, x, y) for m in models]

    def run(arm: int) -> float:
        start = time.perf_counter()
        steps[arm]()
        return time.perf_counter() - start

    def accelerated(arm: int, call: Callable[[], Any]) -> Any:
        if arm == 0:
            return call()
        with truenorm.accelerate():
            return call()

    for arm in (0, 1, 2):
        accelerated(arm, steps[arm])
    ratios: dict[int, list[float]] = {1: [], 2: []}
    times: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for arm in (1, 2):
            before, mine, after = run(0), accelerated(arm, lambda: run(arm)), run(0)  # noqa: B023
            ratios[arm].append((before + after) / 2 / mine)
            times[0].append((before + after) / 2)
            times[arm].append(mine)
    return {
        "model": name,
        "ratios": [[], ratios[1], ratios[2]],
        "milliseconds": [statistics.median(t) * 1e3 for t in times],
        "kept": [accelerated(a, lambda: kept_bytes(models[a], x, y)) for a in (0, 1, 2)],  # noqa: B023
        "share": [accelerated(a, lambda: share(steps[a])) for a in (0, 1, 2)],  # noqa: B023
    }


def main() -> None:
    """Measure all models, print the table and keep it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=21)
    options.add_argument("--threads", type=int, default=2)
    told = options.parse_args()
    about = harness.provenance("python bench/steps.py")
    ops.keep_freed_memory()  # for all arms
    torch.set_num_threads(told.threads)
    lines = [
        f"Training steps, {told.threads} threads, n = {told.rounds} rounds of torch, ours, torch; "
        "median (range). The process keeps the memory that is freed, for all arms.",
        "",
        "| model | arm | ms a step | torch.nn / arm | target | kept for backward, MB | share of "
        "norms, additions, activations |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, (_, targets) in MODELS.items():
        row = measured(name, told.rounds)
        rows.append(row)
        for arm, kind in enumerate(ARMS):
            ratio = harness.spread(row["ratios"][arm]) if arm else "1"
            target = targets[arm - 1] if arm else None
            lines.append(
                f"| {name} | {kind} | {row['milliseconds'][arm]:.1f} | {ratio} | "
                f"{target or ''} | {row['kept'][arm] / 1e6:.1f} | {row['share'][arm]:.0%} |"
            )
            print(lines[-1], flush=True)
    harness.save("steps", "\n".join([*lines, ""]), {"provenance": about, "rows": rows})


if __name__ == "__main__":
    main()
