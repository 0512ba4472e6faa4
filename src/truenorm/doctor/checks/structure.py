"""TN4xx: norms whose place in the network costs something, or makes them useless."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.calling import call as calling
from truenorm.calling.borrowing import to_eval
from truenorm.calling.flow import SHAPING, Flow, Node
from truenorm.calling.nested import tensors_in
from truenorm.doctor.check import (
    NORMALIZING,
    WEIGHTED,
    Check,
    Found,
    NotApplicable,
    Severity,
    batch_norms,
    calls_of,
    dropouts_before,
    flow_of,
    rate_of,
)
from truenorm.doctor.checks.batches import pooled_values
from truenorm.doctor.facts import Facts, NormFacts
from truenorm.layers.functional import moments, wide
from truenorm.layers.norms import RMSNorm


def dead_bias(facts: Facts) -> Iterator[Found]:
    """A bias that the norm after it subtracts again."""
    flow, modules = flow_of(facts), dict(facts.model.named_modules())
    for norm, call in calls_of(facts, batch_norms(facts)):
        node = flow.nodes[call.input or 0]
        if node.op not in WEIGHTED or len(node.outputs) > 1 or not facts.moves(norm):
            continue
        before = modules.get(node.module)
        bias = getattr(before, "bias", None)
        if isinstance(bias, Tensor) and call.output is not None:
            cause = "the bias of the layer before is subtracted again: its weights are dead"
            evidence = {"bias": f"{node.module}.bias", "dead weights": bias.numel()}
            yield Found(norm.name, "note", cause, evidence)


TN401 = Check(
    "TN401",
    "Bias before batch norm",
    look=dead_bias,
    looks_at="data",
    advice="bias=False in the layer before; harmless but for memory and Adam's noise.",
)


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
        parameters = [names[id(p)] for p in group["params"] if id(p) in names]
        if decay and parameters:
            cause = "weight decay pulls gamma toward 0, where it wants to be free"
            evidence = {
                "weight_decay": decay,
                "decay of gamma a step": rate * decay,
                "parameters": len(parameters),
            }
            severity: Severity = "warning" if rate * decay > DECAY_PER_STEP else "note"
            yield Found(parameters[0][0].name, severity, cause, evidence)


TN402 = Check(
    "TN402",
    "Weight decay on gamma and beta",
    look=decayed,
    looks_at="optimizer",
    advice="Put norms' parameters in a group with weight_decay=0.",
)


# Dropout of p scales second moments up by 1 / (1 - p): a quarter more variance, sqrt of which is
# what outputs are scaled by, is what p = 0.2 gives at most.
DROPOUT_RATIO = 1.25
MOST_DROPPED = 4  # batches, for each of the two variances


def dropout_before(facts: Facts) -> Iterator[Found]:
    """Dropout upstream: the variance in training is another than in evaluation."""
    flow, modules = flow_of(facts), dict(facts.model.named_modules())
    upstream: dict[NormFacts, list[Node]] = {}
    for norm, call in calls_of(facts, batch_norms(facts)):
        assert call.input is not None
        drops = dropouts_before(flow, call.input, modules)
        if drops and facts.moves(norm):
            upstream[norm] = drops
    if not upstream:
        return
    dropping = {node.module for drops in upstream.values() for node in drops}
    for norm, ratio in _variances(facts, list(upstream), [modules[n] for n in dropping]).items():
        node = upstream[norm][0]
        cause = "dropout scales the variance up in training, and not in evaluation"
        evidence = {
            "p": rate_of(node, modules),
            "dropout": node.module,
            "variance in training over variance in evaluation": ratio,
        }
        # Before training nothing upstream is normalized, and masks decide by chance.
        severe = ratio > DROPOUT_RATIO and not facts.untrained
        yield Found(norm.name, "warning" if severe else "note", cause, evidence)


TN403 = Check(
    "TN403",
    "Dropout before batch norm",
    look=dropout_before,
    looks_at="data",
    advice="Move the dropout behind the last batch norm.",
)


def _variances(
    facts: Facts, norms: list[NormFacts], dropping: list[nn.Module]
) -> dict[NormFacts, float]:
    """Variance of each norm's input with dropout over that without, in the median channel."""
    assert facts.call is not None
    sums: dict[NormFacts, list[Tensor]] = {norm: [] for norm in norms}
    handles = []
    for norm in norms:

        def look(_: nn.Module, args: Any, kwargs: Any, norm: NormFacts = norm) -> None:
            x = next(tensors_in((args, kwargs)))
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
        kept, dropped = (
            torch.stack(h).mean(0) for h in (seen[: len(seen) // 2], seen[len(seen) // 2 :])
        )
        alive = kept > 1e-12
        ratios[norm] = float((dropped[alive] / kept[alive]).median()) if alive.any() else 1.0
    return ratios


_FEATURES_LAST = {"linear", "layer_norm", "embedding", "rms_norm", "bilinear", "lstm", "gru",
                  "multi_head_attention_forward"}  # fmt: skip
_ELEMENTWISE = {"relu", "gelu", "silu", "dropout", "tanh", "add", "mul", "sigmoid", "leaky_relu",
                "elu", "mish", "hardswish", "softplus", "selu", "sub", "div"}  # fmt: skip


def wrong_axis(facts: Facts) -> Iterator[Found]:
    """(N, L, C) given to a layer that takes (N, C, L)."""
    flow = flow_of(facts)
    for norm, call in calls_of(facts, batch_norms(facts)):
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


TN404 = Check(
    "TN404",
    "Channels in the wrong axis",
    look=wrong_axis,
    looks_at="data",
    advice="Transpose to (N, C, L) before the norm and back after it.",
)


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


TN405 = Check(
    "TN405",
    "Normalization erases its input",
    look=erased,
    looks_at="data",
    advice="Fewer groups, or another norm for inputs without positions.",
)


def misplaced(facts: Facts) -> Iterator[Found]:
    """Norm after norm, or as the last layer."""
    flow = flow_of(facts)
    keeping = SHAPING | {"dropout", "permute", "transpose"}
    for norm, call in calls_of(facts, list(facts.norms.values())):
        if call.input is None or call.output is None:
            continue
        node, alone = flow.nodes[call.input], True
        while node.op in keeping and len(node.inputs) == 1:
            alone &= len(node.outputs) == 1
            node = flow.nodes[node.inputs[0]]
        if node.op in NORMALIZING and node.module != norm.name:
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


TN406 = Check(
    "TN406",
    "Norm after norm, or last",
    look=misplaced,
    looks_at="data",
    advice="Remove one of the two; end with a linear layer.",
)


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
