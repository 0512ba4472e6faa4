"""Norms of other packages, known by what they hold and not by their class.

torchvision, detectron2, timm and transformers each have a frozen batch norm of their own, and timm
has batch and group norms with the dropout and the activation inside. No package is imported to
tell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

AFTER = ("drop", "act", "activation")  # children that come after normalizing, in their order
_HELD = ("weight", "bias", "running_mean", "running_var")


def frozen_statistics(module: nn.Module) -> bool:
    """Whether ``module`` is a frozen batch norm of another package.

    It is no batch norm of torch's, has no parameter of its own, and its buffers weight, bias,
    running_mean and running_var (C,) are vectors of one length: so in torchvision, detectron2,
    timm and transformers.
    """
    if isinstance(module, _BatchNorm) or any(True for _ in module.parameters(recurse=False)):
        return False
    own = dict(module.named_buffers(recurse=False))
    if any(name not in own or is_lazy(own[name]) for name in _HELD):
        return False
    shapes = {own[name].shape for name in _HELD}
    return len(shapes) == 1 and len(shapes.pop()) == 1


def other_statistics(module: nn.Module) -> bool:
    """Whether ``module`` keeps running variances (C,) and is neither a batch norm nor frozen.

    So an instance norm that tracks them, and norms of other packages that are written from
    scratch, such as timm's ``InplaceAbn`` and ``EvoNorm2dB0``: training moves them.
    """
    if isinstance(module, _BatchNorm) or frozen_statistics(module):
        return False
    variances = dict(module.named_buffers(recurse=False)).get("running_var")
    return variances is not None and (is_lazy(variances) or variances.ndim == 1)


def fused(module: nn.Module) -> tuple[str, ...]:
    """Names of the children that a norm applies after normalizing, in their order.

    () for what is neither a batch norm, nor a group norm, nor a frozen norm, and for a norm that
    has other children, too: what such a one does is not known. timm's ``BatchNormAct2d`` has
    ("drop", "act").
    """
    if not (isinstance(module, (_BatchNorm, nn.GroupNorm)) or frozen_statistics(module)):
        return ()
    children = dict(module._modules.items())
    if any(name not in AFTER for name in children):
        return ()
    return tuple(name for name in AFTER if children.get(name) is not None)


def epsilon(module: nn.Module) -> float:
    """What a norm, whoever made it, adds to the variance.

    Read past the class, whose attribute may refuse; measured where it is a number in the forward
    of a frozen norm, as in transformers.
    """
    own = vars(module)
    if "eps" not in own and frozen_statistics(module):
        return _measured(module)
    if "eps" not in own:
        return float(module.eps)  # type: ignore[arg-type]  # an attribute of its class
    eps: float = own["eps"]
    return eps


def _measured(module: nn.Module) -> float:
    """The eps of a frozen norm: with mean 0 and variance 0, y = 1 / sqrt(eps) for x = 1."""
    zeros, ones = (made(1, dtype=torch.float64, device="cpu") for made in (torch.zeros, torch.ones))
    bare = stand_in(module, dict(zip(_HELD, (ones, zeros, zeros, zeros), strict=True)), {})
    y = bare.forward(torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu"))
    return float(f"{1 / y.item() ** 2:.12g}")  # 1e-05, not 1.0000000000000003e-05


def stand_in(module: nn.Module, buffers: dict[str, Tensor], children: dict[str, Any]) -> nn.Module:
    """A shallow copy of ``module`` with other buffers and children, and none of its hooks.

    Children that are not given do nothing. ``module`` and its tensors are not touched.
    """
    bare = type(module).__new__(type(module))
    own = {
        "_buffers": {**module._buffers, **buffers},
        "_modules": {name: children.get(name, nn.Identity()) for name in module._modules},
    }
    vars(bare).update({**vars(module), **own})
    return bare


# -- what a forward does, shown on numbers --------------------------------------------------------


def unlike(module: nn.Module) -> str:
    """How the forward of a norm differs from: normalize, then :func:`fused`, in that order.

    "" if it does not. Shown on random numbers in float64, in the modes that a process without a
    GPU can run: with stand-ins for the children, which tell their order and how often each is
    called. ``module``, its tensors, its children and the random state are not touched.
    """
    if "forward" in vars(module):
        return "its forward was put in the place of its class's"
    modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (False, True)
    for training in modes:
        bare, x = _sample(module)
        vars(bare)["training"] = training
        expected, moved = _expected(bare, x, training=training)
        try:
            out = bare.forward(x)
        except Exception as error:  # others wrote it
            return f"its forward raises {type(error).__name__} on a tensor alone"
        names = [name for name in moved if not _equal(bare._buffers[name], moved[name])]
        if not isinstance(out, Tensor) or out.shape != expected.shape:
            return "its forward returns another shape"
        if names or not _equal(out, expected):
            what = f"moves {names[0]} otherwise" if names else "computes something else"
            mode = "training" if training else "evaluation"
            return f"its forward {what} in {mode}"
    return ""


def _equal(a: Any, b: Tensor) -> bool:
    """Up to rounding in float64; an eps that is another by 1e-6 is seen."""
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


class _Marked(nn.Module):
    """Stands for a child; the cube of the first is told from the shift of the second."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 if self.place else x**3


def _sample(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """A stand-in of ``module`` with random state and marked children, and an input for it."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        shape = like.shape if like.is_floating_point() else ()
        values = torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)
        return values + 0.5 if like.is_floating_point() else torch.tensor(2, device="cpu")

    buffers = {n: random(b) for n, b in module._buffers.items() if b is not None}
    children = {name: _Marked(i) for i, name in enumerate(fused(module))}
    bare = stand_in(module, buffers, children)
    held = {n: p if p is None else nn.Parameter(random(p)) for n, p in module._parameters.items()}
    vars(bare)["_parameters"] = held
    channels = getattr(module, "num_channels", None) or getattr(module, "num_features", None)
    axes = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}
    space = next((n for kind, n in axes.items() if isinstance(module, kind)), 2)
    shape = (3, channels or len(buffers["running_mean"]), *(2,) * space)
    return bare, torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)


@torch.no_grad()
def _expected(bare: nn.Module, x: Tensor, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """What normalizing and the children make of ``x``, and the buffers thereafter."""
    moved = {n: b.clone() for n, b in bare._buffers.items() if b is not None}
    if isinstance(bare, nn.GroupNorm):
        out = F.group_norm(x, bare.num_groups, bare.weight, bare.bias, epsilon(bare))
    else:
        frozen = not isinstance(bare, _BatchNorm)
        tracks = frozen or bool(bare.track_running_stats)
        by_batch = not frozen and (training or "running_mean" not in moved)
        momentum: Any = 0.0 if frozen else bare.momentum
        if by_batch and tracks and "num_batches_tracked" in moved:
            moved["num_batches_tracked"] += 1
            if momentum is None:
                momentum = 1 / int(moved["num_batches_tracked"])
        mean, var = (moved.get(name) if tracks or not by_batch else None for name in _HELD[2:])
        weight, bias = (getattr(bare, name) for name in _HELD[:2])
        out = F.batch_norm(x, mean, var, weight, bias, by_batch, momentum or 0.0, epsilon(bare))
    for name in fused(bare):
        out = bare._modules[name](out)  # type: ignore[misc]
    return out, moved
