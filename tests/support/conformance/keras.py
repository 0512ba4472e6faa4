"""What Keras tests of BatchNormalization, in our words (keras-team/keras).

From keras/src/layers/normalization/batch_normalization_test.py. Keras has channels last, weighs the
OLD value by its momentum, and tracks the biased variance; a mask is True where a value counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import truenorm
from conformance.cases import Case, need, need_close, refused

SUITE = "Keras"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
MOMENTUM = 0.99  # Keras's default, the weight of the old value


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(5.0, 10.0, shape)


def _turned(x: np.ndarray) -> Tensor:
    """(N, *S, C), as Keras has it, as (N, C, *S)."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def _layer(channels: int, momentum: float = MOMENTUM, **options: object) -> truenorm.BatchNorm:
    """A layer with Keras's momentum."""
    return truenorm.BatchNorm(channels, 1e-3, 1 - momentum, dtype=torch.float64, **options)  # type: ignore[arg-type]


# -- basics --------------------------------------------------------------------------------------


def counts_of_weights() -> None:
    layer, bare = _layer(3), _layer(3, affine=False)
    for it, learned in ((layer, 2), (bare, 0)):
        need(len(list(it.parameters())) == learned, f"{len(list(it.parameters()))} parameters")
        statistics = [n for n in it.state_dict() if n.startswith("running")]
        need(statistics == ["running_mean", "running_var"], f"statistics {statistics}")


def batches_are_normalized(shape: tuple[int, ...], start: tuple[float, float]) -> None:
    """Three in a row, from any statistics; with momentum 0 evaluation is then training."""
    x = _values(*shape)
    layer = _layer(shape[-1], momentum=0.0)
    layer.running_mean.fill_(start[0])
    layer.running_var.fill_(start[1])
    before = layer.eval()(_turned(x))
    out = _turned(x)
    for _ in range(3):
        out = layer.train()(out)
    axes = [0, *range(2, out.ndim)]
    need_close(out.mean(axes), torch.zeros_like(out.mean(axes)), "mean", rtol=0, atol=1e-9)
    need_close(
        out.std(axes, correction=0), torch.ones(shape[-1]).double(), "std", rtol=0, atol=1e-2
    )
    trained = layer.train()(_turned(x))
    need(not torch.allclose(before, trained), "evaluation before training is like training")
    count = x.size // shape[-1]
    # The layer tracks the unbiased variance, as torch does; the biased one is the batch's.
    layer.running_var.mul_((count - 1) / count)
    need_close(layer.eval()(_turned(x)), trained, "evaluation afterwards", **TIGHT)


def moving_averages_weigh_the_old_value() -> None:
    """convert(to="keras") puts a layer that holds Keras's momentum into torch's convention."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=MOMENTUM)).double()
    layer = truenorm.convert(model, to="keras").model[0]
    x = _values(7, 3)
    layer(torch.from_numpy(x))
    wanted = (1 - MOMENTUM) * x.mean(0)
    need_close(layer.running_mean, torch.from_numpy(wanted), "moving mean", rtol=1e-9, atol=1e-12)


def untrainable_is_evaluation() -> None:
    """``trainable = False`` freezes statistics, too; set again, it learns again."""
    layer = _layer(3, momentum=0.8)
    x = _turned(_values(20, 4, 4, 3))
    layer.frozen = True
    need(not list(layer.parameters()) and len(layer.state_dict()) == 5, "weights of a frozen layer")
    need_close(layer.train()(x), x / np.sqrt(1 + 1e-3), "frozen", **TIGHT)
    layer.frozen = False
    need(len(list(layer.parameters())) == 2, "it does not learn again")
    for _ in range(10):
        out = layer(x)
    need_close(out.mean((0, 2, 3)), torch.zeros(3).double(), "mean", rtol=0, atol=1e-9)


def momentum_out_of_range_is_refused() -> None:
    for momentum in (-0.1, 1.5):
        refused(lambda m=momentum: _layer(3, momentum=m), ValueError)
    _layer(3, momentum=0.0)
    _layer(3, momentum=1.0)


def large_statistics_survive_half_precision() -> None:
    """70000 is more than float16 holds."""
    layer = truenorm.BatchNorm2d(3).half()
    layer.running_var.fill_(70000)
    need_close(
        layer.running_var.double(), torch.full((3,), 7e4).double(), "variance", rtol=0, atol=0
    )
    layer.eval()(torch.zeros(1, 3, 2, 2).half())
    need(bool((layer.running_var == 70000).all()), "evaluation changed it")


# -- masks ---------------------------------------------------------------------------------------


def a_batch_all_masked_is_zeros() -> None:
    layer = _layer(5, affine=False)
    out = layer(torch.zeros(4, 5).double(), mask=torch.zeros(4, dtype=torch.bool))
    need_close(out, torch.zeros(4, 5).double(), "output", rtol=0, atol=0)
    need_close(layer.running_mean, torch.zeros(5).double(), "moving mean", rtol=0, atol=0)
    need_close(layer.running_var, torch.ones(5).double(), "moving variance", rtol=0, atol=0)


def masked_values_are_ignored(value: float) -> None:
    """Padding of any value behind two steps of (1, 5) and (2, 5): mean 1.5 and 5."""
    steps = np.array([[1, 5], [2, 5], [value, value], [value, value]])
    x = _turned(np.tile(steps, (10, 1, 1)))
    mask = torch.tensor([True, True, False, False]).expand(10, 4)
    layer = _layer(2, momentum=0.0)
    for _ in range(5):
        layer(x, mask=mask)
    need_close(layer.running_mean, torch.tensor([1.5, 5.0]).double(), "moving mean", **TIGHT)
    unbiased = torch.tensor(
        [0.25 * 20 / 19, 0.0], dtype=torch.float64
    )  # Keras tracks 0.25, the biased one
    need_close(layer.running_var, unbiased, "moving variance", **TIGHT)


def a_mask_that_broadcasts() -> None:
    """(N, W, 1) for (N, W, H, C): one for all places of a row; constant input gives zeros."""
    x, mask = torch.ones(1, 4, 2, 3).double(), torch.ones(1, 1, 2, 1, dtype=torch.bool)
    layer = _layer(4, momentum=0.0)
    need_close(layer(x, mask=mask), torch.zeros_like(x), "output", rtol=0, atol=1e-6)
    need_close(layer.running_mean, torch.ones(4).double(), "moving mean", **TIGHT)
    need_close(layer.running_var, torch.zeros(4).double(), "moving variance", rtol=0, atol=1e-12)


def a_mask_changes_training_alone() -> None:
    """Where it is valid, evaluation is the same with a mask; training is not."""
    x = _turned(_values(5, 6, 3))
    x[:, :, 1] = 0
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 1] = False
    layer = _layer(3)
    layer(x)
    plain, masked = layer.eval()(x), layer(x, mask=mask)
    kept = mask[:, None].expand_as(x)
    need_close(masked[kept], plain[kept], "evaluation", **TIGHT)
    need(bool((masked[~kept] == 0).all()), "masked outputs are not zero")
    plain, masked = layer.train()(x), layer(x, mask=mask)
    need(not torch.allclose(masked[kept], plain[kept]), "training does not see the mask")


# -- renormalization -----------------------------------------------------------------------------


def renorm_is_its_formula(channels: int = 3) -> None:
    """r and d by the running statistics before the batch.

    Keras tracks a mean and a deviation of their own for it; here, as in Ioffe 2017, algorithm 1,
    they are the running ones.
    """
    rng = np.random.default_rng(1337)
    mean, var = rng.normal(size=channels), np.abs(rng.normal(1.0, 0.5, channels)) + 0.1
    gamma, beta = rng.normal(1, 0.1, channels), rng.normal(0, 0.1, channels)
    renorm = truenorm.Renorm(rmax=1e9, dmax=1e9, start=0, rmax_at=0, dmax_at=0)
    layer = _layer(channels, momentum=0.9, renorm=renorm)
    state = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
    layer.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    layer.num_batches_tracked.fill_(1)  # its schedule ends after one batch
    x = np.array([[4.0, 6.0, 2.0], [8.0, -2.0, 5.0], [6.0, 4.0, 3.0]])
    out = layer(torch.from_numpy(x))
    std, running = np.sqrt(x.var(0) + 1e-3), np.sqrt(var + 1e-3)
    right = ((x - x.mean(0)) / std * (std / running) + (x.mean(0) - mean) / running) * gamma + beta
    need_close(out, torch.from_numpy(right), "output", rtol=1e-9, atol=1e-9)
    need_close(layer.running_mean, torch.from_numpy(0.9 * mean + 0.1 * x.mean(0)), "mean", **TIGHT)
    unbiased = torch.from_numpy(0.9 * var + 0.1 * x.var(0, ddof=1))
    need_close(layer.running_var, unbiased, "variance", **TIGHT)


def renorm_has_statistics_of_its_own() -> None:
    """Keras: ``renorm_mean``, ``renorm_stddev`` and ``moving_stddev`` beside the moving two."""
    layer = _layer(5, renorm=truenorm.Renorm())
    held = [n for n, b in layer.named_buffers() if b.ndim == 1]
    need(len(held) == 5, f"statistics {held}")


def renorm_evaluates_as_without() -> None:
    layer, plain = _layer(10, renorm=truenorm.Renorm()), _layer(10)
    state = {n: torch.rand_like(v) for n, v in plain.state_dict().items() if v.ndim}
    for it in (layer, plain):
        it.load_state_dict(state, strict=False)
    x = torch.from_numpy(_values(4, 10))
    need_close(layer.eval()(x), plain.eval()(x), "output", **TIGHT)


def renorm_clips() -> None:
    """With rmax 1 and dmax 0 it is batch norm; the least r is 1 / rmax."""
    x = torch.from_numpy(_values(6, 4))
    none = truenorm.Renorm(rmax=1.0, dmax=0.0, start=0, rmax_at=0, dmax_at=0)
    need_close(_layer(4, renorm=none)(x), _layer(4)(x), "clipped to nothing", **TIGHT)
    some = truenorm.Renorm(rmax=3.0, dmax=5.0, start=0, rmax_at=0, dmax_at=0)
    layer = _layer(4, renorm=some)
    layer.num_batches_tracked.fill_(1)
    numbers = x.numpy()
    std = np.sqrt(numbers.var(0) + 1e-3)
    r = np.clip(std / np.sqrt(1 + 1e-3), 1 / 3, 3)
    d = np.clip(numbers.mean(0) / np.sqrt(1 + 1e-3), -5, 5)
    right = (numbers - numbers.mean(0)) / std * r + d
    need_close(layer(x), torch.from_numpy(right), "output", rtol=1e-9, atol=1e-9)


def renorm_limits_out_of_range_are_refused() -> None:
    for limits in ({"rmax": 0.0}, {"dmax": -1.0}, {"random_key": 1.0}):
        refused(lambda given=limits: truenorm.Renorm(**given), ValueError, TypeError)


_CASES: dict[str, dict[str, Callable[[], None]]] = {
    "BatchNorm": {
        "counts of weights": counts_of_weights,
        "moving averages": moving_averages_weigh_the_old_value,
        "trainable": untrainable_is_evaluation,
        "momentum out of range": momentum_out_of_range_is_refused,
        "70000 in float16": large_statistics_survive_half_precision,
    },
    "mask": {
        "all masked": a_batch_all_masked_is_zeros,
        "broadcast": a_mask_that_broadcasts,
        "training and evaluation": a_mask_changes_training_alone,
    },
    "renorm": {
        "formula": renorm_is_its_formula,
        "statistics of its own": renorm_has_statistics_of_its_own,
        "evaluation": renorm_evaluates_as_without,
        "clipping": renorm_clips,
        "limits out of range": renorm_limits_out_of_range_are_refused,
    },
}


def cases() -> Iterator[Case]:
    """All of them."""
    for subject, checks in _CASES.items():
        for name, run in checks.items():
            yield Case(SUITE, subject, name, "", run)
    for value in (0.0, 0.1, 1.0):
        told = f"padding {value}"
        yield Case(
            SUITE, "mask", "masked values", told, lambda v=value: masked_values_are_ignored(v)
        )
    for shape in ((5, 2, 3), (5, 3, 3, 2)):
        for start in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
            told = f"{shape}, statistics from {start}"
            run = lambda s=shape, b=start: batches_are_normalized(s, b)  # noqa: E731
            yield Case(SUITE, "BatchNorm", "normalizes", told, run)
