"""Whether an example's answer depends on the examples beside it, and whether padding counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.calling import examples_of, part_of, tensors_in
from truenorm.doctor.checks import Found, NotApplicable
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.functional import moments, wide

# Answers of a half batch that differ by more of their size than any change of kernel explains.
MATES = 1e-3
# Padding that makes up a twentieth of the positions and moves a channel's mean by a quarter of a
# standard deviation, or its variance by half.
PADDED, PADDED_SHIFT, PADDED_RATIO = 0.05, 0.25, 1.5


def batch_mates(facts: Facts) -> Iterator[Found]:
    """An example's answer in evaluation depends on its batch, or padding enters the statistics."""
    batch = facts.batches[0]
    number = examples_of(batch)
    if number < 2:
        raise NotApplicable("a batch of one example")
    whole = _answer(facts, batch)
    if not bool(torch.isfinite(whole).all()):
        raise NotApplicable("the model's answer is not finite")
    if not torch.equal(whole, _answer(facts, batch)):
        raise NotApplicable("the model answers differently each time, even in eval mode")
    try:
        half = _answer(facts, part_of(batch, slice(number // 2), number))
    except Exception as error:  # a model may need the batch whole
        raise NotApplicable(f"half a batch cannot be given to it: {error}") from None
    if len(whole) == number and half.shape == whole[: number // 2].shape:
        size = float(whole.abs().mean()) or 1.0
        apart = float((half - whole[: number // 2]).abs().max()) / size
        if apart > MATES:
            culprits = [n.name for n in facts.batch_norms if n.tracked is None and n.seen]
            cause = "alone or with others, an example gets another answer"
            evidence = {"largest difference over mean answer": apart, "by": ", ".join(culprits)}
            yield Found(culprits[0] if culprits else None, "error", cause, evidence)
    yield from _padding(facts, batch)


def _answer(facts: Facts, batch: Any) -> Tensor:
    assert facts.call is not None
    with torch.no_grad():
        return next(tensors_in(facts.call(batch)[0])).detach().double()


def _first(value: Any, number: int, keep: int) -> Any:
    """The first ``keep`` of ``number`` examples, wherever an axis counts them."""
    if isinstance(value, Tensor):
        return value[:keep] if value.ndim and len(value) == number else value
    if isinstance(value, Mapping):
        return {k: _first(v, number, keep) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_first(v, number, keep) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _padding(facts: Facts, batch: Any) -> Iterator[Found]:
    mask = _real_positions(batch)
    if mask is None:
        return
    caught: dict[str, Tensor] = {}
    handles = []
    for norm in facts.batch_norms:

        def look(_: nn.Module, args: Any, kwargs: Any, norm: NormFacts = norm) -> None:
            if kwargs.get("mask") is None and len(args) == 1 and args[0].ndim == 3:
                caught.setdefault(norm.name, args[0].detach())

        handles.append(norm.module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        _answer(facts, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, x in caught.items():
        if x.shape[0] != mask.shape[0] or x.shape[2] != mask.shape[1]:
            continue
        every, kept = wide(x), mask[:, None].to(x.device)
        real, all_ = moments(torch.where(kept, every, 0), kept), moments(every)
        std = real.var.clamp(min=1e-12).sqrt()
        shift = float(((real.mean - all_.mean).abs() / std).max())
        ratio = float((real.var / all_.var.clamp(min=1e-12)).max())
        if shift > PADDED_SHIFT or ratio > PADDED_RATIO:
            cause = "padded positions enter its statistics in training"
            evidence = {
                "padded share": 1 - float(mask.double().mean()),
                "shift of the mean in standard deviations": shift,
                "variance without padding over variance with it": ratio,
            }
            yield Found(name, "warning", cause, evidence)
            return


def _real_positions(batch: Any) -> Tensor | None:
    """(N, L) bool: False in each example's constant tail, if tails of several lengths exist."""
    for x in tensors_in(batch):
        if x.ndim not in (2, 3) or x.shape[0] < 2:
            continue
        for axis in (1, 2)[: x.ndim - 1]:
            rows = x.movedim(axis, 1)
            if rows.shape[1] < 4:
                continue
            flat = rows.reshape(*rows.shape[:2], -1)
            same = (flat == flat[:, -1:]).all(2)
            tail = same.flip(1).cumprod(1).flip(1).bool()
            tail = tail & (tail.sum(1, keepdim=True) > 1)
            lengths = tail.sum(1)
            if float(tail.double().mean()) > PADDED and len(set(lengths.tolist())) > 1:
                return ~tail
    return None
