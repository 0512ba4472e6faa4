"""Models with planted faults, and healthy ones, for the doctor's tests.

Each of the four architectures is trained for a while on data with something to learn.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import truenorm as tn

CLASSES = 3
BATCH = 24


def batches(kind: str, count: int = 8, seed: int = 1, size: int = BATCH) -> list[Any]:
    """Batches of a task that can be learned: rows (N, 6) or images (N, 3, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6,) if kind == "mlp" else (3, 12, 12)
    centres = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))
    made = []
    for _ in range(count):
        y = torch.randint(0, CLASSES, (size,), generator=generator)
        made.append((centres[y] + 0.7 * torch.randn(size, *shape, generator=generator), y))
    return made


@functools.cache
def _trained(kind: str) -> nn.Module:
    model = tn.build(tn.ModelSpec(name=kind, widths=WIDTHS[kind]), SHAPES[kind], CLASSES, seed=0)  # type: ignore[arg-type]
    if kind != "transformer":
        tn.convert(model, to="torch")
    return train(model, kind)


WIDTHS = {"mlp": (16, 12), "convnet": (8, 8), "resnet": (8, 8), "transformer": (16, 16)}
SHAPES = {k: (6,) if k == "mlp" else (3, 12, 12) for k in WIDTHS}
KINDS = tuple(WIDTHS)


def train(model: nn.Module, kind: str, steps: int = 80) -> nn.Module:
    """A while of plain training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for x, y in batches(kind, steps, seed=5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def trained(kind: str) -> nn.Module:
    """A fresh copy of a trained model of one architecture, in eval mode."""
    return copy.deepcopy(_trained(kind))


def norms(model: nn.Module) -> list[Any]:
    """Its batch norms."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@dataclass
class Patient:
    """A model with what ``examine`` takes, and the code that must be found."""

    code: str
    name: str
    model: nn.Module
    data: Any = None
    given: dict[str, Any] = field(default_factory=dict)


def _in(kind: str, change: Callable[[nn.Module], object], *, data: bool = False) -> Any:
    def make(code: str) -> Patient:
        model = trained(kind)
        change(model)
        return Patient(code, kind, model, batches(kind) if data else None)

    return make


def _each(change: Callable[[nn.Module], object], kinds: Any = KINDS, *, data: bool = False) -> Any:
    return [_in(kind, change, data=data) for kind in kinds]


def _forget(model: nn.Module) -> None:
    norms(model)[-1].reset_running_stats()


def _forget_all(model: nn.Module) -> None:
    for norm in norms(model):
        norm.reset_running_stats()


def _nan(model: nn.Module) -> None:
    norms(model)[0].running_var[1] = float("nan")


def _too_small(model: nn.Module) -> None:
    norms(model)[-1].running_var.div_(60)


def _shifted(model: nn.Module) -> None:
    norm = norms(model)[0]
    norm.running_mean.add_(4 * norm.running_var.sqrt())


def _keras(model: nn.Module) -> None:
    for norm in norms(model):
        norm.momentum = 0.99


def _slow(model: nn.Module) -> None:
    for norm in norms(model):
        norm.momentum = 0.001


def _halved(model: nn.Module) -> None:
    for norm in norms(model):
        norm.running_mean = norm.running_mean.half()
        norm.running_var = norm.running_var.half()
    model.train()


def _collapsed(model: nn.Module) -> None:
    norms(model)[0].running_var[:3] = 1e-9


def _decayed_gamma(model: nn.Module) -> None:
    with torch.no_grad():
        norms(model)[0].weight[:3] = 1e-12


def _exploded(model: nn.Module) -> None:
    norms(model)[-1].running_var[0] = 1.6e7


def _one_trains(model: nn.Module) -> None:
    norms(model)[0].train()


def _one_rests(model: nn.Module) -> None:
    model.train()
    norms(model)[0].eval()


def _half_frozen(model: nn.Module) -> None:
    model.train()
    norms(model)[0].requires_grad_(False)


def _untracked(model: nn.Module) -> None:
    norm = norms(model)[0]
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _twins(kind: str) -> Any:
    def make(code: str) -> Patient:
        online, target = trained(kind), trained(kind)
        _forget_all(target)
        return Patient(code, kind, nn.ModuleDict({"online": online, "target": target}))

    return make


def _with(layers: Callable[[], list[nn.Module]], shape: tuple[int, ...], **given: Any) -> Any:
    """A small model of its own, untrained but with statistics, and data of ``shape``."""

    def make(code: str) -> Patient:
        torch.manual_seed(0)
        model = nn.Sequential(*layers())
        data = given.get("data") or [torch.randn(shape) for _ in range(8)]
        for _ in range(4):
            for x in data:
                model.train()(x) if len(x) > 1 else None
        if not given.get("training"):
            model.eval()
        return Patient(code, "own", model, data)

    return make


class Shared(nn.Module):
    def __init__(self, body: nn.Module, norm: nn.Module, axis: int = 1) -> None:
        super().__init__()
        self.body, self.norm = body, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return torch.relu(self.norm(y)) + torch.relu(self.norm(5 * y + 9))


def _mixed(kind: str) -> Any:
    def make(code: str) -> Patient:
        data = batches(kind)
        data = [(x + 6 * (i % 2), y) for i, (x, y) in enumerate(data)]
        return Patient(code, kind, trained(kind), data)

    return make


def _remainder(kind: str) -> Any:
    def make(code: str) -> Patient:
        data = [*batches(kind), tuple(t[:1] for t in batches(kind)[0])]
        return Patient(code, kind, trained(kind), data)

    return make


def _few(kind: str) -> Any:
    def make(code: str) -> Patient:
        return Patient(code, kind, trained(kind).train(), batches(kind, size=4))

    return make


def _optimized(kind: str) -> Any:
    def make(code: str) -> Patient:
        model = trained(kind)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        return Patient(code, kind, model, None, {"optimizer": optimizer})

    return make


def _padded(length: int, channels: int) -> Any:
    def make(code: str) -> Patient:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(channels, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(),
            nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip
        x = torch.randn(16, channels, length) + 3
        for i in range(16):
            x[i, :, length // 3 + i % (length // 2) :] = 0
        for _ in range(20):
            model(x)
        return Patient(code, f"padded to {length}", model.eval(), [x])

    return make


def on_devices(model: nn.Module, number: int = 2) -> nn.DataParallel[nn.Module]:
    """As on a machine with several devices: the doctor calls what is inside, on one."""
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = list(range(number))
    return wrapped


class Activated(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def _lost(norm: Callable[[int], nn.Module]) -> Any:
    return _with(
        lambda: [nn.Conv2d(3, 6, 3), norm(6), nn.Conv2d(6, 6, 3), norm(6), nn.Conv2d(6, 2, 3)],
        (8, 3, 9, 9),
    )


def _bn(n: int, **options: Any) -> Callable[[int], nn.Module]:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[n]
    return lambda c: kind(c, **options)


PATIENTS: dict[str, list[Callable[[str], Patient]]] = {
    "TN101": [*_each(_forget), *_each(_forget_all)],
    "TN102": _each(_nan),
    "TN103": [*_each(_too_small, data=True), *_each(_shifted, data=True)],
    "TN104": [*_each(_keras), *_each(_slow)],
    "TN105": _each(_halved),
    "TN106": [*_each(_collapsed), *_each(_decayed_gamma), *_each(_exploded)],
    "TN107": [_twins(kind) for kind in KINDS],
    "TN201": [*_each(_one_trains), *_each(_one_rests)],
    "TN202": _each(_half_frozen),
    "TN205": _each(_untracked),
    "TN301": [_few("mlp"), _with(
        lambda: [nn.Conv2d(3, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)],
        (4, 3, 6, 6), training=True,
    ), _with(lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)], (2, 5),
             training=True)],
    "TN302": [_remainder("mlp"), _with(
        lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)], (16, 5),
        data=[*torch.randn(5, 32, 5).unbind(), torch.randn(1, 5)],
    ), _with(
        lambda: [nn.Conv1d(3, 4, 5), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)],
        (16, 3, 5), data=[*torch.randn(5, 32, 3, 5).unbind(), torch.randn(2, 3, 5)],
    )],
    "TN304": [*_each(_untracked, data=True), _padded(24, 4), _padded(60, 2)],
    "TN305": [_mixed(kind) for kind in KINDS],
    "TN306": [
        _with(lambda: [Shared(nn.Linear(5, 8), nn.BatchNorm1d(8))], (16, 5)),
        _with(lambda: [Shared(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))], (8, 3, 7, 7)),
        _with(lambda: [Shared(nn.Conv1d(3, 8, 3), tn.BatchNorm1d(8))], (8, 3, 9)),
    ],
    "TN401": [
        _with(lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)], (16, 5)),
        _with(lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()], (8, 3, 7, 7)),
        _with(lambda: [nn.ConvTranspose1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU()], (8, 3, 7)),
    ],
    "TN402": [_optimized(kind) for kind in KINDS],
    "TN403": [
        _with(lambda: [nn.Dropout(0.5), nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(),
                       nn.Linear(8, 2)], (16, 5)),
        _with(lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.3),
                       nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()], (8, 3, 9, 9)),
        _with(lambda: [nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), tn.BatchNorm1d(8),
                       nn.Linear(8, 2)], (16, 5)),
    ],
    "TN404": [
        _with(lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)], (16, 8, 6)),
        _with(lambda: [nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8)], (4, 8, 6)),
        _with(lambda: [nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), tn.BatchNorm1d(6),
                       nn.Linear(6, 2)], (4, 6, 6)),
    ],
    "TN405": [
        _with(lambda: [nn.Linear(5, 8), nn.GroupNorm(8, 8), nn.ReLU(), nn.Linear(8, 2)], (16, 5)),
        _with(lambda: [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.GroupNorm(8, 8)],
              (4, 3, 7, 7)),
        _with(lambda: [nn.Linear(5, 1), nn.LayerNorm(1)], (4, 5)),
    ],
    "TN406": [
        _with(lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.ReLU(),
                       nn.Linear(8, 2)], (16, 5)),
        _with(lambda: [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2)], (16, 5)),
        _with(lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.ReLU()],
              (8, 3, 7, 7)),
    ],
    "TN501": [
        lambda code, kind=kind: Patient(code, kind, on_devices(trained(kind)).train())
        for kind in KINDS
    ],
    "TN502": [
        _lost(Activated), _lost(nn.SyncBatchNorm),
        _with(lambda: [nn.Conv2d(3, 4, 3), Activated(4), nn.Flatten(), nn.Linear(196, 2)],
              (8, 3, 9, 9)),
    ],
    "TN503": [
        _with(lambda: [nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2)], (16, 5)),
        _with(lambda: [Shared(nn.Linear(5, 8), nn.BatchNorm1d(8))], (16, 5)),
        _with(lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)], (8, 3, 7, 7)),
    ],
}  # fmt: skip

# Healthy: nothing worse than a note may be said of them.
HEALTHY: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{f"trained {k}": lambda k=k: (trained(k), batches(k)) for k in KINDS},
    **{f"trained {k} in train mode": lambda k=k: (trained(k).train(), batches(k)) for k in KINDS},
    **{
        f"fresh {k}": lambda k=k: (
            tn.build(tn.ModelSpec(name=k), SHAPES[k], CLASSES, seed=1),  # type: ignore[arg-type]
            batches(k),
        )
        for k in KINDS
    },
    **{
        f"{norm} {k}": lambda k=k, norm=norm: (
            tn.build(tn.ModelSpec(name=k, norm=norm), SHAPES[k], CLASSES, seed=1),  # type: ignore[arg-type]
            batches(k),
        )
        for k in KINDS
        for norm in ("none", "group", "layer")
    },
    "half for inference": lambda: (trained("convnet").half(), None),
    "frozen": lambda: (tn.convert(trained("resnet"), to="frozen").model.train(), batches("resnet")),
    "one example at a time": lambda: (
        trained("convnet"), [(x[:1], y[:1]) for x, y in batches("convnet")],
    ),
}  # fmt: skip
