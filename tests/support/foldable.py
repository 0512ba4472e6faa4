"""Models to be folded, with statistics that are not the initial ones, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import truenorm as tn


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with statistics and affine maps that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for module in model.modules():
        mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            continue
        mean.copy_(draw(mean))
        var.copy_(draw(var).abs() + 0.3)
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(draw(parameter))
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 3, 9, 9)), generator=torch.Generator().manual_seed(1))


class Heads(nn.Module):
    """A norm whose output several linear layers take, as queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.softmax(self.query(x) * self.key(x), 1) * self.value(x)


def resnet() -> nn.Module:
    model = tn.build(tn.ModelSpec(name="resnet", widths=(8, 8)), (3, 12, 12), 3, seed=0)
    return lively(model)
