"""Recalibration tried before it is advised, by the measure of truenorm.recalibrate itself."""

from __future__ import annotations

import torch

from truenorm.calling.borrowing import borrowed, to_eval
from truenorm.doctor.checks.halves import settle
from truenorm.doctor.facts import Facts, Trial
from truenorm.layers import settling
from truenorm.layers.ranks import Collective
from truenorm.layers.recalibration import held_out_of, measured, worse


def tried(facts: Facts) -> Trial | None:
    """What the loss on held-out batches becomes; None where none can be measured.

    They are ``facts.held_out``, or else every tenth batch of the data, as for
    :func:`truenorm.recalibrate`. The model is left as it was.
    """
    if "recalibrate" not in facts.tried:
        facts.tried["recalibrate"] = _try(facts)
    return facts.tried["recalibrate"]


def unhelpful(facts: Facts) -> str | None:
    """What to say instead of advising recalibration, where that was tried and is no help."""
    trial = tried(facts)
    if trial is None or not trial.worse:
        return None
    return (
        f"Tried: recalibrating makes the held-out loss worse ({trial.change}), so "
        "truenorm.recalibrate(model, data) puts the old statistics back. Train on, if training has "
        "only begun; keep_worse=True takes the exact ones even so."
    )


def _try(facts: Facts) -> Trial | None:
    chosen = set(settling.chosen(facts.model))
    norms = [norm for norm in facts.batch_norms if norm.module in chosen]
    held_out, others = facts.held_out, facts.batches
    if held_out is None:
        numbers = held_out_of(len(others)) if len(others) > 1 else ()
        held_out = [others[i] for i in numbers]
        others = [batch for i, batch in enumerate(others) if i not in numbers]
    if not norms or not held_out:
        return None
    call = facts.call
    assert call is not None
    if call.prepare(held_out[0]).target is None:
        return None
    alone = Collective(call.device, alone=True)
    with borrowed(facts.model), torch.no_grad():
        to_eval(facts.model)
        before = measured(call, held_out, facts.loss, alone)
        settle(facts, norms, others)
        after = measured(call, held_out, facts.loss, alone)
    if before.loss is None or after.loss is None:
        return None
    return Trial(before.loss, after.loss, worse=worse(before, after))
