"""What Flax tests of its norms, in our words (google/flax).

From tests/linen/linen_test.py and tests/nnx/nn/normalization_test.py: BatchNorm with a mask,
``use_running_average``, ``axis_name`` and ``axis_index_groups``; LayerNorm, GroupNorm, InstanceNorm
and RMSNorm with a mask. Flax has channels last, weighs the OLD value by its momentum, and tracks
the biased variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import truenorm
from conformance.cases import Case, need, need_close
from conformance.gloo import Ranked
from conformance.pooled import need_pooled, parts_of

SUITE = "Flax"
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
EPS = 1e-5


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def _first(x: np.ndarray) -> Tensor:
    """(N, *S, C), as Flax has it, as (N, C, *S)."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


# -- batch norm ----------------------------------------------------------------------------------


def batch_norm_normalizes_and_averages() -> None:
    x = _values(4, 3, 2)
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.9)).double()
    layer = truenorm.convert(model, to="flax").model[0]
    out = layer(_first(x))
    need_close(out.mean((0, 2)), torch.zeros(2).double(), "mean", rtol=0, atol=1e-9)
    need_close(out.var((0, 2), correction=0), torch.ones(2).double(), "variance", rtol=0, atol=1e-3)
    need_close(layer.running_mean, torch.from_numpy(0.1 * x.mean((0, 1))), "mean", **TIGHT)
    unbiased = 0.9 + 0.1 * x.var((0, 1), ddof=1)  # Flax tracks the biased one
    need_close(layer.running_var, torch.from_numpy(unbiased), "variance", **TIGHT)


def the_running_average_is_used_on_demand() -> None:
    """``use_running_average`` at the call is ``eval()``, or ``frozen``."""
    layer = truenorm.BatchNorm1d(2, dtype=torch.float64)
    for _ in range(3):
        layer(_first(_values(4, 3, 2)) * 2 + 1)
    x = _first(_values(4, 3, 2))
    mean, var = (b[:, None] for b in (layer.running_mean, layer.running_var))
    wanted = (x - mean) / torch.sqrt(var + EPS)
    need_close(layer.eval()(x), wanted, "eval", **TIGHT)
    layer.train().frozen = True
    need_close(layer(x), wanted, "frozen", **TIGHT)


def a_mask_of_features() -> None:
    """Some features of all examples; they come out as zero and keep their statistics."""
    x, mask = _values(10, 5), np.array([True, False, True, False, True])
    layer = truenorm.BatchNorm1d(5, EPS, dtype=torch.float64)
    out = layer(torch.from_numpy(x), mask=torch.from_numpy(mask)[None])
    right = np.where(mask, (x - x.mean(0)) / np.sqrt(x.var(0) + EPS), 0)
    need_close(out, torch.from_numpy(right), "output", **TIGHT)
    mean = np.where(mask, 0.1 * x.mean(0), 0)
    need_close(layer.running_mean, torch.from_numpy(mean), "moving mean", **TIGHT)


def a_mask_of_examples() -> None:
    x, mask = _values(10, 3, 5), np.arange(10) % 3 > 0
    layer = truenorm.BatchNorm1d(5, EPS, dtype=torch.float64)
    out = layer(_first(x), mask=torch.from_numpy(mask))
    kept = x[mask]
    right = (kept - kept.mean((0, 1))) / np.sqrt(kept.var((0, 1)) + EPS)
    need_close(out[mask], _first(right), "output", **TIGHT)
    need(bool((out[~mask] == 0).all()), "masked outputs are not zero")


def half_input_has_statistics_of_float32(dtype: torch.dtype) -> None:
    """``force_float32_reductions``: sums of half-precision values are not half-precision sums."""
    x = torch.from_numpy(_values(512, 5) * 10 + 3).to(dtype)
    layer = truenorm.BatchNorm1d(5, momentum=1.0).to(dtype)
    out = layer(x)
    need(out.dtype == dtype, f"gives {out.dtype}")
    exact = x.double()
    need_close(layer.running_mean.double(), exact.mean(0), "mean", rtol=1e-5, atol=1e-5)
    need_close(layer.running_var.double(), exact.var(0), "variance", rtol=1e-5, atol=1e-5)


def variance_is_not_a_difference_of_squares(mean: float) -> None:
    """``use_fast_variance=False``: far from zero the variance is still that of the values."""
    x = torch.from_numpy(_values(64, 5) * 0.1 + mean).float()
    for mask in (None, torch.ones(64, dtype=torch.bool)):
        layer = truenorm.BatchNorm1d(5, momentum=1.0)
        layer(x, mask=mask)
        need_close(layer.running_var.double(), x.double().var(0), "variance", rtol=1e-2, atol=0)


def without_scale_and_bias() -> None:
    layer = truenorm.BatchNorm1d(5, affine=False, dtype=torch.float64)
    scaled = truenorm.BatchNorm1d(5, bias=False, dtype=torch.float64)
    x = torch.from_numpy(_values(10, 5))
    need(not list(layer.parameters()) and len(list(scaled.parameters())) == 1, "parameters")
    need_close(layer(x), scaled(x), "output", **TIGHT)


# -- the other norms -----------------------------------------------------------------------------


def _normalized(
    x: np.ndarray, axes: tuple[int, ...], mask: np.ndarray | None, center: bool
) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) along ``axes``, over what the mask leaves; zero elsewhere."""
    where = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    mean = x.mean(axes, keepdims=True, where=where) if center else 0.0
    var = ((x - mean) ** 2).mean(axes, keepdims=True, where=where)
    return np.where(where, (x - mean) / np.sqrt(var + EPS), 0)


def layer_norm(mask: np.ndarray | None) -> None:
    x = _values(10, 5)
    layer = truenorm.LayerNorm(5, EPS, dtype=torch.float64)
    out = layer(torch.from_numpy(x), **_given(mask))
    need_close(out, torch.from_numpy(_normalized(x, (1,), mask, True)), "output", **TIGHT)


def rms_norm(mask: np.ndarray | None) -> None:
    x = _values(10, 5)
    layer = truenorm.RMSNorm(5, eps=EPS).double()
    out = layer(torch.from_numpy(x), **_given(mask))
    need_close(out, torch.from_numpy(_normalized(x, (1,), mask, False)), "output", **TIGHT)


def group_norm(mask: np.ndarray | None) -> None:
    x = _values(10, 6)
    layer = truenorm.GroupNorm(3, 6, EPS, dtype=torch.float64)
    out = layer(torch.from_numpy(x), **_given(mask))
    where = None if mask is None else mask.reshape(1, 3, 2)
    right = _normalized(x.reshape(10, 3, 2), (2,), where, True).reshape(10, 6)
    need_close(out, torch.from_numpy(right), "output", **TIGHT)


def group_norm_of_volumes() -> None:
    x = _values(2, 5, 4, 4, 32)
    out = truenorm.GroupNorm(2, 32, EPS, affine=False, dtype=torch.float64)(_first(x))
    right = _normalized(x.reshape(2, 5, 4, 4, 2, 16), (1, 2, 3, 5), None, True).reshape(x.shape)
    need_close(out, _first(right), "output", **TIGHT)


def instance_norm(mask: np.ndarray | None) -> None:
    x = _values(10, 7, 6)
    layer = truenorm.InstanceNorm1d(6, EPS, dtype=torch.float64)
    given = {} if mask is None else {"mask": torch.from_numpy(mask)[None, :, None]}
    out = layer(_first(x), **given)
    right = _normalized(x, (1,), None, True)
    right = right if mask is None else np.where(mask, right, 0)
    need_close(out, _first(right), "output", **TIGHT)


def _given(mask: np.ndarray | None) -> dict[str, Tensor]:
    return {} if mask is None else {"mask": torch.from_numpy(mask)[None]}


_FIVE, _SIX = (
    np.array([True, False, True, False, True]),
    np.array([True, False, True, False, True, False]),
)
_MASKED: dict[str, tuple[Callable[[np.ndarray | None], None], np.ndarray]] = {
    "LayerNorm": (layer_norm, _FIVE),
    "RMSNorm": (rms_norm, _FIVE),
    "GroupNorm": (group_norm, _SIX),
    "InstanceNorm1d": (instance_norm, _SIX),
}
_BATCH: dict[str, Callable[[], None]] = {
    "normalizes, averages": batch_norm_normalizes_and_averages,
    "use_running_average": the_running_average_is_used_on_demand,
    "mask of features": a_mask_of_features,
    "mask of examples": a_mask_of_examples,
    "float16": partial(half_input_has_statistics_of_float32, torch.float16),
    "bfloat16": partial(half_input_has_statistics_of_float32, torch.bfloat16),
    "variance at 100": partial(variance_is_not_a_difference_of_squares, 100.0),
    "variance at 10000": partial(variance_is_not_a_difference_of_squares, 10000.0),
    "no scale, no bias": without_scale_and_bias,
}


def cases() -> Iterator[Case]:
    """In one process."""
    for name, run in _BATCH.items():
        yield Case(SUITE, "BatchNorm", name, "", run)
    for subject, (check, mask) in _MASKED.items():
        yield Case(SUITE, subject, "no mask", "", partial(check, None))
        yield Case(SUITE, subject, "mask", "", partial(check, mask))
    yield Case(SUITE, "GroupNorm", "volumes", "", group_norm_of_volumes)


# -- over ranks ----------------------------------------------------------------------------------


def named_axis() -> None:
    """``axis_name``: the batch is that of all devices."""
    need_pooled(_synced(True), parts_of([(4, 4, 3)] * 3), (0, 1, 2))


def index_groups() -> None:
    """``axis_index_groups``: the first and the third, the second and the fourth."""
    members = [[0, 2], [1, 3]]
    groups = [dist.new_group(m) for m in members]
    mine = dist.get_rank() % 2
    parts = [parts_of([(4, 4, 3)] * 4)[rank] for rank in members[mine]]
    need_pooled(_synced(groups[mine]), parts, members[mine], group=groups[mine])


def named_axis_with_masks() -> None:
    """Each device's mask has its own number of valid values."""
    layer, rank = _synced(True), dist.get_rank()
    parts = parts_of([(4, 4, 3)] * 2)
    masks = [torch.arange(12).view(4, 3) % 3 > r for r in range(2)]
    out = layer(parts[rank], mask=masks[rank])
    kept = torch.cat([p.movedim(1, -1)[m] for p, m in zip(parts, masks, strict=True)])
    mine = parts[rank].movedim(1, -1)[masks[rank]]
    right = (mine - kept.mean(0)) / torch.sqrt(kept.var(0, correction=0) + EPS)
    need_close(out.movedim(1, -1)[masks[rank]], right, "output", **TIGHT)
    need_close(layer.running_mean, 0.1 * kept.mean(0), "mean", **TIGHT)


def _synced(sync: object) -> truenorm.BatchNorm:
    return truenorm.BatchNorm1d(4, EPS, sync=sync, dtype=torch.float64)


def ranked() -> list[Ranked]:
    """Over ranks."""
    return [
        Ranked(SUITE, "BatchNorm, sync", "axis_name", 3, named_axis),
        Ranked(SUITE, "BatchNorm, sync", "axis_index_groups", 4, index_groups),
        Ranked(SUITE, "BatchNorm, sync", "axis_name, masks", 2, named_axis_with_masks),
    ]
