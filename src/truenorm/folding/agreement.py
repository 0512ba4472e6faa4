"""What several examples, each of which may take another way through the forward, agree upon."""

from __future__ import annotations

from collections.abc import Sequence

from truenorm.folding.plan import ChangeSet, planned
from truenorm.folding.subject import INPUT, UNCALLED, Subject


def agreed(subjects: Sequence[Subject]) -> tuple[list[ChangeSet], dict[str, str]]:
    """Changes that are right for each example's forward, and the norms that stay with the reasons.

    A change that one example's forward allows is right in another's if that allows the same, or
    calls neither its norms nor its weights.
    """
    plans = [planned(subject) for subject in subjects]
    parts: list[ChangeSet] = []
    left = _left_in_all([left for _, left in plans])
    for found, _ in plans:
        for part in found:
            if any(_same(part, other) for other in parts):
                continue
            told = (_against(part, *one) for one in zip(subjects, plans, strict=True))
            if why := next(filter(None, told), ""):
                left |= dict.fromkeys(part.norms, why)
            else:
                parts.append(part)
    folded = {name for part in parts for name in part.norms}
    return parts, {name: why for name, why in left.items() if name not in folded}


def _left_in_all(lefts: list[dict[str, str]]) -> dict[str, str]:
    """Each norm that some example leaves, with a reason other than that it was not called."""
    merged: dict[str, str] = {}
    for left in lefts:
        for name, why in left.items():
            if merged.get(name, UNCALLED) == UNCALLED:
                merged[name] = why
    return merged


def _against(
    part: ChangeSet, subject: Subject, plan: tuple[list[ChangeSet], dict[str, str]]
) -> str:
    """Why a change is wrong in the forward of one example, with its own plan; "" if it is not."""
    found, left = plan
    if any(_same(part, other) for other in found):
        return ""
    reasons = [why for name in part.norms if (why := left.get(name, UNCALLED)) != UNCALLED]
    if reasons:
        return f"in another example: {reasons[0]}"
    used = {name for node in subject.flow.nodes for name in node.state}
    called = [name for name in part.norms if name == INPUT or subject.flow.calls_of(name)]
    weights = [one.weights.owner for one in part.destinations if one.weights.weight in used]
    if called or weights:
        return f"another example uses {(called or weights)[0] or '(model)'} in another way"
    return ""


def _same(one: ChangeSet, other: ChangeSet) -> bool:
    weights = [{d.weights.weight for d in part.destinations} for part in (one, other)]
    return one.norms == other.norms and weights[0] == weights[1]
