"""Which norms inference will have to compute, by the analysis that folds them."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.utils import parametrize

from truenorm.calling.flow import Call
from truenorm.doctor.check import Found, NotApplicable
from truenorm.doctor.facts import Facts
from truenorm.errors import InputError
from truenorm.folding.plan import planned
from truenorm.folding.subject import Subject


def not_foldable(facts: Facts) -> Iterator[Found]:
    """A norm that does not vanish into the weights before it, and why."""
    assert facts.call is not None
    given = facts.call.prepare(facts.batches[0])
    tracking = {norm.name: norm for norm in facts.batch_norms if norm.tracked is not None}
    if not any(norm.seen for norm in tracking.values()):
        raise NotApplicable("no batch norm with running statistics was called")
    try:
        subject = Subject.seen(facts.model, given.args, given.kwargs)
    except InputError as error:
        raise NotApplicable(str(error)) from error
    parts, left = planned(subject)
    becomes = {name: made for part in parts for name, made in part.norms.items()}
    for name, norm in tracking.items():
        if not norm.seen:
            continue
        into, form = becomes.get(name, ("", None))
        calls = subject.flow.calls_of(name)
        if "computed anew" in left.get(name, "") and _parametrized(subject, calls[0]):
            continue  # it can be written down, and then be folded
        evidence = {"calls": len(calls)}
        if form is None:
            yield Found(name, "note", left.get(name, "nothing takes it up"), evidence)
        elif form == "scale and shift":
            why = "no weights stand beside it: it becomes a scale and shift"
            yield Found(name, "note", why, evidence)
        elif form != "into producer":
            why = f"no weights stand before it; it can go into what is behind it: {into}"
            yield Found(name, "note", why, evidence)


def _parametrized(subject: Subject, call: Call) -> bool:
    """Whether what comes right before a norm has a parametrization."""
    if call.input is None:
        return False
    before = subject.flow.nodes[call.input].module
    return parametrize.is_parametrized(subject.model.get_submodule(before))
