"""The list of checks, in the order of their codes."""

from __future__ import annotations

from collections.abc import Iterator

from truenorm.doctor.check import Check, Found, NotApplicable
from truenorm.doctor.checks import (
    batches,
    dependence,
    deployment,
    gap,
    modes,
    statistics,
    structure,
)
from truenorm.doctor.facts import Facts


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
        dependence.batch_mates,
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
        deployment.unsynchronized,
        "truenorm.convert(model, to='sync').",
    ),
    Check(
        "TN502",
        "A subclass loses its behaviour",
        "model",
        deployment.lost_behaviour,
        "Convert with truenorm.convert, which leaves such layers whole and names them.",
    ),
    Check(
        "TN503",
        "Cannot be folded",
        "data",
        deployment.not_foldable,
        "truenorm.fold folds what it can, and tells the reason of the rest.",
        evaluates=True,
    ),
)
