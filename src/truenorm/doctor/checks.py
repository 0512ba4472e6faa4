"""The checks: a stable code, a question to the facts, and an answer with evidence or none.

Every threshold stands here, beside the reason for its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from truenorm import calling
from truenorm.borrowing import to_eval
from truenorm.conversion import convert
from truenorm.doctor.facts import Facts, NormFacts, values_per_channel
from truenorm.flow import Call, Flow, Node
from truenorm.functional import Moments, joined, moments, pool, wide
from truenorm.layers import BatchNorm
from truenorm.norms import RMSNorm

Severity = Literal["error", "warning", "note"]
Needs = Literal["model", "data", "optimizer", "ledger", "ranks"]


@dataclass(frozen=True)
class Found:
    """What a check saw: the layer (None for the model), numbers, and what they mean."""

    layer: str | None
    severity: Severity
    cause: str
    evidence: dict[str, Any] = field(default_factory=dict)
    fix: Callable[[], Any] | None = None
    advice: str | None = None  # where the check's own does not serve


class NotApplicable(Exception):
    """The check has nothing to look at in this model; the text says why."""


@dataclass(frozen=True)
class Check:
    """One fault that a model may have.

    Attributes:
        code: stable; documentation, baselines and tests use it.
        title: the fault in a few words.
        needs: what must be given to look for it.
        look: what was found, in the facts.
        advice: the remedy.
    """

    code: str
    title: str
    needs: Needs
    look: Callable[[Facts], Iterator[Found]]
    advice: str
    evaluates: bool = False  # whether the model must be in eval mode; else it is as given


def _tracking(facts: Facts) -> list[NormFacts]:
    norms = [norm for norm in facts.batch_norms if norm.tracked is not None]
    if not norms:
        raise NotApplicable("no batch norm with running statistics")
    return norms


def _batch_norms(facts: Facts) -> list[NormFacts]:
    if not facts.batch_norms:
        raise NotApplicable("no batch norm")
    return facts.batch_norms


def _flow(facts: Facts) -> Flow:
    assert facts.flow is not None
    return facts.flow


# -- TN1xx: statistics ------------------------------------------------------------------------


def never_updated(facts: Facts) -> Iterator[Found]:
    """Initial statistics in a trained model, or a momentum that never moves them."""
    untrained = facts.untrained
    for norm in _tracking(facts):
        mean, var, batches = norm.tracked  # type: ignore[misc]
        started = not mean.any() and bool((var == 1).all())
        called = not facts.batches or bool(norm.seen)
        evidence: dict[str, Any] = {"num_batches_tracked": batches}
        if started and not norm.fixed:
            affine = norm.learned[0] is not None
            # A new layer on a trained network has moved in nothing yet.
            new = batches <= 0 and affine and norm.initial
            severity: Severity = "note" if untrained or not called or new else "error"
            cause = "it never ran in train mode"
            if not called:
                cause = "it is not called either"
            elif untrained:
                cause = "the model has not been trained"
            elif new:
                cause = "neither its statistics nor its weight and bias have been trained"
            elif batches > 0:
                cause = "batches were counted, but a momentum of 0 never moved them"
            yield Found(norm.name, severity, cause, evidence)
        elif norm.module.momentum == 0 and not norm.fixed:
            cause = "momentum is 0: a batch never moves them"
            yield Found(norm.name, "warning", cause, evidence | {"momentum": 0.0})


def not_finite(facts: Facts) -> Iterator[Found]:
    """NaN or infinite statistics, gamma or beta."""
    for norm in _batch_norms(facts):
        held: dict[str, Tensor] = {}
        if norm.tracked is not None:
            held = {"running_mean": norm.tracked[0], "running_var": norm.tracked[1]}
        named = zip(("weight", "bias"), norm.learned, strict=True)
        held |= {name: tensor for name, tensor in named if tensor is not None}
        bad = {name: int((~torch.isfinite(t.detach())).sum()) for name, t in held.items()}
        bad = {name: number for name, number in bad.items() if number}
        negative = norm.tracked is not None and bool((norm.tracked[1] < 0).any())
        if bad:
            cause = "one batch that was not finite never leaves an average"
            yield Found(
                norm.name, "error", cause, {f"not finite in {k}": v for k, v in bad.items()}
            )
        elif negative:
            least = float(norm.tracked[1].min())  # type: ignore[index]
            yield Found(norm.name, "error", "a variance is negative", {"least running_var": least})


# After n batches the initial values weigh (1 - momentum)^n of the average. At a half, the average
# is as much the constructor's as the data's.
STALE_SHARE = 0.5
UNMOVED_SHARE = 0.8  # hardly the data's at all; between the two, TN103 measures whether it harms
# Above it the average is dominated by the last batch; frameworks of the opposite convention use
# 0.9 to 0.999, and the largest in common use with torch's is 0.3.
OTHER_CONVENTION = 0.5


def window(facts: Facts) -> Iterator[Found]:
    """A momentum that does not fit the number of steps, or is of the opposite convention."""
    for norm in _tracking(facts):
        _, var, batches = norm.tracked  # type: ignore[misc]
        momentum = norm.module.momentum
        if norm.fixed or not isinstance(momentum, (int, float)):
            continue
        if OTHER_CONVENTION < momentum <= 1:
            cause = "this momentum weighs the new batch; in Keras and Flax it weighs the average"
            module = norm.module

            def mend(module: nn.Module = module) -> None:
                convert(module, to="keras")

            evidence = {"momentum": momentum, "window in batches": 1 / momentum}
            # In inference it plays no part: what the statistics are worth, TN103 measures.
            moves = norm.module.training or facts.optimizer is not None
            severity: Severity = "warning" if moves else "note"
            yield Found(norm.name, severity, cause, evidence, mend if momentum < 1 else None)
        elif batches > 0 and momentum > 0:
            share = (1 - momentum) ** batches
            # A variance below the share that an initial 1 would have was never an initial 1.
            if share > STALE_SHARE and not norm.untouched:
                evidence = {
                    "momentum": momentum,
                    "num_batches_tracked": batches,
                    "share of the initial values": share,
                }
                cause = "too few batches for this momentum: the initial values still weigh most"
                possible = float(var.min()) >= 0.99 * share
                severity = "warning" if share > UNMOVED_SHARE and possible else "note"
                yield Found(norm.name, severity, cause, evidence)


def half_precision(facts: Facts) -> Iterator[Found]:
    """Running statistics kept in half precision."""
    for norm in _tracking(facts):
        mean, _, _ = norm.tracked  # type: ignore[misc]
        if mean.dtype.itemsize >= 4:
            continue
        momentum = norm.module.momentum or 0.0
        trains = facts.optimizer is not None or facts.trains
        module = norm.module

        def mend(module: nn.Module = module) -> None:
            convert(module, to="truenorm")

        yield Found(
            norm.name,
            "warning" if trains and facts.moves(norm) else "note",
            f"{mean.dtype} holds {_digits(mean.dtype)} digits: smaller updates are rounded away",
            {"dtype": str(mean.dtype), "momentum": momentum},
            mend,
        )


def _digits(dtype: torch.dtype) -> str:
    return f"{-math.log10(torch.finfo(dtype).eps):.1f}"


# A channel whose variance is below a hundredth of eps is normalized by eps: its signal is scaled
# down by ten or more. Single dead units are usual in a trained network: two at least, and a tenth
# of all channels, are more than that.
COLLAPSED_VAR = 0.01
COLLAPSED_GAMMA = 1e-4  # of the largest |gamma|
COLLAPSED_SHARE = 0.1
TINY_GAMMA = 1e-6  # a layer whose largest |gamma| is below it gives its bias alone
EXPLODED_VAR = 1e7


def collapsed(facts: Facts) -> Iterator[Found]:
    """Channels that carry nothing any more, or far too much."""
    first = next((norm.name for norm in facts.batch_norms), "")
    for norm in _tracking(facts):
        _, var, _ = norm.tracked  # type: ignore[misc]
        if norm.untouched or not torch.isfinite(var).all() or not len(var):
            continue
        flat = int((var < COLLAPSED_VAR * norm.eps).sum())
        gone = _gammas_gone(facts, norm)
        exploded = int((var > EXPLODED_VAR).sum())
        if not (flat or gone or exploded):
            continue
        evidence = {
            "channels": len(var),
            "variance below eps / 100": flat,
            "gamma near 0": gone,
            "largest running_var": float(var.max()),
        }
        many = max(2.0, COLLAPSED_SHARE * len(var)) if len(var) > 1 else 1
        # A norm of the data as they come meets constant and huge features by nature.
        raw = _takes_input(facts, norm) if facts.flow is not None else norm.name == first
        severe = gone >= many or ((flat >= many or exploded > 0) and not raw)
        cause = "their input is constant" if flat >= gone else "gamma has decayed to nothing"
        if exploded:
            cause = "the input of a channel has exploded"
        if raw and not gone:
            cause += ", in the data themselves" if facts.flow is not None else "; TN106 tells more"
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


def _gammas_gone(facts: Facts, norm: NormFacts) -> int:
    """How many gammas are nothing beside the largest, or by themselves."""
    weight = norm.learned[0]
    if weight is None:
        return 0
    size = weight.detach().abs()
    largest = float(size.max())
    if largest == 0:  # a residual branch starts so
        return 0 if facts.flow is None or _joins(facts.flow, norm) else len(size)
    return len(size) if largest < TINY_GAMMA else int((size < COLLAPSED_GAMMA * largest).sum())


def _joins(flow: Flow, norm: NormFacts) -> bool:
    """Whether its output is added to something else, or goes nowhere."""
    outputs = [call.output for call in flow.calls_of(norm.name) if call.output is not None]
    after = [flow.nodes[n] for output in outputs for n in flow.nodes[output].outputs]
    while after:
        node = after.pop()
        if node.op == "add" and len(node.inputs) > 1:
            return True
        if node.op in _SHAPING | {"dropout", "mul"}:
            after += [flow.nodes[n] for n in node.outputs]
    return not outputs


def _takes_input(facts: Facts, norm: NormFacts) -> bool:
    """Whether the norm works on the data as they come, but for their shape."""
    flow = _flow(facts)
    for call in flow.calls_of(norm.name):
        if call.input is None:
            continue
        node = flow.nodes[call.input]
        while node.op in _SHAPING | {"permute", "transpose"} and len(node.inputs) == 1:
            node = flow.nodes[node.inputs[0]]
        if node.op == "input":
            return True
    return False


# Copies that follow each other in every parameter to 10 % and differ by half a standard deviation
# in their statistics follow in the parameters alone.
TWIN_PARAMETERS = 0.1
TWIN_STATISTICS = 0.5


def copies_differ(facts: Facts) -> Iterator[Found]:
    """Two copies of a network, of which only the parameters are kept alike."""
    groups: dict[tuple[Any, ...], list[tuple[str, nn.Module]]] = {}
    for name, module in facts.model.named_modules():
        if not any(isinstance(m, _BatchNorm) for m in module.modules()) or not name:
            continue
        if any(is_lazy(tensor) for tensor in module.state_dict().values()):
            continue
        shapes = _shapes(module)
        if sum(p.numel() for p in module.parameters()) and not isinstance(module, _BatchNorm):
            groups.setdefault(shapes, []).append((name, module))
    pairs = [(a, b) for same in groups.values() for i, a in enumerate(same) for b in same[i + 1 :]]
    if not pairs:
        raise NotApplicable("the model holds no two copies of one network")
    told: set[str] = set()
    for (one, a), (other, b) in pairs:
        if any(f"{name}.".startswith(f"{bad}.") for bad in told for name in (one, other)):
            continue
        if a is b or _tied(a, b) or _parameter_distance(a, b) > TWIN_PARAMETERS:
            continue
        worst, layer = _statistics_distance(a, b)
        if worst > TWIN_STATISTICS:
            told.add(other)
            # Members of a list may be layers that follow each other, made as copies.
            stacked = one.rpartition(".")[2].isdigit() and other.rpartition(".")[2].isdigit()
            cause = f"{other} follows {one} in its parameters, not in its buffers"
            evidence = {"largest difference in standard deviations": worst, "copy": one}
            severity: Severity = "note" if stacked else "error"
            yield Found(f"{other}.{layer}" if layer else other, severity, cause, evidence)


def _tied(a: nn.Module, b: nn.Module) -> bool:
    """Whether they hold the same tensors: then norms of their own are meant."""
    own = {id(p) for p in a.parameters()}
    return any(id(p) in own for p in b.parameters())


def _parameter_distance(a: nn.Module, b: nn.Module) -> float:
    distance = scale = 0.0
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if p.ndim > 1:
            distance += float((p - q).detach().double().square().sum())
            scale += float(p.detach().double().square().sum())
    return math.sqrt(distance / scale) if scale else math.inf


def _statistics_distance(a: nn.Module, b: nn.Module) -> tuple[float, str]:
    worst, layer = 0.0, ""
    for (name, m), (_, n) in zip(a.named_modules(), b.named_modules(), strict=True):
        if isinstance(m, _BatchNorm) and isinstance(n, _BatchNorm) and m.running_mean is not None:
            assert m.running_var is not None
            assert n.running_mean is not None
            assert n.running_var is not None
            std = (m.running_var.double().clamp(min=0) + m.eps).sqrt()
            other = (n.running_var.double().clamp(min=0) + n.eps).sqrt()
            gap = ((m.running_mean - n.running_mean).abs() / std).max()
            ratio = (std / other).log().abs().max()
            here = float(torch.maximum(gap, ratio))
            if here > worst:
                worst, layer = here, name
    return worst, layer


# -- TN2xx: modes and writes --------------------------------------------------------------------


def wrong_mode(facts: Facts) -> Iterator[Found]:
    """Layers in another mode than their model, and not by freezing."""
    norms = _batch_norms(facts)
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
    for norm in _tracking(facts):
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
        _shapes(part) == _shapes(target) and any(p.requires_grad for p in part.parameters())
        for part in parts.values()
    )


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    """Names and shapes of all that it holds."""
    return tuple((k, tuple(v.shape)) for k, v in module.state_dict().items())


def batch_statistics_at_inference(facts: Facts) -> Iterator[Found]:
    """No running statistics: an answer depends on the other examples."""
    for norm in _batch_norms(facts):
        if norm.tracked is None:
            cause = "track_running_stats=False: evaluation uses the batch's statistics"
            yield Found(norm.name, "warning", cause, {"track_running_stats": False})


# -- TN3xx: batches -----------------------------------------------------------------------------

# The mean of n values is off by 1/sqrt(n) standard deviations: a third at 8. Group Norm's paper
# puts the break at 8 to 16 per device (23.6 % error at 32, 25 % at 8, 34.7 % at 2).
FEW_VALUES = 8
SOME_VALUES = 16


def few_values(facts: Facts) -> Iterator[Found]:
    """Too few values per channel for a usable estimate, with the noise that was measured."""
    for norm in _batch_norms(facts):
        if not norm.seen or not facts.moves(norm):
            continue
        largest = max(pooled_values(norm, s.shape) for s in norm.seen)
        if largest >= SOME_VALUES:
            continue
        evidence: dict[str, Any] = {
            "values per channel": largest,
            "expected noise of the mean in standard deviations": 1 / math.sqrt(largest),
        }
        full = [s for s in norm.seen if pooled_values(norm, s.shape) == largest]
        if len(full) > 2:
            means = torch.cat([s.moments.mean for s in full])
            std = torch.cat([s.moments.var for s in full]).mean(0).clamp(min=1e-12).sqrt()
            evidence["measured noise"] = float((means.std(0) / std).median())
        trains = norm.module.training or facts.optimizer is not None
        options = norm.module.options if isinstance(norm.module, BatchNorm) else None
        # Renorm normalizes by the running average, min_count leaves such batches out.
        held = options is not None and (options.renorm or (options.min_count or 0) > largest)
        severe = largest < FEW_VALUES and trains and not held
        cause = "each batch gives a channel so few values that its statistics are noise"
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


def pooled_values(norm: NormFacts, shape: tuple[int, ...]) -> int:
    """Values of a channel that ``norm`` pools in training, over ranks or in a ghost batch."""
    values = values_per_channel(shape)
    if synced(norm):
        return values * dist.get_world_size()
    ghost = norm.module.options.ghost if isinstance(norm.module, BatchNorm) else None
    return values * min(ghost, shape[0]) // shape[0] if ghost and shape[0] else values


def synced(norm: NormFacts) -> bool:
    """Whether it pools over several ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    module = norm.module
    joint = isinstance(module, BatchNorm) and bool(module.options.sync)
    return joint or isinstance(module, nn.SyncBatchNorm)


def last_batch(facts: Facts) -> Iterator[Found]:
    """A batch that leaves a channel one value, or very few."""
    sizes = [calling.examples_of(batch) for batch in facts.batches]
    last = sizes[-1] if facts.last is None else facts.last
    if len(sizes) < 2:
        raise NotApplicable("a single batch")
    most = max(sizes)
    for norm in _batch_norms(facts):
        first = [s for s in norm.seen if s.call == 0]
        if not first or not facts.moves(norm) or synced(norm):
            continue
        usual = max(values_per_channel(s.shape) for s in first)
        least = min(values_per_channel(s.shape) for s in first)
        least = min(least, usual * last // most)
        ours = isinstance(norm.module, BatchNorm) and (norm.module.options.min_count or 0) > least
        if ours or least >= usual:
            continue
        evidence = {"values per channel": least, "in most batches": usual}
        if least == 1:
            cause = "dataset size modulo batch size is one: training raises ValueError there"
            yield Found(norm.name, "error", cause, evidence)
        elif least < FEW_VALUES and least * 4 <= usual:
            cause = "the last batch is too small for statistics, and counts as much as a full one"
            yield Found(norm.name, "warning", cause, evidence)


# Batches of N examples from one distribution differ in their means by (variance between the
# examples' means) / N; the ratio is then about 1, and above 8 in the median channel by chance in
# less than one of 1e4 pairs of batches.
DISTRIBUTIONS = 8.0


def several_distributions(facts: Facts) -> Iterator[Found]:
    """Batches of different distributions pass through one norm in turn."""
    if len(facts.batches) < 4:
        raise NotApplicable("fewer than four batches to compare")
    found = []
    for norm in _batch_norms(facts):
        rows = [s for s in norm.seen if s.call == 0 and s.shape[0] >= 4]
        if len(rows) < 4 or not facts.moves(norm):
            continue
        means = torch.cat([s.moments.mean for s in rows])
        within = torch.stack([s.between / s.shape[0] for s in rows]).mean(0)
        alive = within > 1e-12
        if not bool(alive.any()):
            continue
        ratio = float((means.var(0)[alive].cpu() / within[alive]).median())
        if ratio > DISTRIBUTIONS:
            found.append((ratio, norm.name))
    if found:  # one fault of the data, seen first in one layer
        ratio, name = max(found)
        cause = "the batches do not come from one distribution: their means differ far too much"
        evidence = {"variance of batch means over what is expected": ratio, "layers": len(found)}
        yield Found(name, "warning", cause, evidence)


# Half a standard deviation between calls, or a variance of twice the other: the shared running
# statistics then fit neither. Means and variances of n values differ by chance by sqrt(2 / n) and
# 2 / sqrt(n) of that; three times as much is more than chance.
CALLS_SHIFT = 0.5
CALLS_RATIO = 2.0
CHANCE = 3.0


def called_again(facts: Facts) -> Iterator[Found]:
    """One batch norm on several inputs in a forward."""
    for norm in _batch_norms(facts):
        calls = sorted({s.call for s in norm.seen})
        if len(calls) < 2 or norm.fixed:
            continue
        each = [pool(joined([s.moments for s in norm.seen if s.call == c])) for c in calls]
        differ, shift, ratio = calls_differ(each)
        warns = differ and facts.moves(norm)
        evidence = {"calls": len(calls), "shift in standard deviations": shift, "variances": ratio}
        cause = "its running statistics are an average over calls that differ"
        if not differ:
            cause = "each forward moves its statistics once per call; the calls are alike"
        yield Found(norm.name, "warning" if warns else "note", cause, evidence)


def calls_differ(calls: list[Moments]) -> tuple[bool, float, float]:
    """Whether the inputs of several calls, each (1, C), are of different distributions.

    Returns:
        that, the shift of the means in standard deviations, and the ratio of the variances; both
        of the median channel, largest over calls.
    """
    mean = torch.cat([m.mean for m in calls]).double()
    var = torch.cat([m.var for m in calls]).double()
    alive = var.mean(0) > 1e-12
    if not bool(alive.any()):
        return False, 0.0, 1.0
    mean, var = mean[:, alive], var[:, alive]
    values = min(float(m.count.min()) for m in calls)
    shift = float(((mean.amax(0) - mean.amin(0)) / var.mean(0).sqrt()).median())
    ratio = float((var.amax(0) / var.amin(0).clamp(min=1e-12)).median())
    chance = CHANCE / math.sqrt(max(values, 1))
    by_mean = shift > max(CALLS_SHIFT, math.sqrt(2) * chance)
    return by_mean or ratio > max(CALLS_RATIO, math.exp(2 * chance)), shift, ratio


# -- TN4xx: structure ----------------------------------------------------------------------------

_WEIGHTED = {"linear", "conv1d", "conv2d", "conv3d", "bilinear"} | {
    f"conv_transpose{n}d" for n in (1, 2, 3)
}
_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "sync_batch_norm"}
_SHAPING = {"view", "reshape", "flatten", "contiguous", "squeeze", "unsqueeze", "to", "clone"}


def _calls(facts: Facts, norms: list[NormFacts]) -> Iterator[tuple[NormFacts, Call]]:
    flow = _flow(facts)
    for norm in norms:
        for call in flow.calls_of(norm.name)[:1]:
            if call.input is not None:
                yield norm, call


def dead_bias(facts: Facts) -> Iterator[Found]:
    """A bias that the norm after it subtracts again."""
    flow, modules = _flow(facts), dict(facts.model.named_modules())
    for norm, call in _calls(facts, _batch_norms(facts)):
        node = flow.nodes[call.input or 0]
        if node.op not in _WEIGHTED or len(node.outputs) > 1 or not facts.moves(norm):
            continue
        before = modules.get(node.module)
        bias = getattr(before, "bias", None)
        if isinstance(bias, Tensor) and call.output is not None:
            cause = "the bias of the layer before is subtracted again: its weights are dead"
            evidence = {"bias": f"{node.module}.bias", "dead weights": bias.numel()}
            yield Found(norm.name, "note", cause, evidence)


# Gamma shrinks by lr * weight_decay a step. Above 1e-4 it would halve in 7,000 steps, within a
# usual training; the usual 5e-4 at 0.1, and AdamW's 0.01 at 1e-3, stay below it.
DECAY_PER_STEP = 1e-4


def decayed(facts: Facts) -> Iterator[Found]:
    """Weight decay on gamma and beta."""
    assert facts.optimizer is not None
    names = {
        id(p): (norm, field)
        for norm in facts.norms.values()
        for field, p in norm.module.named_parameters(recurse=False)
        if p.requires_grad
    }
    for group in facts.optimizer.param_groups:
        decay, rate = float(group.get("weight_decay", 0)), float(group.get("lr", 0))
        held = [names[id(p)] for p in group["params"] if id(p) in names]
        if decay and held:
            cause = "weight decay pulls gamma toward 0, where it wants to be free"
            evidence = {
                "weight_decay": decay,
                "decay of gamma a step": rate * decay,
                "parameters": len(held),
            }
            severity: Severity = "warning" if rate * decay > DECAY_PER_STEP else "note"
            yield Found(held[0][0].name, severity, cause, evidence)


# Dropout of p scales second moments up by 1 / (1 - p): a quarter more variance, sqrt of which is
# what outputs are scaled by, is what p = 0.2 gives at most.
DROPOUT_RATIO = 1.25


def dropout_before(facts: Facts) -> Iterator[Found]:
    """Dropout upstream: the variance in training is another than in evaluation."""
    flow, modules = _flow(facts), dict(facts.model.named_modules())
    upstream: dict[NormFacts, list[Node]] = {}

    def through(node: Node) -> bool:
        return node.op not in _NORMS and "dropout" not in node.op

    for norm, call in _calls(facts, _batch_norms(facts)):
        assert call.input is not None
        start = [flow.nodes[call.input]]
        nodes = start + (list(flow.upstream(call.input, through)) if through(start[0]) else [])
        drops = [n for n in nodes if "dropout" in n.op and _rate(n, modules) > 0]
        if drops and facts.moves(norm):
            upstream[norm] = drops
    if not upstream:
        return
    dropping = {node.module for drops in upstream.values() for node in drops}
    for norm, ratio in _variances(facts, list(upstream), [modules[n] for n in dropping]).items():
        node = upstream[norm][0]
        cause = "dropout scales the variance up in training, and not in evaluation"
        evidence = {
            "p": _rate(node, modules),
            "dropout": node.module,
            "variance in training over variance in evaluation": ratio,
        }
        # Before training nothing upstream is normalized, and masks decide by chance.
        severe = ratio > DROPOUT_RATIO and not facts.untrained
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


def _rate(node: Node, modules: dict[str, nn.Module]) -> float:
    p = getattr(modules.get(node.module), "p", node.keywords.get("p", 0.5))
    return p if isinstance(p, float) else 0.5


def _variances(
    facts: Facts, norms: list[NormFacts], dropping: list[nn.Module]
) -> dict[NormFacts, float]:
    """Variance of each norm's input with dropout over that without, in the median channel."""
    assert facts.call is not None
    sums: dict[NormFacts, list[Tensor]] = {norm: [] for norm in norms}
    handles = []
    for norm in norms:

        def look(_: nn.Module, args: Any, kwargs: Any, norm: NormFacts = norm) -> None:
            x = next(calling.tensors_in((args, kwargs)))
            sums[norm].append(moments(wide(x.detach())).var[0].double().cpu())

        handles.append(norm.module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        torch.default_generator.manual_seed(0)  # the same masks, so the same verdict, each time
        for training in (False, True):
            for module in facts.model.modules():
                module.training = False
            for module in dropping:
                module.training = training
            with torch.no_grad():
                for batch in facts.batches[:MOST_DROPPED]:
                    facts.call(batch)
    finally:
        for handle in handles:
            handle.remove()
    ratios = {}
    for norm, seen in sums.items():
        held, dropped = (
            torch.stack(h).mean(0) for h in (seen[: len(seen) // 2], seen[len(seen) // 2 :])
        )
        alive = held > 1e-12
        ratios[norm] = float((dropped[alive] / held[alive]).median()) if alive.any() else 1.0
    return ratios


MOST_DROPPED = 4  # batches, for each of the two variances


_FEATURES_LAST = {"linear", "layer_norm", "embedding", "rms_norm", "bilinear", "lstm", "gru",
                  "multi_head_attention_forward"}  # fmt: skip
_ELEMENTWISE = {"relu", "gelu", "silu", "dropout", "tanh", "add", "mul", "sigmoid", "leaky_relu",
                "elu", "mish", "hardswish", "softplus", "selu", "sub", "div"}  # fmt: skip


def wrong_axis(facts: Facts) -> Iterator[Found]:
    """(N, L, C) given to a layer that takes (N, C, L)."""
    flow = _flow(facts)
    for norm, call in _calls(facts, _batch_norms(facts)):
        assert call.input is not None
        node = flow.nodes[call.input]
        while node.op in _ELEMENTWISE and node.inputs:
            node = flow.nodes[node.inputs[0]]
        if len(node.shape) != 3 or node.op not in _FEATURES_LAST or _mixes_tokens(flow, node):
            continue
        # num_features of another length than that of the features was chosen for the axis.
        channels, features = node.shape[1:]
        severity: Severity = "error" if channels == features else "note"
        cause = "its input keeps features in the last axis: channels and positions are swapped"
        evidence = {"input": str(node.shape), "made by": f"{node.module or 'model'}: {node.op}"}
        yield Found(norm.name, severity, cause, evidence)


_SWAPPING = {"transpose", "permute", "swapaxes", "swapdims", "moveaxis", "movedim", "mT", "mH",
             "adjoint"}  # fmt: skip


def _mixes_tokens(flow: Flow, node: Node) -> bool:
    """Whether the last axis is of positions: the two last were swapped on the way, and not back."""
    swapped = False
    while node.inputs and len(node.shape) == 3:
        before = flow.nodes[node.inputs[0]]
        if node.op in _SWAPPING:
            swapped ^= before.shape[-2:] == node.shape[-2:][::-1] and len(before.shape) == 3
        elif node.op not in _FEATURES_LAST | _ELEMENTWISE | {"contiguous", "clone"}:
            break
        node = before
    return swapped


def erased(facts: Facts) -> Iterator[Found]:
    """Normalization over a single value gives zero, whatever the input."""
    if not facts.norms:
        raise NotApplicable("no normalization")
    for norm in facts.norms.values():
        for seen in norm.seen[:1]:
            positions, channels = math.prod(seen.shape[2:]), seen.shape[1]
            module = norm.module
            if norm.is_batch:
                most = max(pooled_values(norm, s.shape) for s in norm.seen)
                if most == 1 and module.training and facts.moves(norm):
                    cause = "one value per channel in every batch: there is nothing to normalize by"
                    yield Found(norm.name, "error", cause, {"values per statistic": 1})
                continue
            if isinstance(module, nn.GroupNorm):
                values = channels // module.num_groups * positions
            elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
                values = positions
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                values = math.prod(module.normalized_shape)
            elif isinstance(module, RMSNorm):
                values = channels * positions
            else:
                continue
            if values == 1:
                cause = "each statistic is of one value: the output is the bias, whatever comes in"
                if isinstance(module, (nn.RMSNorm, RMSNorm)):  # it subtracts no mean
                    cause = "each statistic is of one value: of the input its sign is left"
                yield Found(norm.name, "error", cause, {"values per statistic": 1})


def misplaced(facts: Facts) -> Iterator[Found]:
    """Norm after norm, or as the last layer."""
    flow = _flow(facts)
    keeping = _SHAPING | {"dropout", "permute", "transpose"}
    for norm, call in _calls(facts, list(facts.norms.values())):
        if call.input is None or call.output is None:
            continue
        node, alone = flow.nodes[call.input], True
        while node.op in keeping and len(node.inputs) == 1:
            alone &= len(node.outputs) == 1
            node = flow.nodes[node.inputs[0]]
        if node.op in _NORMS and node.module != norm.name:
            # What was normalized goes elsewhere, too, as into a residual sum.
            severe = norm.is_batch and alone and len(node.outputs) == 1
            cause = f"its input was normalized by {node.module} already"
            yield Found(norm.name, "warning" if severe else "note", cause, {"after": node.module})
        elif norm.is_batch and call.output in flow.results:
            shape = flow.nodes[call.output].shape
            if len(shape) == 2:
                # An embedding may well end so; scores of classes may not.
                cause = "the model's answer is normalized over the batch"
                severe = _scores(facts, shape)
                severity: Severity = "warning" if severe else "note"
                yield Found(norm.name, severity, cause, {"output": str(shape)})


# Scores have a column for each class, and of 32 labels the largest is among the top tenth of the
# classes in 97 of 100 draws; an embedding has as many columns as it likes.
CLASSES_SEEN = 0.9


def _scores(facts: Facts, shape: tuple[int, ...]) -> bool:
    """Whether the answer of this shape is compared with a target: scores of classes, or values."""
    assert facts.call is not None
    batch = facts.batches[0]
    to_eval(facts.model)
    with torch.no_grad():
        output, target = facts.call(batch)
    out = calling.output_of(output)
    if out is None or tuple(out.shape) != shape or not isinstance(target, Tensor):
        return False
    if calling.classifies(out, target):
        return CLASSES_SEEN * shape[1] <= int(target.max()) + 1 <= shape[1]
    return target.shape == out.shape


def lost_behaviour(facts: Facts) -> Iterator[Found]:
    """A subclass whose behaviour a conversion drops, or has dropped."""
    own = [
        norm
        for norm in facts.batch_norms
        if not type(norm.module).__module__.startswith(("torch.", "truenorm."))
        and type(norm.module).forward is not _BatchNorm.forward
        and not isinstance(norm.module, BatchNorm)
    ]
    for norm in own:
        kind = type(norm.module).__name__
        cause = f"{kind} has a forward of its own, which convert_sync_batchnorm would drop"
        yield Found(norm.name, "note", cause, {"class": kind})
    joint = [norm for norm in facts.batch_norms if isinstance(norm.module, nn.SyncBatchNorm)]
    if not joint or facts.flow is None:
        return
    flow, straight = facts.flow, []
    for norm, call in _calls(facts, joint):
        if call.output is None:
            continue
        after = [flow.nodes[n] for n in flow.nodes[call.output].outputs]
        # An activation may come before the norm.
        bare = call.input is not None and flow.nodes[call.input].op in _WEIGHTED
        if bare and after and all(node.op in _WEIGHTED for node in after):
            straight.append(norm.name)
    if len(straight) * 2 > len(joint):
        cause = "most norms go straight into the next layer: their activations have been lost"
        evidence = {"without activation": len(straight), "of": len(joint)}
        yield Found(straight[0], "error", cause, evidence)
