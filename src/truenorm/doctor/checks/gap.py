"""The gap between running and exact statistics, measured in loss and shared out to layers.

The data are cut in halves, and each half is judged with the statistics of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from truenorm.doctor.check import (
    SEVERITIES,
    Check,
    Found,
    NotApplicable,
    dropouts_before,
    flow_of,
)
from truenorm.doctor.checks.batches import calls_differ
from truenorm.doctor.checks.halves import Study, fed, halved, norms_of, study_of
from truenorm.doctor.checks.harm import Harm, harm_of, in_order_of, measured_of
from truenorm.doctor.checks.misfit import TOLD, Misfit
from truenorm.doctor.checks.records import pooled_moments
from truenorm.doctor.checks.remedies import Remedy
from truenorm.doctor.checks.shares import MOST_NAMED, Shares, shared_out
from truenorm.doctor.checks.trial import tried, unhelpful
from truenorm.doctor.facts import Distance, Distances, Evaluation, Facts, NormFacts
from truenorm.doctor.ledger.book import Book
from truenorm.layers import recalibration
from truenorm.layers.functional import Moments

# What the cause tells of: the variance from half as much again, else the mean, or one channel.
NAMED_RATIO, NAMED_SHIFT = 1.5, 0.5
# Of the average, that the constructor's values still have: 44 batches with a momentum of 0.1.
BEGUN_SHARE = 0.01
LEAST_SHARE = 0.005  # what is told as 0 %, or is below, is no share


def train_eval_gap(facts: Facts) -> Iterator[Found]:
    """Running statistics that do not fit the data, and the layers that carry the harm."""
    norms = norms_of(facts)
    cut = halved(facts)
    norms, few = fed(facts, norms, cut)
    study = study_of(facts, norms, cut)
    running = study.judged(()) if len(facts.batches) < 2 else in_order_of(study, facts.evaluated)
    exact = study.judged(norms)
    facts.distances = _distances(study)
    misfits, lead = _misfits(study), None
    try:
        harm = harm_of(study, running, exact)
    except NotApplicable:  # a misfit is one without a measure of harm, too
        if not misfits:
            raise
        harm = None
    if harm is None and not misfits:
        return
    gap = harm is not None and harm.by_loss
    remedy = _remedy(facts, running, exact, gap=gap)
    if harm is not None:
        shares = shared_out(study, running, exact, by_loss=harm.by_loss)
        lead = shares.lead()[0]
        found = _of_harm(study, harm, shares, misfits.get(lead))
        left = {"layers left out for too few values": few} if few else {}
        found = replace(found, evidence=found.evidence | left, fix=remedy.fix, advice=remedy.advice)
        yield found if gap else _lagging(facts, lead, found)
    for norm, misfit in misfits.items():
        if norm is not lead:
            found = _of_misfit(study, norm, misfit, measured_of(running, exact), remedy)
            yield found if gap else _lagging(facts, norm, found)


def _misfits(study: Study) -> dict[NormFacts, Misfit]:
    """The layers whose statistics are off by themselves, in the order of the forward.

    Dropout in training makes variances larger than these data have; TN403 tells of that.
    """
    facts = study.facts
    flow, modules = flow_of(facts), dict(facts.model.named_modules())
    found = {}
    for norm in study.norms:
        misfit = study.misfit(norm)
        calls = [call.input for call in flow.calls_of(norm.name) if call.input is not None]
        dropped = any(dropouts_before(flow, number, modules) for number in calls)
        if misfit.severity == "error" or (misfit.severity and not dropped):
            found[norm] = misfit
    return found


def _distances(study: Study) -> Distances:
    """Of all layers, against exact statistics."""
    layers = (
        Distance(norm.name, 1 / study.variance_ratio(norm), study.usual_shift(norm))
        for norm in study.norms
    )
    # A misfit of TOLD, in every channel and of one kind alone.
    alone = math.sqrt(TOLD)
    return Distances("exact", "TN103", tuple(layers), math.exp(alone), alone)


def _remedy(facts: Facts, running: Evaluation, exact: Evaluation, *, gap: bool) -> Remedy:
    """Recalibration, if it is no worse by its own measure; else what was tried."""
    trial, now, best = tried(facts), running.loss, exact.loss
    if trial is not None:
        if trial.worse and gap:
            return Remedy(
                None,
                "Tried: on the batches that truenorm.recalibrate(model, data) holds out the loss "
                f"gets worse ({trial.change}), so it puts the old statistics back, though on all "
                f"of these data it falls ({now:.4g} -> {best:.4g}). Give it more data, or "
                "held_out=; keep_worse=True takes the exact ones.",
            )
        if trial.worse:
            return Remedy(None, unhelpful(facts))
        told = f"{TN103.advice} Tried: the held-out loss goes {trial.change}."
        return Remedy(lambda: _recalibrate(facts), told)
    if now is not None and best is not None and best > now:
        return Remedy(
            None,
            f"On half of the batch the loss is {now:.4g}, and {best:.4g} with exact statistics of "
            "the other half: give more batches to see whether truenorm.recalibrate(model, data) "
            "helps, or train on.",
        )
    return Remedy(lambda: _recalibrate(facts))


def _lagging(facts: Facts, norm: NormFacts, found: Found) -> Found:
    """``found``, a note where training has only begun and recalibrating would not help."""
    trial = tried(facts)
    batches = norm.tracked[2] if norm.tracked is not None else 0
    share = (1 - (norm.momentum or 0.0)) ** max(batches, 0)
    if trial is None or not trial.worse or not BEGUN_SHARE < share < 1:
        return found
    cause = (
        f"{found.cause}. They lag behind, for training has only begun ({batches} batches); tried: "
        f"recalibrating makes the held-out loss worse ({trial.change}), so train on"
    )
    return replace(found, severity="note", cause=cause)


def _of_harm(study: Study, harm: Harm, shares: Shares, misfit: Misfit | None) -> Found:
    """What the statistics do worse, and the layer that carries it."""
    lead, share, alone = shares.lead()
    where = lead.name or "(model)"
    sits = f"{min(max(share, 0), 1):.0%} of the gap sits in {where}"
    if not alone:
        most = f"the most of it, {share:.0%}, sits in {where}"
        if share < LEAST_SHARE:
            most = f"of the layers looked at, that which is off most is {where}"
        sits = f"no layer carries the gap alone; {most}"
    evidence = harm.evidence | _evidence_of(study, shares) | _evidence_of_misfit(study, lead)
    evidence["measured on"] = shares.measured
    severities = {harm.severity, *([] if misfit is None else [misfit.severity])}
    severity = next(s for s in SEVERITIES if s in severities)
    cause = f"{sits}, whose {_fault_of(study, lead)}"
    return Found(lead.name, severity, cause, evidence)


def _of_misfit(
    study: Study,
    norm: NormFacts,
    misfit: Misfit,
    measured: dict[str, Any],
    remedy: Remedy,
) -> Found:
    """Statistics that are off by so much that they are wrong, whatever they do here."""
    evidence = measured | _evidence_of_misfit(study, norm) | {"misfit": misfit.size}
    cause = f"its {_fault_of(study, norm)}: they are not the statistics of what it gets"
    assert misfit.severity is not None
    return Found(norm.name, misfit.severity, cause, evidence, *remedy)


def _evidence_of_misfit(study: Study, norm: NormFacts) -> dict[str, Any]:
    return {
        "exact over running variance": study.variance_ratio(norm),
        "shift of the mean in standard deviations": study.shift(norm),
    }


def evaluated_on_others(book: Book, facts: Facts) -> Iterator[Found]:
    """What a model was evaluated on is not what its statistics were made of.

    Only the first norm of a forward is judged: what the others get depends on it.
    """
    found = []
    for layer in book.called:
        rested = [r for r in layer.records if r.tracked is not None and r.mean is not None]
        last = [r for r in rested if r.step == rested[-1].step]
        if not last or last[0].tracked is None:
            continue
        mean, var = last[0].tracked.double().cpu()
        inputs = pooled_moments(last, one=False)
        differ, shift, ratio = calls_differ([inputs, Moments(mean[None], var[None], inputs.count)])
        if differ:
            cause = "the data it was evaluated on have other moments than those it was trained on"
            evidence = {"shift in standard deviations": shift, "variances": ratio}
            found.append(Found(layer.name, "warning", cause, evidence))
    if not found:
        raise NotApplicable("needs data")  # a part of the answer is no pass
    yield from found


TN103 = Check(
    "TN103",
    "Running statistics do not fit the data",
    look=train_eval_gap,
    watched=evaluated_on_others,
    looks_at="data",
    evaluates=True,
    advice="Run truenorm.recalibrate(model, data).",
)


def _recalibrate(facts: Facts) -> None:
    assert facts.call is not None
    recalibration.recalibrate(
        facts.model,
        facts.batches,
        held_out=facts.held_out,
        loss=facts.loss,
        device=facts.call.device,
        arguments=facts.arguments,
    )


def _evidence_of(study: Study, shares: Shares) -> dict[str, Any]:
    """The three largest shares, alone, and cumulative in the order of the forward."""
    evidence: dict[str, Any] = {}
    largest = sorted(shares.cumulative, key=lambda n: -max(shares.alone[n], shares.cumulative[n]))
    for norm in largest[:MOST_NAMED]:
        evidence[f"share of {norm.name or '(model)'} alone"] = shares.alone[norm]
        evidence[f"share of {norm.name or '(model)'} in turn"] = shares.cumulative[norm]
    return evidence


def _fault_of(study: Study, norm: NormFacts) -> str:
    ratio, shift = study.variance_ratio(norm), study.shift(norm)
    if max(ratio, 1 / ratio) > NAMED_RATIO:
        return f"running variance is {_times(ratio)}"
    channel, ratio = study.worst_ratio(norm)
    if shift < NAMED_SHIFT and max(ratio, 1 / ratio) > NAMED_RATIO:
        return f"running variance is {_times(ratio)} in channel {channel}"
    return f"running mean is off by {shift:.1f} standard deviations"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x too small" if ratio > 1 else f"{1 / ratio:.1f}x too large"
