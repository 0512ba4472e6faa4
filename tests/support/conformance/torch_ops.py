"""torch's ``op_db``: its samples of the functions behind norms, given to our layers.

The samples are in torch's wheel (torch/testing/_internal/common_methods_invocations.py). Each is
made into a layer in the state that the sample gives, and held against torch's function and against
the formula in float64, both from the sample as it is. torch's ``opcheck`` asks about operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import truenorm
from conformance.cases import Case, need, need_close, refused
from conformance.process import process_left_alone
from truenorm.kernels.ops import kernels

SUITE = "torch op_db"
OPCHECK = "torch opcheck"
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 1 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "first axis last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": _channels_last,
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


class Made(NamedTuple):
    """A sample as a layer, as a call of torch's function, and as the axes that it averages over."""

    layer: nn.Module
    function: Callable[[Tensor], Tensor]
    grouped: Callable[[np.ndarray], np.ndarray] | None  # None where the running ones are used
    affine: tuple[Tensor | None, Tensor | None]
    eps: float
    masked: bool = True


def _state(layer: nn.Module, **given: Tensor | None) -> nn.Module:
    layer.load_state_dict(
        {name: value.detach() for name, value in given.items() if value is not None}, strict=False
    )
    return layer


def _within(momentum: float) -> float:
    """Torch's function takes any momentum; the layer one in [0, 1], and says so."""
    if 0 <= momentum <= 1:
        return momentum
    refused(lambda: truenorm.BatchNorm1d(2, momentum=momentum), ValueError)
    return 0.7


def _batch(sample: Any) -> Made:
    mean, var, weight, bias = sample.args
    options = dict(sample.kwargs)
    options["momentum"] = _within(options.get("momentum", 0.1))
    training, eps = options.get("training", False), options.get("eps", 1e-5)
    cls = {2: truenorm.BatchNorm1d, 3: truenorm.BatchNorm1d, 4: truenorm.BatchNorm2d}
    layer = cls[sample.input.ndim](
        sample.input.shape[1], eps, options["momentum"], weight is not None, mean is not None
    ).double()
    _state(layer, weight=weight, bias=bias, running_mean=mean, running_var=var)
    given = [t if t is None else t.detach().clone() for t in (mean, var, weight, bias)]
    by_batch = training or mean is None
    return Made(
        layer.train(training),
        lambda x: F.batch_norm(x, *given, **options),
        (lambda x: np.moveaxis(x, 1, 0).reshape(1, x.shape[1], -1)) if by_batch else None,
        (weight, bias),
        eps,
    )


def _instance(sample: Any) -> Made:
    options = dict(sample.kwargs)
    options["momentum"] = _within(options.get("momentum", 0.1))
    x, eps = sample.input, options.get("eps", 1e-5)
    held = {n: options.pop(n, None) for n in ("running_mean", "running_var", "weight", "bias")}
    by_instance = options.get("use_input_stats", True)
    cls = getattr(truenorm, f"InstanceNorm{x.ndim - 2}d")
    layer = cls(
        x.shape[1], eps, options["momentum"],
        affine=held["weight"] is not None, track_running_stats=held["running_mean"] is not None,
    ).double()  # fmt: skip
    _state(layer, **held)
    given = {n: None if t is None else t.detach().clone() for n, t in held.items()}
    return Made(
        layer.train(by_instance),
        lambda x: F.instance_norm(x, **given, **options),
        (lambda x: x.reshape(*x.shape[:2], -1)) if by_instance else None,
        (held["weight"], held["bias"]),
        eps,
        masked=held["running_mean"] is None,
    )


def _group(sample: Any) -> Made:
    (groups,) = sample.args
    options = dict(sample.kwargs)
    weight, bias, eps = options.get("weight"), options.get("bias"), options.get("eps", 1e-5)
    channels = sample.input.shape[1]
    layer = truenorm.GroupNorm(groups, channels, eps).double()
    with torch.no_grad():
        layer.weight.copy_(torch.ones(channels) if weight is None else weight)
        layer.bias.copy_(torch.zeros(channels) if bias is None else bias)
    return Made(
        layer,
        lambda x: F.group_norm(x, groups, weight, bias, eps),
        lambda x: x.reshape(x.shape[0], groups, -1),
        (weight, bias),
        eps,
    )


def _layer(sample: Any) -> Made:
    shape, *affine = sample.args
    options = dict(sample.kwargs)
    weight = options.get("weight", affine[0] if affine else None)
    bias = options.get("bias", affine[1] if len(affine) > 1 else None)
    eps = options.get("eps", 1e-5)
    layer = truenorm.LayerNorm(shape, eps).double()
    with torch.no_grad():
        layer.weight.copy_(torch.ones(tuple(shape)) if weight is None else weight)
        layer.bias.copy_(torch.zeros(tuple(shape)) if bias is None else bias)
    return Made(
        layer,
        lambda x: F.layer_norm(x, shape, weight, bias, eps),
        lambda x: x.reshape(*x.shape[: x.ndim - len(shape)], -1),
        (weight, bias),
        eps,
    )


OPERATORS: dict[str, Callable[[Any], Made]] = {
    "batch_norm": _batch,
    "instance_norm": _instance,
    "group_norm": _group,
    "layer_norm": _layer,
}
_CLASSES = {
    "batch_norm": "BatchNorm",
    "instance_norm": "InstanceNorm",
    "group_norm": "GroupNorm",
    "layer_norm": "LayerNorm",
}


# -- what is asked -------------------------------------------------------------------------------


def _as_torchs_function(operator: str, sample: Any, layout: str) -> None:
    made = OPERATORS[operator](sample)
    for scale, shift in ((1.0, 0.0), (-0.5, 1.0)):
        x = LAYOUTS[layout](sample.input.detach() * scale + shift).requires_grad_()
        cotangent = torch.randn(x.shape, dtype=x.dtype)
        out, wanted = made.layer(x), made.function(x)
        need_close(out, wanted, "output", **TIGHT)
        ours, theirs = (torch.autograd.grad(o, x, cotangent)[0] for o in (out, wanted))
        need_close(ours, theirs, "gradient of the input", **TIGHT)


def _with_all_valid(operator: str, sample: Any) -> None:
    made = OPERATORS[operator](sample)
    x = sample.input.detach()
    wanted = made.function(x)
    need_close(made.layer(x, mask=torch.ones_like(x, dtype=torch.bool)), wanted, "masked", **TIGHT)


def _as_the_formula(operator: str, sample: Any) -> None:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, in float64 numpy."""
    made = OPERATORS[operator](sample)
    assert made.grouped is not None
    x = sample.input.detach().numpy()
    groups = made.grouped(x)
    mean, var = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a negative eps: both are NaN
        normed = (groups - mean) / np.sqrt(var + made.eps)
    normed = _ungrouped(operator, normed, x)
    along = _along(operator, x)
    for value, join in zip(made.affine, (np.multiply, np.add), strict=True):
        if value is not None:
            normed = join(normed, value.detach().numpy().reshape(along(value)))
    need_close(
        made.layer(torch.from_numpy(x)).detach(), torch.from_numpy(normed), "formula", **TIGHT
    )


def _ungrouped(operator: str, normed: np.ndarray, x: np.ndarray) -> np.ndarray:
    if operator == "batch_norm":
        turned = normed.reshape(x.shape[1], x.shape[0], *x.shape[2:])
        return np.moveaxis(turned, 0, 1)
    return normed.reshape(x.shape)


def _along(operator: str, x: np.ndarray) -> Callable[[Tensor], tuple[int, ...]]:
    if operator == "layer_norm":
        return lambda value: tuple(value.shape)
    return lambda value: (-1, *(1,) * (x.ndim - 2))


def _refuses(operator: str, error: Any) -> None:
    """What torch's function refuses, the layer made of it refuses, too."""
    refused(
        lambda: OPERATORS[operator](error.sample_input).layer(error.sample_input.input.double()),
        RuntimeError,
        ValueError,
        IndexError,
    )


def _told(sample: Any) -> str:
    def short(value: Any) -> str:
        return "tensor" if isinstance(value, Tensor) else str(value)

    options = [f"{name}={short(value)}" for name, value in sample.kwargs.items()]
    return ", ".join([str(tuple(sample.input.shape)), *map(short, sample.args), *options])


def cases() -> list[Case]:
    """Every sample of every operator; the samples without a channel axis are no layer's."""
    with process_left_alone():
        from torch.testing._internal.common_methods_invocations import op_db

        named = [(op, op.name.removeprefix("nn.functional.")) for op in op_db]
        listed = [(op, n) for op, n in named if n in OPERATORS and not op.variant_test_name]
        return [case for op, name in listed for case in _of(op, name)]


def _of(op: Any, operator: str) -> Iterator[Case]:
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    if op.reference_inputs_func is not None:
        samples += list(op.reference_inputs("cpu", torch.float64, requires_grad=True))
    for number, sample in enumerate(samples):
        if sample.input.ndim > 1 or operator == "layer_norm":
            yield from _asked(operator, sample, f"{number}: {_told(sample)}")
    for error in op.error_inputs("cpu") if op.error_inputs_func is not None else ():
        run = partial(_refuses, operator, error)
        yield Case(SUITE, _CLASSES[operator], "refused", _told(error.sample_input), run)


def _asked(operator: str, sample: Any, told: str) -> Iterator[Case]:
    subject, made = _CLASSES[operator], OPERATORS[operator](sample)
    for layout in LAYOUTS:
        run = partial(_as_torchs_function, operator, sample, layout)
        yield Case(SUITE, subject, f"torch's function, {layout}", told, run)
    if made.masked:
        run = partial(_with_all_valid, operator, sample)
        yield Case(SUITE, subject, "all valid", told, run)
    if made.grouped is not None and sample.input.numel():
        run = partial(_as_the_formula, operator, sample)
        yield Case(SUITE, subject, "formula", told, run)


def ours() -> list[str]:
    """The operators that TrueNorm has registered with torch."""
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith("truenorm::"))


def operators() -> Iterator[Case]:
    """The operators that torch's ``opcheck`` has to be asked about, and its questions."""
    yield Case(OPCHECK, "operators", "registered", "", _operators_are_checked)
    if not kernels().live:
        return
    for name, samples in _samples_of_operators().items():
        for example, arguments in samples.items():
            yield Case(OPCHECK, name, "opcheck", example, partial(_opcheck, name, arguments))


def _samples_of_operators() -> dict[str, dict[str, tuple[Any, ...]]]:
    x, residual, grad = torch.randn(3, 4, 3, 5, 6)
    weight, bias, mean = torch.randn(3, 3)
    var, moments = torch.rand(3), torch.rand(2, 1, 3, dtype=torch.float64)
    grouped = torch.rand(4, 2, 3, dtype=torch.float64)
    counts = torch.tensor([[7.0], [9.0]], dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(4, 5, 6) > 0.3
    return {
        "truenorm::batch_norm_act": {
            "plain": (x, None, None, None, mean, var, True, 0.1, 1e-5, 0),
            "all": (x, residual, weight, bias, mean, var, True, 0.1, 1e-5, 1),
            "evaluation": (x, None, weight, bias, mean, var, False, 0.0, 1e-5, 5),
            "channels last": (last, None, weight, bias, mean, var, True, 0.1, 1e-5, 5),
            "mask": (x, residual, weight, bias, mean, var, True, 0.1, 1e-5, 5, mask),
            "groups": (last, None, weight, bias, mean, var, True, 0.1, 1e-5, 5, None, [3, 1]),
            "renorm": (
                x,
                None,
                weight,
                None,
                mean,
                var,
                True,
                0.1,
                1e-5,
                0,
                mask,
                [3, 1],
                2.0,
                1.0,
            ),
        },
        "truenorm::batch_norm_act_backward": {
            "all": (grad, x, residual, None, weight, bias, moments, True, 1e-5, 5, [True] * 4),
            "output": (grad, x, None, x, weight, bias, moments, True, 1e-5, 1, [True] * 4),
            "none": (grad, x, None, None, None, None, moments, True, 1e-5, 1, [False] * 4),
            "mask": (grad, x, None, None, weight, bias, moments, True, 1e-5, 1, [True] * 4, mask),
            "groups": (
                grad,
                x,
                None,
                None,
                weight,
                bias,
                grouped,
                True,
                1e-5,
                1,
                [True] * 4,
                mask,
                [3, 1],
            ),
        },
        "truenorm::moments": {"plain": (x,), "mask": (last, mask), "groups": (x, mask, [3, 1])},
        "truenorm::track": {"groups": (mean, var, grouped[0], grouped[1], counts, 0.1)},
    }


def _opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    space, operator = name.split("::")
    torch.library.opcheck(getattr(getattr(torch.ops, space), operator).default, arguments)


def _operators_are_checked() -> None:
    """Whoever adds one gives it samples here, and ``opcheck`` is asked."""
    missing = sorted({*ours()} - {*_samples_of_operators()})
    need(not missing, f"no opcheck of {', '.join(missing)}")
