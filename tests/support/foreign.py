"""Norms as other packages have them, in words of our own: what they hold and do, not their code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _along_channels(vector: Tensor) -> Tensor:
    return vector[None, :, None, None]


class FrozenNorm(nn.Module):
    """As torchvision's frozen batch norm: four buffers and eps; a counter is not loaded."""

    counter_is_dropped = True

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            made = torch.zeros if name in ("bias", "running_mean") else torch.ones
            self.register_buffer(name, made(channels))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.counter_is_dropped:
            state.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state, prefix, *args)

    def normed(self, x: Tensor, eps: float) -> Tensor:
        scale = self.weight / (self.running_var + eps).sqrt()
        return x * _along_channels(scale) + _along_channels(self.bias - self.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x, self.eps)


class KernelFrozenNorm(FrozenNorm):
    """As detectron2's: it keeps the number of channels, and calls torch's kernel."""

    counter_is_dropped = False

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.num_features = channels

    def normed(self, x: Tensor, eps: float) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=eps)


class CountedFrozenNorm(KernelFrozenNorm):
    """One that keeps a counter of batches, too."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class NumberFrozenNorm(FrozenNorm):
    """As transformers': its eps is a number in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x, 1e-5)


def replace_by_frozen(norm: nn.BatchNorm2d) -> FrozenNorm:
    """As detectron2's and timm's converters do: all that they know of is carried over."""
    frozen = FrozenNorm(norm.num_features)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(frozen, name).data = getattr(norm, name).data
    frozen.eps = norm.eps
    return frozen


def _give(norm: nn.Module, act: nn.Module | None, drop: nn.Module | None) -> None:
    norm.drop = drop or nn.Identity()
    norm.act = act or nn.Identity()


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: normalize, drop, activate, in one module."""

    def __init__(
        self,
        channels: int,
        *,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(channels, **arguments)
        _give(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's of that name."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.act = act or nn.Identity()  # in timm's order, which is not that of the calls
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FrozenNormAct(FrozenNorm):
    """As timm's FrozenBatchNormAct2d."""

    def __init__(
        self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None
    ) -> None:
        super().__init__(channels)
        _give(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(nn.GroupNorm):
    """As timm's: its first two arguments are swapped."""

    def __init__(
        self,
        channels: int,
        groups: int,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__(groups, channels)
        _give(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


class ActivationGroupNorm(nn.GroupNorm):
    """As transformers' BitGroupNormActivation: the child has another name."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


FROZEN = [
    FrozenNorm,
    KernelFrozenNorm,
    CountedFrozenNorm,
    NumberFrozenNorm,
    FrozenNormAct,
]
