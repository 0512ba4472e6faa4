"""Whether an example's answer depends on the examples beside it, and whether padding counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.calling.call import answers_of
from truenorm.calling.flow import Node
from truenorm.calling.nested import examples_of, part_of, tensors_in
from truenorm.doctor.check import Check, Found, NotApplicable
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.layers.functional import moments, wide

# Answers of a half batch that differ by more of their size than any change of kernel explains: in
# float32 sums of thousands of terms in another order; in shorter types 16 units in the last place.
MATES, MATES_EPS = 1e-3, 16
# Padding that makes up a twentieth of the positions and moves a channel's mean by a quarter of a
# standard deviation, or its variance by half.
PADDED, PADDED_SHIFT, PADDED_RATIO = 0.05, 0.25, 1.5
_STATISTICS = {
    *("mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "vector_norm", "logsumexp"),
    *("max", "min", "amax", "amin", "aminmax", "median", "quantile"),
}
LEAST_POSITIONS = 4  # of a sequence, or what a strided layer leaves of it
# Keys of a dict batch, with what their masks have at a real position.
MASKS = {
    "attention_mask": True, "input_mask": True, "mask": True,
    "padding_mask": False, "key_padding_mask": False, "src_key_padding_mask": False,
    "pad_mask": False,
}  # fmt: skip


def batch_mates(facts: Facts) -> Iterator[Found]:
    """An example's answer in evaluation depends on its batch, or padding enters the statistics."""
    batch = facts.batches[0]
    if examples_of(batch) < 2:
        raise NotApplicable("a batch of one example")
    unseen: NotApplicable | None = None
    try:
        yield from _mates(facts, batch)
    except NotApplicable as why:
        unseen = why
    padded = list(_padding(facts, batch))
    yield from padded
    if unseen is not None and not padded:
        raise unseen


TN304 = Check(
    "TN304",
    "Answers depend on batch mates or padding",
    look=batch_mates,
    looks_at="data",
    evaluates=True,
    advice="Track running statistics; give truenorm's norms the mask.",
)


def _mates(facts: Facts, batch: Any) -> Iterator[Found]:
    """Whether the first half of the batch, alone, gets other answers."""
    number = examples_of(batch)
    whole = _answers(facts, batch)
    if whole is None:
        raise NotApplicable("the model's output has no tensor with an entry for each example")
    if not bool(torch.isfinite(whole).all()):
        raise NotApplicable("the model's answer is not finite")
    again = _answers(facts, batch)
    if again is None or not torch.equal(whole, again):
        raise NotApplicable("the model answers differently each time, even in eval mode")
    keep = number // 2
    try:
        half = _answers(facts, part_of(batch, slice(keep), number))
    except Exception as error:  # a model may need the batch whole
        raise NotApplicable(f"half a batch cannot be given to it: {error}") from None
    if half is None or half.shape != whole[:keep].shape:
        raise NotApplicable("answers have another shape for half a batch")
    size = float(whole.double().abs().mean()) or 1.0
    apart = float((half.double() - whole[:keep].double()).abs().max()) / size
    limit = max(MATES, MATES_EPS * _coarsest(facts.model, whole))
    if apart <= limit:
        return
    culprits = _culprits(facts)
    evidence: dict[str, Any] = {"largest difference over mean answer": apart, "limit": limit}
    pooled = _pooled_over_examples(facts, number)
    if culprits:
        evidence["by"] = ", ".join(name or "(model)" for name in culprits)
        cause = "alone or with others, an example gets another answer"
        yield Found(culprits[0] or None, "error", cause, evidence)
    elif pooled is not None:
        evidence["by"] = f"{pooled.op} over the batch in {pooled.module or '(model)'}"
        cause = "alone or with others, an example gets another answer: statistics by hand"
        yield Found(pooled.module or None, "warning", cause, evidence)
    else:
        cause = "examples meet in evaluation, by no normalization: as in routing with a capacity"
        yield Found(None, "note", cause, evidence)


def _coarsest(model: nn.Module, answers: Tensor) -> float:
    """The largest eps of the types that the answers went through, as far as parameters tell."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return max(torch.finfo(dtype).eps for dtype in {answers.dtype, *floating})


def _culprits(facts: Facts) -> list[str]:
    """Modules that normalize by the batch in evaluation, in the order of the forward."""
    assert facts.flow is not None
    untracked = {norm.name for norm in facts.batch_norms if norm.tracked is None and norm.seen}
    own = [
        node.module
        for node in facts.flow.nodes
        if node.op == "batch_norm" and node.keywords.get("training") is True
    ]
    called = [call.module for call in facts.flow.calls if call.module in untracked]
    return list(dict.fromkeys([*called, *own]))


def _pooled_over_examples(facts: Facts, number: int) -> Node | None:
    """What takes a statistic over the batch's axis, if anything: a normalization by hand."""
    assert facts.flow is not None
    nodes = facts.flow.nodes
    for node in nodes:
        if node.op not in _STATISTICS or len(node.inputs) != 1:
            continue
        before, after = nodes[node.inputs[0]].shape, node.shape
        if len(before) < 2 or before[0] % number or not before[0]:
            continue
        if after in ((), before[1:]) or (len(after) == len(before) and after[0] == 1):
            return node
    return None


def _answers(facts: Facts, batch: Any) -> Tensor | None:
    assert facts.call is not None
    with torch.no_grad():
        found = answers_of(facts.call(batch)[0], examples_of(batch))
    return None if found is None else found.detach()


# -- padding --------------------------------------------------------------------------------------


def _padding(facts: Facts, batch: Any) -> Iterator[Found]:
    real = _real_by_name(batch)
    if real is None:
        assert facts.call is not None
        prepared = facts.call.prepare(batch)
        real = _real_by_tails((prepared.args, prepared.kwargs))
    if real is None:
        return
    for name, x in _sequences(facts, batch).items():
        if x.shape[0] != real.shape[0] or not LEAST_POSITIONS <= x.shape[2] <= real.shape[1]:
            continue
        # Behind a stride a position is real if any that it came from was.
        mask = F.adaptive_max_pool1d(real[:, None].to(x.device, torch.float32), x.shape[2]) > 0
        padded = 1 - float(mask.double().mean())
        if padded <= PADDED:
            continue
        every = wide(x)
        within, all_ = moments(torch.where(mask, every, 0), mask), moments(every)
        std = within.var.clamp(min=1e-12).sqrt()
        shift = float(((within.mean - all_.mean).abs() / std).max())
        ratio = float((within.var / all_.var.clamp(min=1e-12)).max())
        if shift > PADDED_SHIFT or ratio > PADDED_RATIO:
            evidence = {
                "padded share": padded,
                "shift of the mean in standard deviations": shift,
                "variance without padding over variance with it": ratio,
            }
            cause = "padded positions enter its statistics in training"
            yield Found(name, "warning", cause, evidence)
            return


def _sequences(facts: Facts, batch: Any) -> dict[str, Tensor]:
    """What each batch norm gets that training moves: (N, C, L), if no mask comes with it."""
    caught: dict[str, Tensor] = {}
    handles = []
    for norm in facts.batch_norms:
        if not facts.moves(norm):
            continue

        def look(_: nn.Module, args: Any, kwargs: Any, norm: NormFacts = norm) -> None:
            bare = kwargs.get("mask") is None and len(args) == 1 and isinstance(args[0], Tensor)
            if bare and args[0].ndim == 3 and args[0].is_floating_point():
                caught.setdefault(norm.name, args[0].detach())

        handles.append(norm.module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        assert facts.call is not None
        with torch.no_grad():
            facts.call(batch)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _real_by_name(batch: Any) -> Tensor | None:
    """(N, L) bool: the mask that a dict batch holds, True where positions are real."""
    for name, kept in MASKS.items() if isinstance(batch, Mapping) else ():
        mask = batch.get(name)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < LEAST_POSITIONS:
            continue
        if not bool(((mask == 0) | (mask == 1)).all()):
            continue
        real = mask.bool() if kept else ~mask.bool()
        # Padding is at one end of a row: there it changes once at most.
        if bool(((real[:, 1:] != real[:, :-1]).sum(1) <= 1).all() & real.any(1).all()):
            return real
    return None


def _real_by_tails(arguments: Any) -> Tensor | None:
    """(N, L) bool: False in each example's constant tail, if tails of several lengths exist."""
    for x in tensors_in(arguments):
        if x.ndim not in (2, 3) or x.shape[0] < 2:
            continue
        for axis in (1, 2)[: x.ndim - 1]:
            rows = x.movedim(axis, 1)
            if rows.shape[1] < LEAST_POSITIONS:
                continue
            flat = rows.reshape(*rows.shape[:2], -1)
            same = (flat == flat[:, -1:]).all(2)
            tail = same.flip(1).cumprod(1).flip(1).bool()
            tail = tail & (tail.sum(1, keepdim=True) > 1)
            lengths = tail.sum(1)
            ends = flat[lengths > 0, -1]
            if (ends != ends[:1]).any():  # what pads is the same for all
                continue
            if float(tail.double().mean()) > PADDED and len(set(lengths.tolist())) > 1:
                return ~tail
    return None
