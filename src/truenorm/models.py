"""MLP, ConvNet, ResNet and Transformer, each built around a chosen normalization.

Every model takes stored-shape input, scaled: rows (N, F) or images (N, C, H, W).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.calling.borrowing import Randoms
from truenorm.errors import InputError, choose
from truenorm.factories import called, digest_of, foreign, found, is_factory, offer
from truenorm.layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d
from truenorm.layers.conversion import converted
from truenorm.layers.norms import InstanceNorm1d, InstanceNorm2d, RMSNorm, groups_of
from truenorm.layers.renorm import Renorm

ModelName = Literal["mlp", "convnet", "resnet", "transformer"]
NormName = Literal["none", "batch", "layer", "group", "instance", "rms", "renorm", "ghost", "own"]
NormPosition = Literal["before", "after"]
GHOST = 16  # examples that share statistics; fewer are noisy (Hoffer et al. 2017 take 128)
# Ioffe's ramp (2017) fifty times as fast: his runs take over 100,000 steps, these some thousand.
# What classes and papers call them, without Norm and 1d, 2d or 3d.
_ALSO = {"bn": "batch", "ln": "layer", "gn": "group", "in": "instance", "batchre": "renorm",
         "brn": "renorm", "ghostbatch": "ghost", "gbn": "ghost", "identity": "none"}  # fmt: skip
RENORM = Renorm(start=100, rmax_at=800, dmax_at=500)


def norm_named(text: str) -> str:
    """The norm that ``text`` means, as bn, BatchNorm2d or batch_norm mean batch; else ``text``."""
    norms = get_args(NormName)
    plain = re.sub(r"[\s_-]", "", text.lower())
    bare = re.sub("(norm)?[123]?d?$", "", plain)
    for name in (plain, bare):
        known = _ALSO.get(name, name)
        if known in norms:
            return known
    return text


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build a model again.

    Attributes:
        name: which architecture; or a factory of one's own (:mod:`truenorm.factories`), as
            ``package.module:factory``, whose batch norms become ``norm`` and whose other
            weights are what they are with any norm. What follows is then its own affair.
        norm: which normalization, by its name here or by what classes and papers call it, like
            bn; "own" leaves a factory's model as it is.
        norm_position: before or after the activation; in the transformer, before each
            sub-layer (pre-norm) or after its residual sum (post-norm).
        widths: hidden units (mlp), channels of each stage (convnet, resnet) or the model
            width of each block (transformer, all equal); None for the architecture's own.
        dropout: probability, before the last layer and between hidden layers.
        init_scale: factor of the initial weights, not biases, of all linear and conv layers.
        norm_momentum: of batch norms' running statistics, the weight of the new value.
        digest: of a factory's code and weights, which tells it from what it was before.

    Raises:
        InputError: a value outside its range.
    """

    name: ModelName | str = "mlp"
    norm: NormName = "batch"
    norm_position: NormPosition = "before"
    widths: tuple[int, ...] | None = None
    dropout: float = 0.0
    init_scale: float = 1.0
    norm_momentum: float = 0.1
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ModelName) and not is_factory(self.name):
            raise InputError(
                f"unknown model {self.name!r}; choose one of {', '.join(get_args(ModelName))}, or "
                "give a factory of your own, package.module:factory."
            )
        norms = get_args(NormName)
        object.__setattr__(self, "norm", norm_named(self.norm))
        choose("norm", self.norm, norms if is_factory(self.name) else norms[:-1])
        choose("norm_position", self.norm_position, get_args(NormPosition))
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), got {self.dropout!r}.")
        if not 0 < self.init_scale < math.inf:
            raise InputError(f"init_scale must be a number above 0, got {self.init_scale!r}.")
        if not 0 <= self.norm_momentum <= 1:
            raise InputError(f"norm_momentum must lie in [0, 1], got {self.norm_momentum!r}.")
        if self.widths is not None:
            whole = all(isinstance(w, int) and w >= 1 for w in self.widths)
            if not whole or (not self.widths and self.name != "mlp"):
                raise InputError(f"widths must be integers of at least 1, got {self.widths!r}.")
        if is_factory(self.name):
            self._refuse_what_the_factory_says()

    def _refuse_what_the_factory_says(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "norm", "digest") and value != field.default:
                raise InputError(
                    f"{field.name} is for the built-in models, got {value!r} with {self.name}; set "
                    "it in the factory."
                )

    def to_json(self) -> dict[str, Any]:
        """The fields, for a run's record; later ones only where they say something.

        Digests over specs that older versions stored stay as they were.
        """
        later = {"init_scale": 1.0, "norm_momentum": 0.1, "digest": None}
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in later or v != later[k]}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> ModelSpec:
        """Undo :meth:`to_json`."""
        widths = stored["widths"]
        return cls(**{**stored, "widths": None if widths is None else tuple(widths)})


def build(
    spec: ModelSpec, input_shape: tuple[int, ...], classes: int, *, seed: int | None = None
) -> nn.Module:
    """Build the model of ``spec`` for examples of ``input_shape`` and ``classes`` logits.

    With ``seed`` the initial weights depend on it alone, and torch's generator is given back
    as it was.

    Raises:
        InputError: the architecture cannot take such examples; or the factory is not there, fails,
            or has no batch norm that could become the norm asked for.
    """
    if is_factory(spec.name):
        model, _ = _of_factory(spec.name, input_shape, classes, seed)
        _give_norm(model, spec)
        return model
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = _ARCHITECTURES[spec.name](spec, input_shape, classes)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = spec.norm_momentum
    if spec.init_scale != 1:
        _scale_weights(model, spec.init_scale)
    return model


def identified(spec: ModelSpec, input_shape: tuple[int, ...], classes: int) -> ModelSpec:
    """``spec`` with the digest of what its factory builds now; a built-in one as it is.

    Raises:
        InputError: the factory fails, or builds two models from one seed.
    """
    if not is_factory(spec.name):
        return spec
    digests = {digest_of(*_of_factory(spec.name, input_shape, classes, 0)) for _ in range(2)}
    if len(digests) > 1:
        raise InputError(
            f"{spec.name}: builds different models from the same seed, so runs could not be paired;"
            " draw initial weights by the generators of torch, numpy or random alone, and build a "
            "new model each time."
        )
    return dataclasses.replace(spec, digest=digests.pop())


def _of_factory(
    name: str, input_shape: tuple[int, ...], classes: int, seed: int | None
) -> tuple[nn.Module, ModuleType]:
    """What a factory builds, and its module; random states are given back if there is a seed."""
    with foreign(name):
        module, factory = found(name)  # before the seed: an import may draw numbers
        if isinstance(factory, nn.Module):
            raise InputError(f"{name}: is a model; give a function that builds a new one.")
    randoms = Randoms()
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  the global one is what factories use
        with foreign(name):
            return called(factory, name, offer(input_shape, classes))[0], module
    finally:
        if seed is not None:
            randoms.rewind()


def _give_norm(model: nn.Module, spec: ModelSpec) -> None:
    """Turn the batch norms of a factory's ``model`` into the spec's norm."""
    if spec.norm == "own":
        return
    settings = {"ghost": {"ghost": GHOST}, "renorm": {"renorm": RENORM}}.get(spec.norm, {})
    done = converted(model, to=spec.norm, **settings)  # type: ignore[arg-type]
    if not any(row.outcome in ("changed", "already") for row in done.rows) or done.refused:
        why = done.shortfall if done.refused else "it has no batch norm"
        raise InputError(
            f"{spec.name}: cannot be given norm {spec.norm} ({why}); choose another norm, or a "
            "factory whose model has batch norms."
        )


@torch.no_grad()
def _scale_weights(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.mul_(factor)
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.mul_(factor)


class _VectorInstanceNorm(nn.InstanceNorm1d):
    """Instance norm of vectors (N, C): one channel whose positions are the C units.

    torch would take (N, C) for one unbatched example and normalize over the batch.
    """

    def __init__(self) -> None:
        super().__init__(1, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unsqueeze(1)).squeeze(1)


_OF_BATCH = ("batch", "renorm", "ghost")  # each unit has a mean of its own subtracted
_OURS: tuple[type[BatchNorm], ...] = (BatchNorm1d, BatchNorm1d, BatchNorm2d)


def norm_of(kind: NormName, channels: int, axes: int) -> nn.Module:  # noqa: PLR0911  one a kind
    """The normalization of (N, C, *S) with ``axes`` spatial axes, 0 for vectors.

    Layer and RMS norm take each example's statistics over channels and positions together,
    as group norm with one group does.
    """
    if kind == "batch":
        # torch's own: fit() refuses what is not finite by itself, and ours cost a small step 2 %.
        return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[axes](channels)
    if kind == "renorm":
        return _OURS[axes](channels, renorm=RENORM)
    if kind == "ghost":
        return _OURS[axes](channels, ghost=GHOST)
    if kind == "layer":
        return nn.LayerNorm(channels) if axes == 0 else nn.GroupNorm(1, channels)
    if kind == "group":
        return nn.GroupNorm(groups_of(channels), channels)
    if kind == "instance":
        if axes == 0:
            return _VectorInstanceNorm()
        return (InstanceNorm1d, InstanceNorm2d)[axes - 1](channels, affine=True)
    return RMSNorm(channels) if kind == "rms" else nn.Identity()


def _activated(spec: ModelSpec, channels: int, axes: int) -> list[nn.Module]:
    """Normalization and ReLU in the order asked for."""
    if spec.norm == "none":
        return [nn.ReLU()]
    layers = [norm_of(spec.norm, channels, axes), nn.ReLU()]
    return layers if spec.norm_position == "before" else layers[::-1]


def _images_only(spec: ModelSpec, input_shape: tuple[int, ...], least: int) -> int:
    if len(input_shape) != 3:
        raise InputError(
            f"{spec.name} needs images, got rows of {input_shape[0]} features; "
            "use --model mlp or transformer."
        )
    if min(input_shape[1:]) < least:
        raise InputError(
            f"{spec.name} halves images {int(math.log2(least))} times and needs at least "
            f"{least} x {least} pixels, got {input_shape[1]} x {input_shape[2]}; "
            "use fewer widths or --model mlp."
        )
    return input_shape[0]


class MLP(nn.Sequential):
    """Linear, norm, ReLU for each width, then a linear read-out; images are flattened."""

    def __init__(self, spec: ModelSpec, input_shape: tuple[int, ...], classes: int) -> None:
        widths = spec.widths if spec.widths is not None else (128,)
        layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
        before = math.prod(input_shape)
        for width in widths:
            linear = nn.Linear(before, width)
            if spec.norm in _OF_BATCH and spec.norm_position == "before":
                # The norm would subtract it again. It is dropped only after it was drawn, so that
                # the weights that are drawn next do not depend on the norm.
                linear.register_parameter("bias", None)
            layers += [linear, *_activated(spec, width, 0)]
            if spec.dropout:
                layers.append(nn.Dropout(spec.dropout))
            before = width
        super().__init__(*layers, nn.Linear(before, classes))


def _conv(spec: ModelSpec, inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    # A shift before the norm would be subtracted again by it; only these two keep a mean.
    bias = spec.norm in ("none", "rms") or spec.norm_position == "after"
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return _with_bias(conv) if bias else conv


def _with_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """Give ``conv`` a bias that :func:`_draw_biases` is still to draw."""
    conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    return conv


def _draw_biases(model: nn.Module) -> None:
    """Draw the convolutions' biases as torch does, but after everything else.

    Which convolutions have one depends on the norm; the weights of a seed must not.
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            bound = 1 / math.sqrt(conv.weight[0].numel())
            nn.init.uniform_(conv.bias, -bound, bound)


class ConvNet(nn.Module):
    """3 x 3 convolutions in stages of falling size, then the maximum over positions.

    The first and last stage have one convolution, those between have two; a 2 x 2 maximum
    stands between stages. Activations are kept channels-last, which CPUs convolve faster.
    """

    def __init__(self, spec: ModelSpec, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        widths = spec.widths or (32, 64, 128)
        before = _images_only(spec, input_shape, 2 ** (len(widths) - 1))
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2 if 0 < stage < len(widths) - 1 else 1):
                layers += [_conv(spec, before, width), *_activated(spec, width, 2)]
                before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(spec.dropout),
            nn.Linear(before, classes),
        )
        _draw_biases(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        out: Tensor = self.head(self.features(x.contiguous(memory_format=torch.channels_last)))
        return out


class _Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016); the second ReLU follows the sum."""

    def __init__(self, spec: ModelSpec, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        after = spec.norm_position == "after"
        norm = norm_of(spec.norm, outputs, 2)
        self.body = nn.Sequential(
            _conv(spec, inputs, outputs, stride),
            *_activated(spec, outputs, 2),
            _conv(spec, outputs, outputs),
            nn.Identity() if after else norm,
        )
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            point = nn.Conv2d(inputs, outputs, 1, bias=False)
            point = _with_bias(point) if spec.norm == "none" else point
            self.shortcut = nn.Sequential(point, norm_of(spec.norm, outputs, 2))
        self.end = nn.Sequential(nn.ReLU(), *([norm] if after else []))

    def forward(self, x: Tensor) -> Tensor:
        # The positions that a 1 x 1 convolution of this stride reads. Given the stride itself,
        # oneDNN 3.12 (torch 2.13) writes past its memory in the gradient, channels-last and with
        # fewer than 8 channels.
        read = x if self.stride == 1 else x[..., :: self.stride, :: self.stride]
        out: Tensor = self.end(self.body(x) + self.shortcut(read))
        return out


class ResNet(nn.Module):
    """A small CIFAR-style residual network: a stem, one stage per width of two blocks each."""

    def __init__(self, spec: ModelSpec, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        widths = spec.widths or (16, 32, 64)
        channels = _images_only(spec, input_shape, 2 ** (len(widths) - 1))
        self.stem = nn.Sequential(_conv(spec, channels, widths[0]), *_activated(spec, widths[0], 2))
        blocks: list[nn.Module] = []
        for before, width in itertools.pairwise((widths[0], *widths)):
            blocks.append(_Residual(spec, before, width, 2 if blocks else 1))
            blocks.append(_Residual(spec, width, width, 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(spec.dropout),
            nn.Linear(widths[-1], classes),
        )
        _draw_biases(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        out: Tensor = self.head(self.blocks(x))
        return out


class _TokenNorm(nn.Module):
    """A normalization of tokens (N, L, C), which all but layer and RMS norm want as (N, C, L).

    Layer and RMS norm work on each token alone, as transformers use them.
    """

    def __init__(self, kind: NormName, width: int) -> None:
        super().__init__()
        per_token = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(kind)
        self.transposed = per_token is None and kind != "none"
        self.norm = norm_of(kind, width, 1) if per_token is None else per_token(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.transpose(1, 2) if self.transposed else x)
        return out.transpose(1, 2) if self.transposed else out


class _Block(nn.Module):
    """Self-attention and a two-layer MLP, each with a residual sum."""

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        self.pre = spec.norm_position == "before"
        heads = next(h for h in (4, 2, 1) if width % h == 0)
        self.attention = nn.MultiheadAttention(width, heads, spec.dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(spec.dropout),
            nn.Linear(2 * width, width),
        )
        self.norms = nn.ModuleList(_TokenNorm(spec.norm, width) for _ in range(2))

    def _attend(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out

    def forward(self, x: Tensor) -> Tensor:
        steps: tuple[Callable[[Tensor], Tensor], ...] = (self._attend, self.mlp)
        for norm, step in zip(self.norms, steps, strict=True):
            x = x + step(norm(x)) if self.pre else norm(x + step(x))
        return x


class Transformer(nn.Module):
    """A small encoder over image patches (Dosovitskiy et al. 2021) or over table cells.

    An image is cut into square patches, each one token; of a row, each feature is a token of
    its own, value times a learned direction plus a learned offset (Gorishniy et al. 2021).
    The tokens' mean is classified.
    """

    def __init__(self, spec: ModelSpec, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        widths: Sequence[int] = spec.widths or (64, 64)
        if len(set(widths)) != 1:
            raise InputError(f"transformer widths must all be equal, got {tuple(widths)!r}.")
        width = widths[0]
        self.embed: nn.Module
        if len(input_shape) == 3:
            channels, *size = input_shape
            patch = patch_of(size[0], size[1])
            tokens = (size[0] // patch) * (size[1] // patch)
            self.embed = nn.Conv2d(channels, width, patch, stride=patch)
            self.direction = None
        else:
            tokens = input_shape[0]
            self.direction = nn.Parameter(torch.randn(tokens, width) / math.sqrt(width))
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(spec, width) for _ in widths))
        last = spec.norm if spec.norm_position == "before" else "none"
        self.last_norm = _TokenNorm(last, width)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) or rows (N, F)."""
        if self.direction is None:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
        else:
            tokens = x.unsqueeze(2) * self.direction
        tokens = self.last_norm(self.blocks(tokens + self.position))
        out: Tensor = self.head(tokens.mean(1))
        return out


def patch_of(height: int, width: int) -> int:
    """The patch side, a common divisor of both, that gives nearest to 49 tokens."""
    sides = [s for s in range(1, min(height, width) + 1) if height % s == 0 and width % s == 0]
    return min(sides, key=lambda s: abs((height // s) * (width // s) - 49))


_ARCHITECTURES: dict[str, Callable[[ModelSpec, tuple[int, ...], int], nn.Module]] = {
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet": ResNet,
    "transformer": Transformer,
}
