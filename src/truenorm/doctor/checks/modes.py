"""TN2xx: layers in a mode that their model does not have, and writes that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from truenorm.doctor.check import Check, Found, NotApplicable, Severity, batch_norms, tracking
from truenorm.doctor.checks.batches import calls_differ
from truenorm.doctor.checks.records import comparable, pooled_moments
from truenorm.doctor.checks.remedies import Remedy, converting
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.doctor.ledger.book import RENEWED, Book, Layer, Strays


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


def stepped_in_eval_mode(book: Book, facts: Facts) -> Iterator[Found]:
    """Steps made with forwards in eval mode."""
    if not book.steps:
        raise NotApplicable("no step of an optimizer was seen")
    trained = any(layer.trained for layer in book.called)
    whole = book.resting_steps * 2 > book.steps
    for layer in book.called:
        if not layer.rested_stepped or not layer.learns:
            continue
        evidence = {
            "steps": book.steps,
            "steps with the model in eval mode": book.resting_steps,
            "forwards in train mode": layer.trained,
        }
        if whole and not trained:
            yield Found(layer.name, "warning", "training ran in eval mode", evidence)
        elif whole:
            cause = "most steps were made in eval mode: train() was not called again"
            yield Found(layer.name, "warning", cause, evidence)
        elif not layer.trained:
            cause = "it rested in eval mode while its weight and bias learned"
            yield Found(layer.name, "note", cause, evidence)


TN201 = Check(
    "TN201",
    "Layer in the wrong mode",
    look=wrong_mode,
    watched=stepped_in_eval_mode,
    advice="Switch the mode of the whole model at once; freeze with truenorm's frozen=True.",
)


def half_frozen(facts: Facts) -> Iterator[Found]:
    """requires_grad is off, but statistics move in train mode."""
    trains = facts.trains
    others = any(p.requires_grad for p in facts.model.parameters())
    for norm in tracking(facts):
        own = list(norm.module.parameters(recurse=False))
        if not own or norm.learns or norm.fixed:
            continue
        if norm.module.training:
            cause = "weight and bias are frozen, running statistics are buffers and still move"
            severity: Severity = "error" if others else "warning"
            if _follows(facts.model, norm.name):
                cause, severity = "the target of a network that learns moves statistics", "note"
            yield Found(norm.name, severity, cause, {"training": True}, *_freezing(norm))
        elif trains and others:
            cause = "it is frozen by eval(), which the next train() undoes"
            yield Found(norm.name, "note", cause, {"training": False}, *_freezing(norm))


def _freezing(norm: NormFacts) -> Remedy:
    return converting(norm.module, "frozen", "Call its eval() after each train() of the model.")


def moved_while_frozen(book: Book, facts: Facts) -> Iterator[Found]:
    """Weight and bias frozen, statistics not."""
    for layer in book.called:
        # Frozen in turns, as a discriminator is for the generator's step, is not meant to be fixed.
        if not layer.frozen or layer.toggles > 2:
            continue
        if not book.steps and not layer.unfrozen:
            continue  # nothing was trained
        evidence = {"writes": layer.frozen}
        weight = layer.module.weight
        then = layer.weight
        followed = then is not None and not torch.equal(weight.detach(), then.to(weight))
        if followed and not layer.unfrozen:
            cause = "weight and bias follow others, as an average does; its statistics are its own"
            yield Found(layer.name, "note", cause, evidence)
        else:
            cause = "weight and bias are frozen, and its statistics were moved"
            yield Found(layer.name, "error", cause, evidence)


TN202 = Check(
    "TN202",
    "Frozen but not frozen",
    look=half_frozen,
    watched=moved_while_frozen,
    advice="truenorm.convert(model, to='frozen', where=...) holds statistics and survives train().",
)


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


# Strays before nearly every step are a part of the step.
EVERY_STEP = 0.8
# A forward in a hundred that goes nowhere, each by itself, is a loss that was skipped.
SKIPPED = 0.01


def stray_writes(book: Book, facts: Facts) -> Iterator[Found]:
    """Writes that belong to no step of the training that is going on."""
    if not any(layer.stepped for layer in book.called):
        raise NotApplicable("no forward in train mode was followed by its step")
    judges = {
        "no gradients": _without_gradients,
        "unreached": _unreached,
        "attack": _attack,
        "discarded": _discarded,
    }
    for layer in book.called:
        if not layer.stepped:
            continue  # none of its writes is any training's: a target network, or a recalibration
        found = [
            verdict
            for kind, judge in judges.items()
            if (strays := layer.strays.get(kind)) and (verdict := judge(layer, strays, book))  # type: ignore[call-overload]
        ]
        yield from found[:1]


TN203 = Check(
    "TN203",
    "Statistics written by a forward that should not",
    watched=stray_writes,
    advice="Validate in eval mode; no_grad does not protect buffers.",
)


def _evidence(layer: Layer, strays: Strays) -> dict[str, object]:
    return {"such writes": strays.total, "of": layer.writes}


def _without_gradients(layer: Layer, strays: Strays, book: Book) -> Found | None:
    evidence = _evidence(layer, strays)
    if _every_step(layer, strays, book):
        return _regular(layer, "no gradients", evidence, "a forward under no_grad in train mode")
    severity: Severity = "note"
    cause = "many forwards in a row under no_grad ran in train mode: a recalibration, or a test"
    if strays.between:
        severity, cause = "error", "forwards under no_grad ran in train mode between steps"
    elif not (_renews(layer, strays.leading) or _renews(layer, strays.tail)):
        where = "before the first" if strays.leading else "after the last"
        severity, cause = "warning", f"forwards under no_grad ran in train mode {where} step"
    return Found(layer.name, severity, cause, evidence)


def _unreached(layer: Layer, strays: Strays, book: Book) -> Found | None:
    evidence = _evidence(layer, strays)
    if _every_step(layer, strays, book):
        return _regular(layer, "unreached", evidence, "a forward without its backward")
    single = max(strays.longest, strays.tail) == 1 and not strays.leading
    few = strays.total == 1 or strays.total <= SKIPPED * layer.writes
    cause = "forwards in train mode had no backward: a dummy pass, or a validation"
    if single and few:
        return Found(layer.name, "note", "a forward in train mode had no backward", evidence)
    return Found(layer.name, "warning", cause, evidence)


def _attack(layer: Layer, strays: Strays, book: Book) -> Found | None:
    cause = "forwards that an attack on the input made were written, too"
    return Found(layer.name, "warning", cause, _evidence(layer, strays))


def _discarded(layer: Layer, strays: Strays, book: Book) -> Found | None:
    if strays.total <= SKIPPED * layer.writes or strays.total < 2:
        return None  # steps that a gradient scaler skipped
    cause = (
        "forwards whose gradient was thrown away were written, too, as of the first half of a step "
        "of SAM, a generator's step or skipped steps"
    )
    return Found(layer.name, "note", cause, _evidence(layer, strays))


def _every_step(layer: Layer, strays: Strays, book: Book) -> bool:
    """Whether strays are a part of each step, and not made between one and the next.

    A validation after each step is told by its place: none came before the first step, some
    after the last.
    """
    steps = layer.steps if book.steps else layer.stepped
    after = strays.tail > 0 and not strays.leading and not strays.inside
    return steps > 2 and strays.runs >= EVERY_STEP * steps and not after


def _regular(layer: Layer, fate: str, evidence: dict[str, object], what: str) -> Found:
    """A forward besides in every step: it harms if its data are others."""
    groups = [[r for r in comparable(layer) if r.fate == f] for f in (fate, "stepped")]
    cause = f"{what} is a part of each step, and moves the statistics as well"
    if all(groups):
        differ, shift, ratio = calls_differ([pooled_moments(group, one=False) for group in groups])
        evidence |= {"shift in standard deviations": shift, "variances": ratio}
        if differ:
            return Found(layer.name, "warning", f"{cause}: its data are others", evidence)
    return Found(layer.name, "note", cause, evidence)


def _renews(layer: Layer, number: int) -> bool:
    """Whether so many writes make nearly all of the average, as a recalibration wants."""
    momentum = layer.momentum
    share = 1.0 if momentum is None else 1 - (1 - min(momentum, 1)) ** number
    return number > 0 and share >= RENEWED


def counted_in_backward(book: Book, facts: Facts) -> Iterator[Found]:
    """Writes of recomputed forwards."""
    for layer in book.called:
        if layer.in_backward:
            cause = "a forward that was repeated in the backward pass counted again"
            evidence = {"writes in backward": layer.in_backward, "of": layer.writes}
            yield Found(layer.name, "warning", cause, evidence)


TN204 = Check(
    "TN204",
    "Statistics written twice a step",
    watched=counted_in_backward,
    advice="truenorm.convert(model, to='truenorm'): recomputed forwards are not counted.",
)


def batch_statistics_at_inference(facts: Facts) -> Iterator[Found]:
    """No running statistics: an answer depends on the other examples."""
    for norm in batch_norms(facts):
        if norm.tracked is None:
            cause = "track_running_stats=False: evaluation uses the batch's statistics"
            yield Found(norm.name, "warning", cause, {"track_running_stats": False})


def predicted_in_train_mode(book: Book, facts: Facts) -> Iterator[Found]:
    """Forwards without gradients in train mode, where nothing was trained."""
    for layer in book.called:
        strays = layer.strays.get("no gradients")
        if book.steps or layer.stepped or strays is None:
            continue
        # Many in a row may be a recalibration; an average of another model has frozen weights.
        doubtful = _renews(layer, strays.total) or not layer.learns
        cause = "it ran in train mode without gradients, by the batch's own statistics"
        severity: Severity = "note" if doubtful else "warning"
        yield Found(layer.name, severity, cause, _evidence(layer, strays))


TN205 = Check(
    "TN205",
    "Batch statistics at inference",
    look=batch_statistics_at_inference,
    watched=predicted_in_train_mode,
    advice="Use track_running_stats=True and recalibrate, or a norm that needs no batch.",
)
