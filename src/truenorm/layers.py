"""Normalization layers that torch lacks, and the list of what counts as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalization of (N, C, *S), an example at a time.

    y = x / sqrt(mean(x^2 over C and S) + eps) * weight, with one weight per channel
    (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467). ``torch.nn.RMSNorm``
    normalizes trailing axes only and would need one weight per position of an image.
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_channels, self.eps = num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, *S); the squares are summed in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().mean(tuple(range(1, x.ndim)), keepdim=True)
        weight = self.weight.view(-1, *(1,) * (x.ndim - 2))
        return (wide * torch.rsqrt(square + self.eps) * weight).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_channels}, eps={self.eps}"


BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)
NORMS: tuple[type[nn.Module], ...] = (
    *BATCH_NORMS,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    RMSNorm,
)
