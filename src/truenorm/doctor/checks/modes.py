"""TN2xx: layers in a mode that their model does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from truenorm.doctor.check import Found, Severity, batch_norms, tracking
from truenorm.doctor.facts import Facts
from truenorm.layers.conversion import convert


def wrong_mode(facts: Facts) -> Iterator[Found]:
    """Layers in another mode than their model, and not by freezing."""
    norms = batch_norms(facts)
    if not facts.trains:
        for norm in norms:
            if norm.module.training and not norm.fixed and norm.module is not facts.inner:
                cause = "the model is in eval mode, this layer normalizes by the batch and moves"
                yield Found(norm.name, "error", cause, {"training": True}, norm.module.eval)
        return
    resting = [norm for norm in norms if not norm.module.training and not norm.fixed]
    chosen = len(resting) == len(norms)  # all of them: a choice, not an oversight
    for norm in resting:
        if not norm.learns:
            continue
        parent = facts.model.get_submodule(norm.name.rpartition(".")[0])
        severity: Severity = "warning" if parent.training and not chosen else "note"
        cause = "the model trains, this layer is in eval mode though weight and bias learn"
        yield Found(norm.name, severity, cause, {"training": False}, norm.module.train)


def half_frozen(facts: Facts) -> Iterator[Found]:
    """requires_grad is off, but statistics move in train mode."""
    trains = facts.trains
    others = any(p.requires_grad for p in facts.model.parameters())
    for norm in tracking(facts):
        own = list(norm.module.parameters(recurse=False))
        if not own or norm.learns or norm.fixed:
            continue
        module = norm.module

        def mend(module: nn.Module = module) -> None:
            convert(module, to="frozen")

        if norm.module.training:
            cause = "weight and bias are frozen, running statistics are buffers and still move"
            severity: Severity = "error" if others else "warning"
            if _follows(facts.model, norm.name):
                cause, severity = "the target of a network that learns moves statistics", "note"
            yield Found(norm.name, severity, cause, {"training": True}, mend)
        elif trains and others:
            cause = "it is frozen by eval(), which the next train() undoes"
            yield Found(norm.name, "note", cause, {"training": False}, mend)


def _follows(model: nn.Module, name: str) -> bool:
    """Whether a norm is in a part that is frozen whole beside a part of its kind that learns.

    So a target network is, as BYOL's, which normalizes by its own batches by design. Members of a
    list are layers that follow each other.
    """
    parts = {part: module for part, module in model.named_children() if not part.isdigit()}
    target = parts.get(name.partition(".")[0])
    if target is None or any(p.requires_grad for p in target.parameters()):
        return False
    return any(
        shapes(part) == shapes(target) and any(p.requires_grad for p in part.parameters())
        for part in parts.values()
    )


def shapes(module: nn.Module) -> tuple[Any, ...]:
    """Names and shapes of all that it holds; those of a copy are the same."""
    return tuple((k, tuple(v.shape)) for k, v in module.state_dict().items())


def batch_statistics_at_inference(facts: Facts) -> Iterator[Found]:
    """No running statistics: an answer depends on the other examples."""
    for norm in batch_norms(facts):
        if norm.tracked is None:
            cause = "track_running_stats=False: evaluation uses the batch's statistics"
            yield Found(norm.name, "warning", cause, {"track_running_stats": False})
