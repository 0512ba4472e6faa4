"""The list of checks, in the order of their codes."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from truenorm.doctor.check import Check, Found, NotApplicable, Severity
from truenorm.doctor.checks import batches, gap, modes, statistics, structure
from truenorm.doctor.checks import dependence as mates
from truenorm.doctor.checks.deployment import not_foldable
from truenorm.doctor.facts import Facts, values_per_channel
from truenorm.layers.batch_norm import BatchNorm

# A rank's batch below this has noisier statistics than the joined one by more than a tenth.
SMALL_PER_RANK = 64


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


ONE_PROCESS = (
    "nn.DataParallel cannot pool statistics, and keeps those of its first device. Use "
    "DistributedDataParallel after truenorm.convert(model, to='sync')."
)


def _ranks(model: nn.Module) -> int:
    """Processes that train together: of the wrapper's group, else of all."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    sizes = [dist.get_world_size(m.process_group) for m in wrappers]
    return max(sizes, default=dist.get_world_size())


def _devices(model: nn.Module) -> int:
    """Devices over which DataParallel cuts a batch; without CUDA it has none and does not."""
    wrappers = [m for m in model.modules() if isinstance(m, nn.DataParallel)]
    return max((len(m.device_ids) for m in wrappers), default=1) or 1


def _watched(facts: Facts) -> Iterator[Found]:
    raise NotApplicable("seen in training only")


CHECKS: tuple[Check, ...] = (
    Check(
        "TN101",
        "Statistics never updated",
        "model",
        statistics.never_updated,
        "Train in train mode, or run truenorm.recalibrate(model, data).",
    ),
    Check(
        "TN102",
        "Statistics that are not finite",
        "model",
        statistics.not_finite,
        "Load an older checkpoint, or recalibrate; truenorm.BatchNorm leaves such batches out.",
    ),
    Check(
        "TN103",
        "Running statistics do not fit the data",
        "data",
        gap.train_eval_gap,
        "Run truenorm.recalibrate(model, data).",
        evaluates=True,
    ),
    Check(
        "TN104",
        "Averaging window does not fit",
        "model",
        statistics.window,
        "Set momentum as the weight of the NEW value (Keras's 0.99 is 0.01 here), or recalibrate.",
    ),
    Check(
        "TN105",
        "Statistics in half precision",
        "model",
        statistics.half_precision,
        "Keep them in float32: truenorm.convert(model, to='truenorm') does it.",
    ),
    Check(
        "TN106",
        "Collapsed or exploded channels",
        "model",
        statistics.collapsed,
        "Look at the layer before: dead units, too high a rate, weight decay on gamma.",
    ),
    Check(
        "TN107",
        "Copies with different statistics",
        "model",
        statistics.copies_differ,
        "Copy buffers as well as parameters.",
    ),
    Check(
        "TN201",
        "Layer in the wrong mode",
        "model",
        modes.wrong_mode,
        "Switch the mode of the whole model at once; freeze with truenorm's frozen=True.",
    ),
    Check(
        "TN202",
        "Frozen but not frozen",
        "model",
        modes.half_frozen,
        "truenorm.convert(model, to='frozen', where=...) holds statistics and survives train().",
    ),
    Check(
        "TN203",
        "Statistics written by a forward that should not",
        "ledger",
        _watched,
        "Validate in eval mode; no_grad does not protect buffers.",
    ),
    Check(
        "TN204",
        "Statistics written twice a step",
        "ledger",
        _watched,
        "truenorm.convert(model, to='truenorm'): recomputed forwards are not counted.",
    ),
    Check(
        "TN205",
        "Batch statistics at inference",
        "model",
        modes.batch_statistics_at_inference,
        "Use track_running_stats=True and recalibrate, or a norm that needs no batch.",
    ),
    Check(
        "TN301",
        "Too few values per channel",
        "data",
        batches.few_values,
        "Larger batches, sync=True over ranks, renorm, or group norm.",
        evaluates=False,
    ),
    Check(
        "TN302",
        "A last batch of one or very few",
        "data",
        batches.last_batch,
        "drop_last=True, or min_count=2 in truenorm.BatchNorm.",
    ),
    Check(
        "TN303",
        "Gradient accumulation does not enlarge the batch",
        "ledger",
        _watched,
        "commit='step' with truenorm.attach pools the statistics of micro-batches.",
    ),
    Check(
        "TN304",
        "Answers depend on batch mates or padding",
        "data",
        mates.batch_mates,
        "Track running statistics; give truenorm's norms the mask.",
        evaluates=True,
    ),
    Check(
        "TN305",
        "Several distributions through one norm",
        "data",
        batches.several_distributions,
        "Shuffle the data, mix the sources in each batch, or give each source a norm.",
    ),
    Check(
        "TN306",
        "One norm called several times",
        "data",
        batches.called_again,
        "truenorm.convert(model, to='per-call', example=...) gives each call a norm of its own.",
    ),
    Check(
        "TN401",
        "Bias before batch norm",
        "data",
        structure.dead_bias,
        "bias=False in the layer before; harmless but for memory and Adam's noise.",
    ),
    Check(
        "TN402",
        "Weight decay on gamma and beta",
        "optimizer",
        structure.decayed,
        "Put norms' parameters in a group with weight_decay=0.",
    ),
    Check(
        "TN403",
        "Dropout before batch norm",
        "data",
        structure.dropout_before,
        "Move the dropout behind the last batch norm.",
    ),
    Check(
        "TN404",
        "Channels in the wrong axis",
        "data",
        structure.wrong_axis,
        "Transpose to (N, C, L) before the norm and back after it.",
    ),
    Check(
        "TN405",
        "Normalization erases its input",
        "data",
        structure.erased,
        "Fewer groups, or another norm for inputs without positions.",
    ),
    Check(
        "TN406",
        "Norm after norm, or last",
        "data",
        structure.misplaced,
        "Remove one of the two; end with a linear layer.",
    ),
    Check(
        "TN501",
        "Ranks normalize apart",
        "model",
        unsynchronized,
        "truenorm.convert(model, to='sync').",
    ),
    Check(
        "TN502",
        "A subclass loses its behaviour",
        "model",
        structure.lost_behaviour,
        "Convert with truenorm.convert, which leaves such layers whole and names them.",
    ),
    Check(
        "TN503",
        "Cannot be folded",
        "data",
        not_foldable,
        "truenorm.fold folds what it can, and tells the reason of the rest.",
        evaluates=True,
    ),
)
