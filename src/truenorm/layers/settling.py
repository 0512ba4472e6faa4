"""Exact running statistics from batches: passes, pooled moments, and their writing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.calling.call import Call
from truenorm.layers import functional
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.functional import Moments, widest
from truenorm.layers.ranks import Collective

SAME = 1e-12  # relative; what differs by less is rounding in float64


def chosen(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of ``model`` that :func:`recalibrate` would give new statistics."""
    learns = any(p.requires_grad for p in model.parameters())
    named = (m for m in model.modules() if isinstance(m, _BatchNorm))
    return [m for m in named if not why_kept(m, training=model.training, learns=learns)]


def why_kept(layer: _BatchNorm, *, training: bool, learns: bool) -> str:
    """Why ``layer`` keeps its statistics, or "" if it does not."""
    if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
        return "tracks no running statistics"
    if isinstance(layer, BatchNorm) and layer.options.frozen:
        return "is frozen"
    fixed = not any(p.requires_grad for p in layer.parameters())
    if training and fixed and not layer.training:
        return "is frozen: in eval mode within a model in train mode, and without a gradient"
    if not training and fixed and learns and layer.affine:
        return "is frozen: its weight and bias need no gradient, others of the model do"
    return ""


@torch.no_grad()
def settle(call: Call, layers: Collection[_BatchNorm], batches: Sequence[Any]) -> None:
    """Write into ``layers`` the exact statistics of ``batches``, of this process alone.

    The caller has put the model in eval mode and gives back what it borrows. Values are read in
    float32, which is enough to tell statistics that fit from others; a single batch takes one pass.
    """
    ranks = Collective(call.device, alone=True)
    converge(call, layers, batches, ranks, total=len(batches), exact=True, to=functional.wide)


class Convergence(NamedTuple):
    """What the last pass saw, how many there were, and whether it changed nothing any more."""

    seen: dict[_BatchNorm, InputMoments]
    passes: int
    reached: bool


def converge(
    call: Call,
    norms: Collection[_BatchNorm],
    batches: Iterable[Any],
    ranks: Collective,
    *,
    total: int,
    exact: bool,
    to: Callable[[Tensor], Tensor] = widest,
) -> Convergence:
    """Pass over the data until the statistics are those of what inference gives each layer."""
    seen: dict[_BatchNorm, InputMoments] = {}
    most = len(norms) + 1 if norms else 0
    for done in range(1, most + 1):
        own = done == 1 and (total == 1 or not exact)
        old, seen = (
            seen,
            ranks.jointly(
                lambda own=own: _pass(call, norms, batches, own=own, to=to)  # type: ignore[misc]
            ),
        )
        _join(seen, ranks)
        changed = [_write(layer, seen[layer].moments) for layer in norms]
        if own and (not exact or all(part.calls <= 1 for part in seen.values())):
            return Convergence(seen, done, True)
        same = done > 1 and all(_same(old[n].moments, seen[n].moments) for n in norms)
        # Ranks must agree: before the first pass their statistics may differ.
        if not own and not any(ranks.counts(any(changed) and not same)):
            return Convergence(seen, done, True)
    return Convergence(seen, most, not norms)


def _same(a: Moments, b: Moments) -> bool:
    """Whether two passes saw the same, up to rounding in float64."""
    std = b.var.sqrt()
    means = (a.mean - b.mean).abs() <= SAME * (b.mean.abs() + std)
    return bool((means & ((a.var - b.var).abs() <= SAME * b.var)).all())


class InputMoments:
    """The moments of what one layer is given in a pass, (1, C) in float64, and how often."""

    def __init__(self, layer: _BatchNorm) -> None:
        mean, _ = running_statistics(layer)
        self.moments = Moments(*(torch.zeros_like(widest(mean))[None] for _ in range(3)))
        self.calls = self.skipped = 0

    def add(self, x: Tensor, mask: Tensor | None, to: Callable[[Tensor], Tensor]) -> Moments | None:
        """Take in one input; None if it does not count: not finite, or not (N, C, *S)."""
        self.calls += 1
        if x.ndim < 2 or x.shape[1] != self.moments.mean.shape[1]:
            self.skipped += 1  # if it is wrong, the layer itself says so best
            return None
        if mask is not None:
            mask = functional.valid(mask, x)
            x = torch.where(mask, x, 0)
        part = functional.moments(to(x), mask)
        if not bool(torch.isfinite(part.mean).all() & torch.isfinite(part.var).all()):
            self.skipped += 1
            return None
        self.moments = functional.pool(functional.joined([self.moments, part]))
        return part


def _pass(
    call: Call,
    layers: Iterable[_BatchNorm],
    batches: Iterable[Any],
    *,
    own: bool,
    to: Callable[[Tensor], Tensor] = widest,
) -> dict[_BatchNorm, InputMoments]:
    """What each layer is given over all batches.

    Args:
        own: each input is normalized by its own statistics instead of the running ones.
        to: what inputs are made of before their moments are taken; sums are float64 either way.
    """
    seen = {layer: InputMoments(layer) for layer in layers}

    def look(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        part = seen[layer].add(*_input_of(layer, args, kwargs), to)
        if own and part is not None:
            _write(layer, part)

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in seen]
    try:
        for batch in batches:
            call(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _input_of(layer: _BatchNorm, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a call of ``layer`` gives it, and the mask."""
    x: Any = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    mask: Tensor | None = None
    if isinstance(layer, BatchNorm):
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
    return x, mask


def _join(seen: dict[_BatchNorm, InputMoments], ranks: Collective) -> None:
    """Pool ``seen`` over ranks: counts and sums first, then squares about the common mean."""
    parts = list(seen.values())
    if not parts:
        return
    home = parts[0].moments.mean.device
    count, mean, var = (torch.cat([p.moments[i][0].to(home) for p in parts]) for i in (2, 0, 1))
    calls = count.new_tensor([[p.calls, p.skipped] for p in parts]).flatten()
    channels = len(count)
    first = ranks.sum(torch.cat([count, mean * count, calls]))
    total, sums, calls = torch.split(first, [channels, channels, len(calls)])
    common = sums / total.clamp(min=1)
    squares = ranks.sum((var + (mean - common).square()) * count)
    pooled = Moments(common, squares / total.clamp(min=1), total)
    sizes = [p.moments.mean.shape[1] for p in parts]
    split = zip(*(torch.split(column, sizes) for column in pooled), strict=True)
    for part, columns, (called, skipped) in zip(
        parts, split, calls.view(-1, 2).tolist(), strict=True
    ):
        part.moments = Moments(*(c[None].to(part.moments.mean.device) for c in columns))
        part.calls, part.skipped = int(called), int(skipped)


def _write(layer: _BatchNorm, pooled: Moments) -> bool:
    """Set the running statistics in the channels where they are sound; return if any changed."""
    old = running_statistics(layer)
    new = sound_statistics(layer, pooled)[:2]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    # .data: a backward that still waits holds the statistics, but does not look at them.
    layer.running_mean.data.copy_(new[0])
    layer.running_var.data.copy_(new[1])
    return not all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def sound_statistics(layer: _BatchNorm, pooled: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and unbiased variance in the buffers' dtype, and in which channels they are sound.

    That is, of more than one value, and finite: a half-precision buffer ends at 65504.
    """
    old_mean, old_var = running_statistics(layer)
    mean = pooled.mean[0].to(old_mean.dtype)
    var = functional.unbiased(pooled.var, pooled.count)[0].to(old_var.dtype)
    sound = (pooled.count > 1)[0] & torch.isfinite(mean) & torch.isfinite(var)
    return torch.where(sound, mean, old_mean), torch.where(sound, var, old_var), sound


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.detach().clone(), layer.running_var.detach().clone()
