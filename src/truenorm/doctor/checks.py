"""The checks: a stable code, a question to the facts, and an answer with evidence or none.

Every threshold stands here, beside the reason for its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.conversion import convert
from truenorm.doctor.facts import Facts, NormFacts, values_per_channel
from truenorm.flow import Call, Flow, Node
from truenorm.layers import BatchNorm

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
        called = not facts.batches or bool(norm.seen)
        if norm.untouched and not norm.fixed:
            severity: Severity = "note" if untrained or not called else "error"
            told = "the model has not been trained" if untrained else "it never ran in train mode"
            cause = told if called else "it is not called either"
            yield Found(norm.name, severity, cause, {"num_batches_tracked": norm.tracked[2]})  # type: ignore[index]
        elif norm.module.momentum == 0 and not norm.fixed:
            cause = "momentum is 0: a batch never moves them"
            yield Found(norm.name, "warning", cause, {"momentum": 0.0})


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
        momentum, batches = norm.module.momentum, norm.tracked[2]  # type: ignore[index]
        if momentum is None or norm.fixed or not isinstance(momentum, (int, float)):
            continue
        if OTHER_CONVENTION < momentum <= 1:
            cause = "this momentum weighs the new batch; in Keras and Flax it weighs the average"
            module = norm.module

            def mend(module: nn.Module = module) -> None:
                convert(module, to="keras")

            evidence = {"momentum": momentum, "window in batches": 1 / momentum}
            yield Found(norm.name, "warning", cause, evidence, mend if momentum < 1 else None)
        elif batches > 0 and momentum > 0:
            share = (1 - momentum) ** batches
            if share > STALE_SHARE and not norm.untouched:
                evidence = {
                    "momentum": momentum,
                    "num_batches_tracked": batches,
                    "share of the initial values": share,
                }
                cause = "too few batches for this momentum: the initial values still weigh most"
                severity: Severity = "warning" if share > UNMOVED_SHARE else "note"
                yield Found(norm.name, severity, cause, evidence)


def half_precision(facts: Facts) -> Iterator[Found]:
    """Running statistics kept in half precision."""
    for norm in _tracking(facts):
        mean, _, _ = norm.tracked  # type: ignore[misc]
        if mean.dtype.itemsize >= 4:
            continue
        momentum = norm.module.momentum or 0.0
        moves = facts.optimizer is not None or norm.module.training
        module = norm.module

        def mend(module: nn.Module = module) -> None:
            convert(module, to="truenorm")

        yield Found(
            norm.name,
            "warning" if moves else "note",
            f"{mean.dtype} holds {_digits(mean.dtype)} digits: smaller updates are rounded away",
            {"dtype": str(mean.dtype), "momentum": momentum},
            mend,
        )


def _digits(dtype: torch.dtype) -> str:
    return f"{-math.log10(torch.finfo(dtype).eps):.1f}"


# A channel whose variance is below a hundredth of eps is normalized by eps: its signal is scaled
# down by ten or more. A tenth of all channels is more than single dead units of a trained network.
COLLAPSED_VAR = 0.01
COLLAPSED_GAMMA = 1e-4  # of the median |gamma|
COLLAPSED_SHARE = 0.1
EXPLODED_VAR = 1e7


def collapsed(facts: Facts) -> Iterator[Found]:
    """Channels that carry nothing any more, or far too much."""
    for norm in _tracking(facts):
        _, var, _ = norm.tracked  # type: ignore[misc]
        if norm.untouched or not torch.isfinite(var).all() or not len(var):
            continue
        flat = int((var < COLLAPSED_VAR * norm.eps).sum())
        weight = norm.learned[0]
        gone = 0
        if weight is not None and bool(weight.any()):  # all zero is a residual branch's start
            size = weight.detach().abs()
            gone = int((size < COLLAPSED_GAMMA * size.median()).sum())
        evidence: dict[str, Any] = {
            "channels": len(var),
            "variance below eps / 100": flat,
            "gamma near 0": gone,
        }
        if flat or gone:
            many = max(flat, gone) >= COLLAPSED_SHARE * len(var)
            cause = "their input is constant" if flat >= gone else "gamma has decayed to nothing"
            yield Found(norm.name, "warning" if many else "note", cause, evidence)
        elif float(var.max()) > EXPLODED_VAR:
            evidence = {"largest running_var": float(var.max())}
            yield Found(norm.name, "warning", "the input of a channel has exploded", evidence)


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
        shapes = tuple((k, tuple(v.shape)) for k, v in module.state_dict().items())
        if sum(p.numel() for p in module.parameters()) and not isinstance(module, _BatchNorm):
            groups.setdefault(shapes, []).append((name, module))
    pairs = [(a, b) for same in groups.values() for i, a in enumerate(same) for b in same[i + 1 :]]
    if not pairs:
        raise NotApplicable("the model holds no two copies of one network")
    told: set[str] = set()
    for (one, a), (other, b) in pairs:
        if any(other.startswith(f"{name}.") for name in told) or a is b:
            continue
        if _parameter_distance(a, b) > TWIN_PARAMETERS:
            continue
        worst, layer = _statistics_distance(a, b)
        if worst > TWIN_STATISTICS:
            told.add(other)
            cause = f"{other} follows {one} in its parameters, not in its buffers"
            evidence = {"largest difference in standard deviations": worst, "copy": one}
            yield Found(f"{other}.{layer}" if layer else other, "error", cause, evidence)


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
    root = facts.model.training
    for norm in _batch_norms(facts):
        if norm.module.training == root or norm.fixed or norm.module is facts.model:
            continue
        module = norm.module
        if not root:
            cause = "the model is in eval mode, this layer normalizes by the batch and moves"

            def mend(module: nn.Module = module) -> None:
                module.eval()

            yield Found(norm.name, "error", cause, {"training": True}, mend)
        elif _learns(norm):
            cause = "the model trains, this layer is in eval mode though weight and bias learn"
            yield Found(norm.name, "warning", cause, {"training": False}, module.train)


def _learns(norm: NormFacts) -> bool:
    return any(p.requires_grad for p in norm.module.parameters(recurse=False))


def half_frozen(facts: Facts) -> Iterator[Found]:
    """requires_grad is off, but statistics move in train mode."""
    trains = facts.model.training
    others = any(p.requires_grad for p in facts.model.parameters())
    for norm in _tracking(facts):
        own = list(norm.module.parameters(recurse=False))
        if not own or _learns(norm) or norm.fixed:
            continue
        module = norm.module

        def mend(module: nn.Module = module) -> None:
            convert(module, to="frozen")

        if norm.module.training:
            cause = "weight and bias are frozen, running statistics are buffers and still move"
            yield Found(
                norm.name, "error" if others else "warning", cause, {"training": True}, mend
            )
        elif trains and others:
            cause = "it is frozen by eval(), which the next train() undoes"
            yield Found(norm.name, "note", cause, {"training": False}, mend)


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
        if not norm.seen or norm.fixed:
            continue
        largest = max(values_per_channel(s.shape) for s in norm.seen)
        if largest >= SOME_VALUES:
            continue
        trains = norm.module.training or facts.optimizer is not None
        severe = largest < FEW_VALUES and trains and _not_frozen(norm)
        evidence: dict[str, Any] = {
            "values per channel": largest,
            "expected noise of the mean in standard deviations": 1 / math.sqrt(largest),
        }
        full = [s for s in norm.seen if values_per_channel(s.shape) == largest]
        if len(full) > 2:
            means = torch.cat([s.moments.mean for s in full])
            std = torch.cat([s.moments.var for s in full]).mean(0).clamp(min=1e-12).sqrt()
            evidence["measured noise"] = float((means.std(0) / std).median())
        cause = "each batch gives a channel so few values that its statistics are noise"
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


def _not_frozen(norm: NormFacts) -> bool:
    return norm.module.training or _learns(norm)


def last_batch(facts: Facts) -> Iterator[Found]:
    """A batch that leaves a channel one value, or very few."""
    if len(facts.batches) < 2:
        raise NotApplicable("a single batch")
    for norm in _batch_norms(facts):
        if norm.fixed or not norm.seen:
            continue
        counts = [values_per_channel(s.shape) for s in norm.seen]
        least, most = min(counts), max(counts)
        ours = isinstance(norm.module, BatchNorm) and (norm.module.options.min_count or 0) > least
        if ours or least == most:
            continue
        evidence = {"values per channel": least, "in most batches": most}
        if least == 1:
            cause = "dataset size modulo batch size is one: training raises ValueError there"
            yield Found(norm.name, "error", cause, evidence)
        elif least < FEW_VALUES and least * 4 <= most:
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
        if len(rows) < 4:
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
# statistics then fit neither.
CALLS_SHIFT = 0.5
CALLS_RATIO = 2.0


def called_again(facts: Facts) -> Iterator[Found]:
    """One batch norm on several inputs in a forward."""
    for norm in _batch_norms(facts):
        first = [s for s in norm.seen if s.batch == 0]
        if len(first) < 2 or norm.fixed:
            continue
        mean = torch.cat([s.moments.mean for s in first])
        var = torch.cat([s.moments.var for s in first]).clamp(min=1e-12)
        shift = float(((mean.max(0)[0] - mean.min(0)[0]) / var.mean(0).sqrt()).median())
        ratio = float((var.max(0)[0] / var.min(0)[0]).median())
        differ = shift > CALLS_SHIFT or ratio > CALLS_RATIO
        evidence = {"calls": len(first), "shift in standard deviations": shift, "variances": ratio}
        cause = "its running statistics are an average over calls that differ"
        if not differ:
            cause = "each forward moves its statistics once per call; the calls are alike"
        yield Found(norm.name, "warning" if differ else "note", cause, evidence)


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
        if node.op not in _WEIGHTED or node.outputs != flow.nodes[call.input or 0].outputs[:1]:
            continue
        before = modules.get(node.module)
        bias = getattr(before, "bias", None)
        if isinstance(bias, Tensor) and call.output is not None:
            cause = f"the bias of {node.module} is subtracted again: {bias.numel()} dead weights"
            yield Found(norm.name, "note", cause, {"bias": f"{node.module}.bias"})


def decayed(facts: Facts) -> Iterator[Found]:
    """Weight decay on gamma and beta."""
    assert facts.optimizer is not None
    names = {
        id(p): (norm, field)
        for norm in facts.norms.values()
        for field, p in norm.module.named_parameters(recurse=False)
    }
    for group in facts.optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        held = [names[id(p)] for p in group["params"] if id(p) in names]
        if decay and held:
            cause = "weight decay pulls gamma toward 0, where it wants to be free"
            evidence = {"weight_decay": decay, "parameters": len(held)}
            yield Found(held[0][0].name, "warning", cause, evidence)


def dropout_before(facts: Facts) -> Iterator[Found]:
    """Dropout upstream: the variance in training is another than in evaluation."""
    flow, modules = _flow(facts), dict(facts.model.named_modules())

    def through(node: Node) -> bool:
        return node.op not in _NORMS and "dropout" not in node.op

    for norm, call in _calls(facts, _batch_norms(facts)):
        assert call.input is not None
        start = [flow.nodes[call.input]]
        nodes = start + (list(flow.upstream(call.input, through)) if through(start[0]) else [])
        for node in nodes:
            if "dropout" not in node.op:
                continue
            module = modules.get(node.module)
            p = getattr(module, "p", node.keywords.get("p", 0.5))
            if isinstance(p, float) and p > 0:
                cause = "dropout scales the variance up in training, and not in evaluation"
                yield Found(norm.name, "warning", cause, {"p": p, "dropout": node.module})
                break


def wrong_axis(facts: Facts) -> Iterator[Found]:
    """(N, L, C) given to a layer that takes (N, C, L)."""
    flow = _flow(facts)
    features_last = {"linear", "layer_norm", "embedding", "rms_norm", "bilinear"}
    for norm, call in _calls(facts, _batch_norms(facts)):
        assert call.input is not None
        nodes, node = [], flow.nodes[call.input]
        while node.op in {"relu", "gelu", "silu", "dropout", "tanh", "add", "mul"} and node.inputs:
            nodes.append(node)
            node = flow.nodes[node.inputs[0]]
        if len(node.shape) == 3 and node.op in features_last:
            cause = "its input keeps features in the last axis: channels and positions are swapped"
            evidence = {"input": str(node.shape), "made by": f"{node.module or 'model'}: {node.op}"}
            yield Found(norm.name, "error", cause, evidence)


def erased(facts: Facts) -> Iterator[Found]:
    """Normalization over a single value gives zero, whatever the input."""
    if not facts.norms:
        raise NotApplicable("no normalization")
    for norm in facts.norms.values():
        for seen in norm.seen[:1]:
            positions, channels = math.prod(seen.shape[2:]), seen.shape[1]
            module = norm.module
            if isinstance(module, nn.GroupNorm):
                values = channels // module.num_groups * positions
            elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
                values = positions
            elif isinstance(module, nn.LayerNorm):
                values = math.prod(module.normalized_shape)
            else:
                continue
            if values == 1:
                cause = "each statistic is of one value: the output is the bias, whatever comes in"
                yield Found(norm.name, "error", cause, {"values per statistic": 1})


def misplaced(facts: Facts) -> Iterator[Found]:
    """Norm after norm, or as the last layer."""
    flow = _flow(facts)
    keeping = _SHAPING | {"dropout", "permute", "transpose"}
    for norm, call in _calls(facts, _batch_norms(facts)):
        if call.input is None or call.output is None:
            continue
        node = flow.nodes[call.input]
        while node.op in keeping and len(node.inputs) == 1:
            node = flow.nodes[node.inputs[0]]
        if node.op in _NORMS and node.module != norm.name:
            cause = f"its input was normalized by {node.module} already"
            yield Found(norm.name, "warning", cause, {"after": node.module})
        elif call.output in flow.results and len(flow.nodes[call.output].shape) == 2:
            cause = "the model's answer is normalized over the batch"
            yield Found(norm.name, "warning", cause, {"output": str(flow.nodes[call.output].shape)})


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
    synced = [norm for norm in facts.batch_norms if isinstance(norm.module, nn.SyncBatchNorm)]
    if not synced or facts.flow is None:
        return
    flow, straight = facts.flow, []
    for norm, call in _calls(facts, synced):
        if call.output is None:
            continue
        after = [flow.nodes[n] for n in flow.nodes[call.output].outputs]
        if after and all(node.op in _WEIGHTED for node in after):
            straight.append(norm.name)
    if len(straight) * 2 > len(synced):
        cause = "most norms go straight into the next layer: their activations have been lost"
        evidence = {"without activation": len(straight), "of": len(synced)}
        yield Found(straight[0], "error", cause, evidence)


def not_foldable(facts: Facts) -> Iterator[Found]:
    """A norm that inference will have to compute, and why."""
    flow = _flow(facts)
    for norm in _tracking(facts):
        calls = flow.calls_of(norm.name)
        if not calls:
            continue
        why = _why_not_foldable(flow, calls)
        if why:
            yield Found(norm.name, "note", why, {"calls": len(calls)})


def _why_not_foldable(flow: Flow, calls: list[Call]) -> str:
    if len(calls) > 1:
        return f"it is called {len(calls)} times in a forward"
    if calls[0].input is None:
        return "its input is not a tensor of the model's"
    node = flow.nodes[calls[0].input]
    if node.op not in _WEIGHTED:
        return f"its input comes from {node.op}, not from a convolution or linear layer"
    if len(node.outputs) > 1:
        return f"the output of {node.module} goes elsewhere, too"
    if len(flow.calls_of(node.module)) > 1:
        return f"{node.module} is called {len(flow.calls_of(node.module))} times in a forward"
    return ""
