"""TN5xx: what a model loses when it is trained on many devices, converted, or shipped."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from truenorm.calling.flow import ModuleCall
from truenorm.doctor.check import WEIGHTED, Check, Found, NotApplicable, Severity, calls_of
from truenorm.doctor.facts import Facts, values_per_channel
from truenorm.errors import InputError
from truenorm.folding.plan import planned
from truenorm.folding.subject import Subject
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.ranks import distributed

# A rank's batch below this has noisier statistics than the joined one by more than a tenth.
SMALL_PER_RANK = 64
ONE_PROCESS = (
    "nn.DataParallel cannot pool statistics, and keeps those of its first device. Use "
    "DistributedDataParallel after truenorm.convert(model, to='sync')."
)


def unsynchronized(facts: Facts) -> Iterator[Found]:
    """Data-parallel training whose ranks, or devices, normalize apart."""
    ranks, devices = _ranks(facts.model), _devices(facts.model)
    if ranks < 2 and devices < 2:
        raise NotApplicable("one process, on one device")
    for norm in facts.batch_norms:
        module = norm.module
        synced = isinstance(module, BatchNorm) and module.options.sync
        joint = ranks > 1 and (synced or isinstance(module, nn.SyncBatchNorm))
        if joint or norm.fixed:
            continue
        # A batch that was given is a rank's; DataParallel cuts it further.
        counts = [values_per_channel(seen.shape) // devices for seen in norm.seen]
        if counts and max(counts) >= SMALL_PER_RANK:
            continue
        trains = (facts.trains or facts.optimizer is not None) and facts.moves(norm)
        severity: Severity = "warning" if counts and trains else "note"
        parts, one = (devices, "device") if devices > 1 else (ranks, "rank")
        evidence = {f"{one}s": parts, f"values per channel on a {one}": max(counts, default=None)}
        cause = f"each {one} normalizes its own small share of the batch"
        advice = ONE_PROCESS if devices > 1 else None
        yield Found(norm.name, severity, cause, evidence, advice=advice)


TN501 = Check(
    "TN501",
    "Ranks normalize apart",
    look=unsynchronized,
    advice="truenorm.convert(model, to='sync').",
)


def _ranks(model: nn.Module) -> int:
    """Processes that train together: of the wrapper's group, else of all."""
    if not distributed():
        return 1
    wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    sizes = [dist.get_world_size(m.process_group) for m in wrappers]
    return max(sizes, default=dist.get_world_size())


def _devices(model: nn.Module) -> int:
    """Devices over which DataParallel cuts a batch; without CUDA it has none and does not."""
    wrappers = [m for m in model.modules() if isinstance(m, nn.DataParallel)]
    return max((len(m.device_ids) for m in wrappers), default=1) or 1


def lost_behaviour(facts: Facts) -> Iterator[Found]:
    """A subclass whose behaviour a conversion drops, or has dropped."""
    own = [
        norm
        for norm in facts.batch_norms
        if not norm.foreign
        and not type(norm.module).__module__.startswith(("torch.", "truenorm."))
        and type(norm.module).forward is not _BatchNorm.forward
        and not isinstance(norm.module, BatchNorm)
    ]
    for norm in own:
        kind = type(norm.module).__name__
        cause = f"{kind} has a forward of its own, which convert_sync_batchnorm would drop"
        yield Found(norm.name, "note", cause, {"class": kind})
    idle = list(_unused_children(facts))
    yield from idle
    joint = [norm for norm in facts.batch_norms if isinstance(norm.module, nn.SyncBatchNorm)]
    if not joint or facts.flow is None:
        return
    flow, straight = facts.flow, []
    for norm, call in calls_of(facts, joint):
        if call.output is None:
            continue
        after = [flow.nodes[n] for n in flow.nodes[call.output].outputs]
        # An activation may come before the norm.
        bare = call.input is not None and flow.nodes[call.input].op in WEIGHTED
        if bare and after and all(node.op in WEIGHTED for node in after):
            straight.append(norm.name)
    if len(straight) * 2 > len(joint) and not idle:
        cause = "most norms go straight into the next layer: their activations have been lost"
        evidence = {"without activation": len(straight), "of": len(joint)}
        yield Found(straight[0], "error", cause, evidence)


# The forwards of torch's own, which call no child.
_CHILDLESS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _unused_children(facts: Facts) -> Iterator[Found]:
    """Batch norms that hold modules, with a forward that calls none.

    convert_sync_batchnorm hangs the children of what it replaces into the new layer.
    """
    idle: dict[str, list[str]] = {}
    for norm in facts.batch_norms:
        hooked = facts.flow is None and bool(norm.module._forward_hooks)  # a hook may call them
        if type(norm.module).forward in _CHILDLESS and not hooked:
            parts = [
                f"{name} ({type(child).__name__})"
                for name, child in norm.module.named_children()
                if name != "parametrizations" and not isinstance(child, nn.Identity)
                if facts.flow is None or not facts.flow.calls_of(f"{norm.name}.{name}".strip("."))
            ]
            if parts:
                idle[norm.name] = parts
    if idle:
        first = next(iter(idle))
        cause = f"its forward calls none of the modules in it: {', '.join(idle[first])}"
        evidence = {"layers": len(idle), "of": len(facts.batch_norms)}
        yield Found(first, "error", cause, evidence)


TN502 = Check(
    "TN502",
    "A subclass loses its behaviour",
    look=lost_behaviour,
    advice="Convert with truenorm.convert, which leaves such layers whole and names them.",
)


def not_foldable(facts: Facts) -> Iterator[Found]:
    """A norm that does not vanish into the weights before it, and why."""
    assert facts.call is not None
    call = facts.call.prepare(facts.batches[0])
    tracking = {norm.name: norm for norm in facts.batch_norms if norm.tracked is not None}
    if not any(norm.seen for norm in tracking.values()):
        raise NotApplicable("no batch norm with running statistics was called")
    try:
        subject = Subject.seen(facts.model, call.args, call.kwargs)
    except InputError as error:
        raise NotApplicable(str(error)) from error
    parts, left = planned(subject)
    becomes = {name: form for part in parts for name, form in part.norms.items()}
    for name, norm in tracking.items():
        if not norm.seen or (norm.foreign and name not in becomes and name not in left):
            continue  # folding knows no such norm
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


TN503 = Check(
    "TN503",
    "Cannot be folded",
    look=not_foldable,
    looks_at="data",
    evaluates=True,
    advice="truenorm.fold folds what it can, and tells the reason of the rest.",
)


def _parametrized(subject: Subject, call: ModuleCall) -> bool:
    """Whether what comes right before a norm has a parametrization."""
    if call.input is None:
        return False
    before = subject.flow.nodes[call.input].module
    return parametrize.is_parametrized(subject.model.get_submodule(before))
