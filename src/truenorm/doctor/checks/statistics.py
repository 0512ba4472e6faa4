"""TN1xx: running statistics that are not those of the data that the model gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from truenorm.calling.flow import SHAPING, Flow
from truenorm.doctor.check import (
    Check,
    Found,
    NotApplicable,
    Severity,
    batch_norms,
    flow_of,
    tracking,
)
from truenorm.doctor.checks.modes import shapes
from truenorm.doctor.checks.remedies import Remedy, converting, unfreezing
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.doctor.ledger.book import Book
from truenorm.layers.foreign import epsilon


def never_updated(facts: Facts) -> Iterator[Found]:
    """Initial statistics in a trained model, or a momentum that never moves them."""
    untrained = facts.untrained
    for norm in tracking(facts):
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
            # It is the data that such a layer lacks, and a frozen one takes none.
            advice = None if untrained or not called else unfreezing(facts, norm)
            yield Found(norm.name, severity, cause, evidence, advice=advice)
        elif norm.momentum == 0 and not norm.fixed:
            cause = "momentum is 0: a batch never moves them"
            yield Found(norm.name, "warning", cause, evidence | {"momentum": 0.0})


TN101 = Check(
    "TN101",
    "Statistics never updated",
    look=never_updated,
    advice="Train in train mode, or run truenorm.recalibrate(model, data).",
)


def not_finite(facts: Facts) -> Iterator[Found]:
    """NaN or infinite statistics, gamma or beta."""
    for norm in batch_norms(facts):
        tensors: dict[str, Tensor] = {}
        if norm.tracked is not None:
            tensors = {"running_mean": norm.tracked[0], "running_var": norm.tracked[1]}
        named = zip(("weight", "bias"), norm.learned, strict=True)
        tensors |= {name: tensor for name, tensor in named if tensor is not None}
        bad = {name: int((~torch.isfinite(t.detach())).sum()) for name, t in tensors.items()}
        bad = {name: number for name, number in bad.items() if number}
        evidence: dict[str, Any]
        negative = norm.tracked is not None and bool((norm.tracked[1] < 0).any())
        if bad:
            cause = "one batch that was not finite never leaves an average"
            evidence = {f"not finite in {k}": v for k, v in bad.items()}
            yield Found(norm.name, "error", cause, evidence, advice=unfreezing(facts, norm))
        elif negative:
            least = float(norm.tracked[1].min())  # type: ignore[index]
            evidence = {"least running_var": least}
            advice = unfreezing(facts, norm)
            yield Found(norm.name, "error", "a variance is negative", evidence, advice=advice)


def ceased_to_be_finite(book: Book, facts: Facts) -> Iterator[Found]:
    """The step at which statistics ceased to be finite."""
    bad = [layer for layer in book.called if layer.bad is not None]
    for layer in bad:
        low, step = layer.bad or (0, 0)
        exact = step - low <= 1 or layer.module.running_var.is_cpu
        evidence: dict[str, object] = {"first at step": step} if exact else {
            "not before step": low, "not after step": step,
        }  # fmt: skip
        evidence["layers"] = len(bad)
        yield Found(layer.name, "error", "a batch that was not finite was written", evidence)


TN102 = Check(
    "TN102",
    "Statistics that are not finite",
    look=not_finite,
    watched=ceased_to_be_finite,
    advice="Load an older checkpoint, or recalibrate; truenorm.BatchNorm leaves such batches out.",
)


# After n batches the initial values weigh (1 - momentum)^n of the average. At a half, the average
# is as much the constructor's as the data's.
STALE_SHARE = 0.5
UNMOVED_SHARE = 0.8  # hardly the data's at all; between the two, TN103 measures whether it harms
# Above it the average is dominated by the last batch; frameworks of the opposite convention use
# 0.9 to 0.999, and the largest in common use with torch's is 0.3.
OTHER_CONVENTION = 0.5


def window(facts: Facts) -> Iterator[Found]:
    """A momentum that does not fit the number of steps, or is of the opposite convention."""
    for norm in tracking(facts):
        _, var, batches = norm.tracked  # type: ignore[misc]
        momentum = norm.momentum
        if norm.fixed or momentum is None:
            continue
        if OTHER_CONVENTION < momentum <= 1:
            cause = "this momentum weighs the new batch; in Keras and Flax it weighs the average"
            evidence = {"momentum": momentum, "window in batches": 1 / momentum}
            # In inference it plays no part: what the statistics are worth, TN103 measures.
            moves = norm.module.training or facts.optimizer is not None
            severity: Severity = "warning" if moves else "note"
            remedy = Remedy(None)
            if momentum < 1:
                remedy = converting(norm.module, "keras", "Set its attribute momentum.")
            yield Found(norm.name, severity, cause, evidence, *remedy)
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
                advice = unfreezing(facts, norm)
                yield Found(norm.name, severity, cause, evidence, advice=advice)


TN104 = Check(
    "TN104",
    "Averaging window does not fit",
    look=window,
    advice="Set momentum as the weight of the NEW value (Keras's 0.99 is 0.01 here), or "
    "recalibrate.",
)


def half_precision(facts: Facts) -> Iterator[Found]:
    """Running statistics kept in half precision."""
    for norm in tracking(facts):
        mean, _, _ = norm.tracked  # type: ignore[misc]
        if mean.dtype.itemsize >= 4 or norm.foreign:
            continue
        momentum = norm.momentum or 0.0
        trains = facts.optimizer is not None or facts.trains
        yield Found(
            norm.name,
            "warning" if trains and facts.moves(norm) else "note",
            f"{mean.dtype} holds {_digits(mean.dtype)} digits: smaller updates are rounded away",
            {"dtype": str(mean.dtype), "momentum": momentum},
            *converting(norm.module, "truenorm", "Keep the layer in float32."),
        )


TN105 = Check(
    "TN105",
    "Statistics in half precision",
    look=half_precision,
    advice="Keep them in float32: truenorm.convert(model, to='truenorm') does it.",
)


def _digits(dtype: torch.dtype) -> str:
    return f"{-math.log10(torch.finfo(dtype).eps):.1f}"


# A channel whose variance is below a hundredth of eps is normalized by eps: its signal is scaled
# down by ten or more. Single dead units are usual in a trained network: two at least, and a tenth
# of all channels, are more than that.
COLLAPSED_VAR = 0.01
COLLAPSED_GAMMA = 1e-4  # of the largest |gamma|
COLLAPSED_SHARE = 0.1
TINY_GAMMA = 1e-4  # a layer whose largest |gamma| is below it gives its bias alone
STARTING_BETA = 1e-3  # a branch that starts at 0 moves gamma and beta alike
EXPLODED_VAR = 1e7


def collapsed(facts: Facts) -> Iterator[Found]:
    """Channels that carry nothing any more, or far too much."""
    first = next((norm.name for norm in facts.batch_norms), "")
    for norm in tracking(facts):
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


TN106 = Check(
    "TN106",
    "Collapsed or exploded channels",
    look=collapsed,
    advice="Look at the layer before: dead units, too high a rate, weight decay on gamma.",
)


def _gammas_gone(facts: Facts, norm: NormFacts) -> int:
    """How many gammas are nothing beside the largest, or by themselves."""
    weight, bias = norm.learned
    if weight is None:
        return 0
    size = weight.detach().abs()
    largest = float(size.max())
    if largest < TINY_GAMMA:
        # A residual branch may start so, with a beta of 0; one that has been trained has another.
        starts = bias is None or float(bias.detach().abs().max()) < STARTING_BETA
        joins = facts.flow is None or _joins(facts.flow, norm)
        return 0 if starts and joins else len(size)
    return int((size < COLLAPSED_GAMMA * largest).sum())


def _joins(flow: Flow, norm: NormFacts) -> bool:
    """Whether its output is added to something else, or goes nowhere."""
    outputs = [call.output for call in flow.calls_of(norm.name) if call.output is not None]
    after = [flow.nodes[n] for output in outputs for n in flow.nodes[output].outputs]
    while after:
        node = after.pop()
        if node.op == "add" and len(node.inputs) > 1:
            return True
        if node.op in SHAPING | {"dropout", "mul"}:
            after += [flow.nodes[n] for n in node.outputs]
    return not outputs


def _takes_input(facts: Facts, norm: NormFacts) -> bool:
    """Whether the norm works on the data as they come, but for their shape."""
    flow = flow_of(facts)
    for call in flow.calls_of(norm.name):
        if call.input is None:
            continue
        node = flow.nodes[call.input]
        while node.op in SHAPING | {"permute", "transpose"} and len(node.inputs) == 1:
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
        own = shapes(module)
        if sum(p.numel() for p in module.parameters()) and not isinstance(module, _BatchNorm):
            groups.setdefault(own, []).append((name, module))
    pairs = [(a, b) for same in groups.values() for i, a in enumerate(same) for b in same[i + 1 :]]
    if not pairs:
        raise NotApplicable("the model holds no two copies of one network")
    found: set[str] = set()
    for (one, a), (other, b) in pairs:
        if any(f"{name}.".startswith(f"{bad}.") for bad in found for name in (one, other)):
            continue
        if a is b or _tied(a, b) or _parameter_distance(a, b) > TWIN_PARAMETERS:
            continue
        worst, layer = _statistics_distance(a, b)
        if worst > TWIN_STATISTICS:
            found.add(other)
            # Members of a list may be layers that follow each other, made as copies.
            stacked = one.rpartition(".")[2].isdigit() and other.rpartition(".")[2].isdigit()
            cause = f"{other} follows {one} in its parameters, not in its buffers"
            evidence = {"largest difference in standard deviations": worst, "copy": one}
            severity: Severity = "note" if stacked else "error"
            yield Found(f"{other}.{layer}" if layer else other, severity, cause, evidence)


TN107 = Check(
    "TN107",
    "Copies with different statistics",
    look=copies_differ,
    advice="Copy buffers as well as parameters.",
)


def _tied(a: nn.Module, b: nn.Module) -> bool:
    """Whether they hold the same tensors: then norms of their own are meant."""
    own = {id(p) for p in a.parameters()}
    return any(id(p) in own for p in b.parameters())


def _parameter_distance(a: nn.Module, b: nn.Module) -> float:
    """By their names: what one of the two holds twice, the other may hold apart."""
    distance = scale = 0.0
    others = dict(b.named_parameters(remove_duplicate=False))
    for name, p in a.named_parameters(remove_duplicate=False):
        q = others.get(name)
        if q is None:
            return math.inf  # a buffer there
        if p.ndim > 1:
            distance += float((p - q).detach().double().square().sum())
            scale += float(p.detach().double().square().sum())
    return math.sqrt(distance / scale) if scale else math.inf


def _statistics_distance(a: nn.Module, b: nn.Module) -> tuple[float, str]:
    worst, layer = 0.0, ""
    others = dict(b.named_modules(remove_duplicate=False))
    for name, m in a.named_modules(remove_duplicate=False):
        n = others.get(name)
        if isinstance(m, _BatchNorm) and isinstance(n, _BatchNorm) and m.running_mean is not None:
            assert m.running_var is not None
            assert n.running_mean is not None
            assert n.running_var is not None
            std = (m.running_var.double().clamp(min=0) + epsilon(m)).sqrt()
            other = (n.running_var.double().clamp(min=0) + epsilon(n)).sqrt()
            gap = ((m.running_mean - n.running_mean).abs() / std).max()
            ratio = (std / other).log().abs().max()
            here = float(torch.maximum(gap, ratio))
            if here > worst:
                worst, layer = here, name
    return worst, layer
