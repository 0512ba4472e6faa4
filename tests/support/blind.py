"""Architectures that were chosen before rules were made, and looked at when these were done.

They are no part of the zoo: no test examines them, so that no rule is fitted to them. `make recall`
alone does, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo import CLASSES, Architecture, conv, examples, head, named, scenes

_PLAIN = examples(3, 16, 16)
_PIXELS = named(examples(3, 32, 32), "pixel_values", "labels")


class Scored(nn.Module):
    """Scores of the last map of a backbone of transformers."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head(channels)

    def forward(self, pixel_values: Tensor) -> Any:
        out = self.backbone(pixel_values)
        maps = out.feature_maps[-1] if "feature_maps" in out else out.last_hidden_state
        return {"logits": self.head(maps)}


def _backbone(model: str, config: str, channels: int, **options: Any) -> Callable[[], nn.Module]:
    made = zoo._transformer(model, config, **options)
    return lambda: Scored(made(), channels)


class Ghost(nn.Module):
    """Half of the channels are cheap copies of the other half, as in GhostNet."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        half = after // 2
        self.primary = conv(before, half, 1)
        self.cheap = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)
        )

    def forward(self, x: Tensor) -> Tensor:
        own = self.primary(x)
        return torch.cat([own, self.cheap(own)], 1)


class Split(nn.Module):
    """Groups of channels that take in each other's results, as in Res2Net."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.groups, width = groups, channels // groups
        self.into, self.out = conv(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.steps = nn.ModuleList(conv(width, width, 3) for _ in range(groups - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.into(x).chunk(self.groups, 1)
        parts, last = [first], torch.zeros_like(first)
        for part, step in zip(rest, self.steps, strict=True):
            last = step(part + last)
            parts.append(last)
        return (x + self.norm(self.out(torch.cat(parts, 1)))).relu()


class Branches(nn.Module):
    """Branches of several kernels beside each other, with Inception's eps of 1e-3."""

    def __init__(self, before: int, each: int) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), self._unit(before, each, 1))
        self.parts = nn.ModuleList(
            [self._unit(before, each, 1), self._unit(before, each, 3), pooled]
        )

    @staticmethod
    def _unit(before: int, after: int, kernel: int) -> nn.Sequential:
        layer = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(after, eps=1e-3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Rows(nn.Module):
    """Residual blocks over rows, norm first, as in the ResNet for tables."""

    def __init__(self, features: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(10, features)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(features), nn.Linear(features, 32), nn.ReLU(),
                nn.Linear(32, features),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.last = nn.Sequential(nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        scores: Tensor = self.last(x)
        return scores


class Halved(nn.Module):
    """One half of the channels goes around the block, as in CSPNet; norms hold their activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.block = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, bias=False), zoo.BatchNormAct2d(half, nn.SiLU())
        )
        self.out = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            zoo.BatchNormAct2d(channels, nn.SiLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        around, through = x.chunk(2, 1)
        y: Tensor = self.out(torch.cat([around, self.block(through)], 1))
        return y


def _dilated() -> nn.Module:
    """Convolutions over time of growing reach, norm and PReLU."""
    layers: list[nn.Module] = []
    for before, after, reach in ((4, 12, 1), (12, 12, 2), (12, 16, 4)):
        layers += [
            nn.Conv1d(before, after, 3, padding=reach, dilation=reach),
            nn.BatchNorm1d(after), nn.PReLU(),
        ]  # fmt: skip
    pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers, *pool)


_SIZES = {"steps": 40}
_ENTRIES = (
    Architecture("align vision", "transformers", _backbone(
        "AlignVisionModel", "AlignVisionConfig", 16, image_size=32, width_coefficient=1.0,
        depth_coefficient=1.0, batch_norm_momentum=0.1,
        in_channels=[32, 8, 12], out_channels=[8, 12, 16],
        kernel_sizes=[3, 3, 3], strides=[1, 2, 2], num_block_repeats=[1, 1, 2],
        expand_ratios=[1, 3, 3], hidden_dim=16, depthwise_padding=[],
    ), _PIXELS, 12, steps=60),
    Architecture("pp lcnet v3", "transformers", _backbone(
        "PPLCNetV3Backbone", "PPLCNetV3Config", 16, stem_channels=8, conv_symmetric_num=2,
        divisor=4,
        block_configs=[
            [[3, 8, 8, 1, False]], [[3, 8, 12, 2, False]], [[3, 12, 12, 1, True]],
            [[3, 12, 16, 1, False]], [[3, 16, 16, 1, False]],
        ],
    ), _PIXELS, 33, **_SIZES),
    zoo._hf("data2vec segmentation", "Data2VecVisionForSemanticSegmentation",
            "Data2VecVisionConfig", named(scenes(3, 32, 32), "pixel_values", "labels"), 12,
            out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=8,
            use_relative_position_bias=True, semantic_loss_ignore_index=255, **zoo._VIT),
    zoo._own("ghostnet", lambda: nn.Sequential(
        conv(3, 8, 3, 2), Ghost(8, 12), Ghost(12, 16), head(16)), _PLAIN, 5, **_SIZES),
    zoo._own("res2net", lambda: nn.Sequential(
        conv(3, 16, 3, 2), Split(16), Split(16), head(16)), _PLAIN, 11, **_SIZES),
    zoo._own("inception", lambda: nn.Sequential(
        conv(3, 8, 3, 2), Branches(8, 6), Branches(18, 8), head(24)), _PLAIN, 7, **_SIZES),
    zoo._own("rows with residuals", Rows, examples(10), 4, steps=60, size=24),
    zoo._own("cross stages", lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), zoo.BatchNormAct2d(16), Halved(16), Halved(16),
        head(16)), _PLAIN, 5, steps=50),
    zoo._own("dilated over time", _dilated, examples(4, 32), 3, **_SIZES),
)  # fmt: skip

zoo.ZOO.update({entry.name: entry for entry in _ENTRIES})
NAMES = tuple(entry.name for entry in _ENTRIES)
