"""What fvcore tests of precise statistics, in our words (facebookresearch/fvcore).

From tests/test_precise_bn.py and fvcore/nn/precise_bn.py: statistics of many batches, measured by
running the model over them. fvcore's are the mean over batches or, since 0.1.3, of the population;
``truenorm.recalibrate`` gives the population's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import truenorm
from conformance.cases import Case, need, need_close, refused

SUITE = "fvcore"
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
SHAPES = {"BatchNorm1d": (16, 8, 24), "BatchNorm2d": (16, 8, 12, 8), "BatchNorm3d": (8, 8, 4, 6, 6)}


def _batches(name: str, sizes: tuple[int, ...] = (8,) * 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(42)
    rest = SHAPES[name][1:]
    return [
        torch.randn(n, *rest, generator=generator, dtype=torch.float64) * (1 + i) + i
        for i, n in enumerate(sizes)
    ]


def _population(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.cat([x.movedim(1, -1).reshape(-1, x.shape[1]) for x in batches])
    return values.mean(0), values.var(0)


def _need_population(layer: nn.Module, batches: list[Tensor]) -> None:
    mean, var = _population(batches)
    need_close(layer.running_mean, mean, "running mean", **TIGHT)
    need_close(layer.running_var, var, "running variance", **TIGHT)


def statistics_are_those_of_the_population(home: object, name: str) -> None:
    layer = getattr(home, name)(8).double()
    weight = layer.weight.detach().clone()
    truenorm.recalibrate(layer, _batches(name), keep_worse=True)
    _need_population(layer, _batches(name))
    need_close(layer.weight.detach(), weight, "weight", rtol=0, atol=0)
    need(layer.momentum == 0.1, f"momentum {layer.momentum}")


def uneven_batches_weigh_by_their_size(home: object, name: str) -> None:
    """Issue: a mean over batches weighs a last small batch as a full one."""
    batches = _batches(name, (8, 8, 8, 1, 3))
    layer = getattr(home, name)(8).double()
    truenorm.recalibrate(layer, batches, keep_worse=True)
    _need_population(layer, batches)


def the_order_of_batches_does_not_matter() -> None:
    layers = [truenorm.BatchNorm2d(8).double() for _ in range(2)]
    batches = _batches("BatchNorm2d", (8, 1, 5))
    truenorm.recalibrate(layers[0], batches, keep_worse=True)
    truenorm.recalibrate(layers[1], batches[::-1], keep_worse=True)
    states = [dict(layer.state_dict()) for layer in layers]
    for name in ("running_mean", "running_var"):
        need_close(states[0][name], states[1][name], name, **TIGHT)


def layers_behind_layers_settle() -> None:
    """The second norm's input is that of evaluation, with the first's statistics exact."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)
    ).double()
    batches = _batches("BatchNorm2d", (8, 8, 2))
    truenorm.recalibrate(model, batches, keep_worse=True)
    _need_population(model[0], batches)
    _need_population(model[3], [model[:3].eval()(x) for x in batches])


def modes_are_given_back() -> None:
    """fvcore wants a model in train mode; here any will do, and it comes back as it was."""
    for training in (True, False):
        layer = truenorm.BatchNorm2d(8).double().train(training)
        truenorm.recalibrate(layer, _batches("BatchNorm2d"), keep_worse=True)
        need(layer.training == training, "another mode")
        _need_population(layer, _batches("BatchNorm2d"))


def no_data_is_refused() -> None:
    """fvcore: fewer batches than asked for is an error; here, none at all is."""
    layer = truenorm.BatchNorm2d(8).double()
    before = copy.deepcopy(layer.state_dict())
    refused(lambda: truenorm.recalibrate(layer, []), ValueError)
    need_close(dict(layer.state_dict()), dict(before), "state", rtol=0, atol=0)


def more_batches_than_there_are_is_told() -> None:
    layer = truenorm.BatchNorm2d(8).double()
    done = truenorm.recalibrate(layer, _batches("BatchNorm2d"), max_batches=20, keep_worse=True)
    need(done.batches == 8, f"says {done.batches} batches")


def some_layers_are_left_alone() -> None:
    """Layers in evaluation mode by choice, or without statistics, are none of its business."""
    model = nn.Sequential(
        truenorm.BatchNorm2d(8), truenorm.BatchNorm2d(8, frozen=True),
        nn.BatchNorm2d(8, track_running_stats=False),
    ).double()  # fmt: skip
    frozen = copy.deepcopy(model[1].state_dict())
    done = truenorm.recalibrate(model, _batches("BatchNorm2d"), keep_worse=True)
    need([r.layer for r in done.rows] == ["0"], f"changed {[r.layer for r in done.rows]}")
    need_close(dict(model[1].state_dict()), dict(frozen), "the frozen layer", rtol=0, atol=0)


def fvcores_way_of_measuring_works(name: str) -> None:
    """fvcore sets ``momentum = 1``, reads the statistics after each batch and averages them."""
    layer = getattr(truenorm, name)(8).double()
    layer.momentum = 1.0
    means, variances = [], []
    for x in _batches(name):
        layer(x)
        means.append(layer.running_mean.clone())
        variances.append(layer.running_var.clone())
    wanted = [x.movedim(1, -1).reshape(-1, 8) for x in _batches(name)]
    need_close(means, [w.mean(0) for w in wanted], "means", **TIGHT)
    need_close(variances, [w.var(0) for w in wanted], "variances", **TIGHT)


def fvcores_way_of_measuring_works_on_commit_step() -> None:
    """With ``commit="step"`` no forward writes: whoever reads after each must not read nonsense."""
    layer = truenorm.BatchNorm2d(8, commit="step").double()
    layer.momentum = 1.0
    x = _batches("BatchNorm2d")[0]
    with torch.no_grad():  # as fvcore does, so that no step can follow
        layer(x)
    rows = x.movedim(1, -1).reshape(-1, 8)
    need_close(layer.running_mean, rows.mean(0), "running mean", **TIGHT)


def cases() -> Iterator[Case]:
    """All of them."""
    for home, told in ((nn, "torch.nn"), (truenorm, "truenorm")):
        for name in NAMES:
            run = partial(statistics_are_those_of_the_population, home, name)
            yield Case(SUITE, f"recalibrate, {told}.{name}", "population", "", run)
            run = partial(uneven_batches_weigh_by_their_size, home, name)
            yield Case(SUITE, f"recalibrate, {told}.{name}", "uneven batches", "", run)
    for name, check in _OTHERS.items():
        yield Case(SUITE, "recalibrate", name, "", check)
    for name in NAMES:
        yield Case(SUITE, name, "momentum 1", "", partial(fvcores_way_of_measuring_works, name))
    commits = fvcores_way_of_measuring_works_on_commit_step
    yield Case(SUITE, "BatchNorm2d", "momentum 1, commit at the step", "", commits)


_OTHERS: dict[str, Callable[[], None]] = {
    "order": the_order_of_batches_does_not_matter,
    "layers behind layers": layers_behind_layers_settle,
    "modes": modes_are_given_back,
    "no data": no_data_is_refused,
    "more batches than there are": more_batches_than_there_are_is_told,
    "layers left alone": some_layers_are_left_alone,
}
