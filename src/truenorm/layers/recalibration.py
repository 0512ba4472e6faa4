"""Exact running statistics from data, for any model: measured before and after, undone if worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer
from torch.utils.data import DataLoader, IterableDataset

from truenorm.calling.borrowing import Randoms, borrowed, eager, to_eval, unwrapped
from truenorm.calling.call import Arguments, Call, Loss, accuracy_of, loss_of
from truenorm.calling.nested import examples_of
from truenorm.errors import InputError
from truenorm.layers.foreign import epsilon, frozen_statistics
from truenorm.layers.functional import widest
from truenorm.layers.ranks import Collective
from truenorm.layers.settling import (
    SAME,
    Convergence,
    InputMoments,
    converge,
    running_statistics,
    sound_statistics,
    why_kept,
)


class Measured(NamedTuple):
    """What a model does on the held-out batches; None where nothing says how to measure it."""

    loss: float | None
    accuracy: float | None
    examples: int


class RecalibratedNorm(NamedTuple):
    """What became of one layer's statistics.

    Attributes:
        layer: its dotted name, as in ``named_modules()``; "" is the model itself.
        drift: how far the mean moved, in running standard deviations, sqrt(var + eps) before;
            the largest of all channels.
        ratio: var + eps after by that before, or its inverse if that is larger; likewise.
        values: pooled per channel, over all batches, calls and ranks.
        note: what is worth knowing about it.
    """

    layer: str
    drift: float
    ratio: float
    values: int
    note: str = ""


class KeptNorm(NamedTuple):
    """A batch norm that was left as it is, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Recalibration:
    """The model and what became of its running statistics.

    Attributes:
        model: the model given, changed in place.
        rows: a row for each layer with new statistics, in the order of ``named_modules()``.
        left: the other batch norms.
        passes: over the data, all or nine tenths of them.
        batches: that the statistics are of, over all ranks.
        examples: that the statistics are of, over all ranks.
        before, after: loss and accuracy on the held-out batches; None if there were none. ``after``
            is with statistics in which these batches are not.
        pooled: the same on the same batches with the statistics that the model has now, of these
            batches, too; None if they are not in them.
        kept: whether the model has the new statistics; if not, all is as it was.
        reason: why they are not kept, or what else is to be known; often empty.
    """

    model: nn.Module
    rows: tuple[RecalibratedNorm, ...]
    left: tuple[KeptNorm, ...]
    passes: int
    batches: int
    examples: int
    before: Measured | None
    after: Measured | None
    pooled: Measured | None
    kept: bool
    reason: str = ""

    def __str__(self) -> str:
        done = "recalibrated" if self.kept else "measured and left as they were"
        head = (
            f"{len(self.rows)} of {len(self.rows) + len(self.left)} batch norms {done}; "
            f"batches: {self.batches}, examples: {self.examples}, passes: {self.passes}"
        )
        lines = [head, *self._notes()]
        if self.rows:
            cells = [("layer", "mean drift", "variance ratio", "values", "")]
            cells += [
                (r.layer or "(model)", f"{r.drift:.3g} sd", f"{r.ratio:.3g}", f"{r.values}", r.note)
                for r in self.rows
            ]
            first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += [
                f"  {c[0]:<{first}}  "
                + "  ".join(f"{v:>{w}}" for v, w in zip(c[1:4], widths, strict=False))
                + (f"  {c[4]}" if c[4] else "")
                for c in cells
            ]
        lines += [f"  {it.layer or '(model)'} left as it is: {it.reason}" for it in self.left]
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        notes = [f"  {self.reason}"] if self.reason else []
        if self.before is None or self.after is None:
            return notes
        parts = []
        if self.before.loss is not None and self.after.loss is not None:
            parts.append(f"loss {self.before.loss:.6g} -> {self.after.loss:.6g}")
        if self.before.accuracy is not None and self.after.accuracy is not None:
            parts.append(f"accuracy {self.before.accuracy:.2%} -> {self.after.accuracy:.2%}")
        if self.pooled is not None and self.pooled.loss is not None:
            parts.append(f"then pooled in, and loss {self.pooled.loss:.6g}")
        if parts:
            notes.insert(0, f"  held out, {self.after.examples} examples: {', '.join(parts)}")
        return notes


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    loss: Loss | None = None,
    exact: bool = True,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    arguments: Arguments | None = None,
    keep_worse: bool = False,
) -> Recalibration:
    """Give every batch norm of ``model`` the running statistics of its inputs over all of ``data``.

    Mean and UNBIASED variance (n / (n - 1)) of all values, in float64 by Chan's formula, each
    batch weighted by its values. ``num_batches_tracked`` becomes the number of batches; or, if
    that is more, the number after which a constructor's initial values would weigh no more than a
    half with the layer's momentum, since nothing of them is left. Layers are torch.nn's batch
    norms, SyncBatchNorm and TrueNorm's; a mask given to one of TrueNorm's is respected; a layer
    called several times in a forward pools its calls.

    The exact form goes through the data once for each layer in a chain, and once more to see that
    nothing changes: every layer then has the statistics of the inputs that inference gives it,
    with running statistics in the layers before and no dropout. ``exact=False`` goes once: each
    layer is normalized by the batch's own mean and unbiased variance, as in training, but without
    dropout. The first layer's statistics are exact even so; those of the layers behind it are of
    inputs normalized by noisy statistics, the more so the smaller the batches. A single batch
    makes both the same, so that one pass is enough unless a layer is called twice.

    Left alone, with the reason in the result: what is ``frozen=True``, and the frozen batch norms
    of torchvision, detectron2, timm and transformers; a norm in eval mode within a model in train
    mode whose affine parameters, if any, need no gradient; within a model in eval
    mode, where modes tell nothing, a norm whose affine parameters need no gradient while other
    parameters of the model do; a norm without tracked statistics, or that is never called. A batch
    in which the input of a layer is not finite does not count for that layer.

    Where a tenth of ``data`` is held out, the statistics of the other nine tenths are judged on it.
    Once they are accepted it is pooled in: statistics are settled again, layer by layer, over all
    of ``data``, as if nothing had been held out, which takes as many passes again. The loss on the
    tenth is measured once more then, no longer of data unseen; if it is higher than before
    recalibration, the accepted statistics of nine tenths stay and ``reason`` says so.

    Modes, random states (torch, numpy, Python; those of a DataLoader's own generators), gradients
    and all other buffers are as before, and after any exception so are the statistics, to the bit.
    Every pass begins from the same random state, so a loader that shuffles or augments in this
    process repeats itself. With torch.distributed in use, every rank calls this with its share of
    the data, which may be of any number of batches; statistics and measurements are joint.

    Args:
        model: any model; it stays on its device.
        data: batches, see :class:`truenorm.calling.call.Call`; a one-shot iterator is put into a
            list, ``max_batches`` long at most.
        held_out: batches with targets, to measure loss and accuracy in eval mode before and
            after. None: if the batches of ``data`` have targets, every tenth of them (at least
            one, if there are two) is held out for this until the statistics are accepted.
        loss: ``loss(output, target)``, instead of what the output or the target suggests.
        exact: see above.
        max_batches: of ``data``, to use at most; the tenth held out is of these.
        device: where batches go; None for where the model is.
        arguments: makes the model's arguments of a batch, see :class:`truenorm.calling.call.Call`.
        keep_worse: keep the new statistics even if the loss on the held-out batches is higher
            than before; else the old ones are restored and the result says so.

    Raises:
        InputError: no batch norm, a lazy one that has not been called yet, no data, or held-out
            batches on which no loss can be measured.
    """
    inner = unwrapped(model)
    if max_batches is not None and max_batches < 1:
        raise InputError(f"max_batches must be at least 1 or None, got {max_batches!r}.")
    norms, left = _chosen(model)
    call = Call(inner, device=device, arguments=arguments)
    ranks = Collective(call.device)
    randoms = Randoms(data, held_out)
    with borrowed(inner, randoms, parameters=False) as loan, torch.no_grad(), eager(inner):
        to_eval(inner)
        every, batches, holdout = ranks.jointly(
            lambda: _divided(data, held_out, max_batches, call, randoms)
        )
        total, whole = ranks.counts(len(batches), len(every))
        if not total:
            raise InputError("recalibrate needs at least one batch, and data has none.")
        watched = any(ranks.counts(holdout is not None))
        before = measured(call, holdout, loss, ranks) if watched else None
        if held_out is not None and before is not None and before.loss is None:
            raise InputError(
                "no loss can be measured on held_out; give batches with targets, or loss=."
            )
        old = {layer: running_statistics(layer) for layer in norms}
        settled = converge(call, norms, batches, ranks, total=total, exact=exact)
        after = measured(call, holdout, loss, ranks) if watched else None
        kept = keep_worse or not worse(before, after)
        pooled, reason, passes = None, _reason(before, after, kept=kept), settled.passes
        if kept and whole > total:
            nine_tenths = {layer: running_statistics(layer) for layer in norms}
            joint = converge(call, norms, every, ranks, total=whole, exact=exact)
            passes += joint.passes
            pooled = measured(call, holdout, loss, ranks)
            if keep_worse or not worse(before, pooled):
                settled, batches, total = joint, every, whole
            else:
                _restore(nine_tenths)
                pooled, reason = None, _NOT_POOLED
        (examples,) = ranks.counts(batches.examples)
        rows = _rows(norms, settled.seen, old, total, left)
        written = {row.layer for row in rows}
        loan.keep = {layer for layer, name in norms.items() if kept and name in written}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    left.sort(key=lambda it: order[it.layer])
    reason = "; ".join(filter(None, (reason, _moving(settled))))
    figures = (tuple(rows), tuple(left), passes, total, examples, before, after, pooled)
    return Recalibration(model, *figures, kept, reason)


_NOT_POOLED = (
    "with the held-out batches pooled in, their loss would be higher than before: the statistics "
    "are of the others alone"
)


def _restore(statistics: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> None:
    for layer, (mean, var) in statistics.items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.data.copy_(mean)
        layer.running_var.data.copy_(var)


def worse(before: Measured | None, after: Measured | None) -> bool:
    """Whether the loss rose, beyond rounding. Nothing is worse than NaN."""
    if before is None or after is None or before.loss is None or math.isnan(before.loss):
        return False
    return after.loss is None or not after.loss <= before.loss + SAME * abs(before.loss)


def _reason(before: Measured | None, after: Measured | None, *, kept: bool) -> str:
    if not kept:
        return (
            "the held-out loss would be higher than before, so the old statistics stay; "
            "keep_worse=True takes the new ones even so"
        )
    if worse(before, after):
        return "the held-out loss is higher than before; kept as keep_worse=True asks"
    if before is None:
        return "nothing was held out: whether the model is better was not measured"
    return "no loss could be measured on what was held out" if before.loss is None else ""


def _moving(settled: Convergence) -> str:
    if settled.reached:
        return ""
    return (
        "the last pass still moved the statistics: the data differ from pass to pass, or a layer "
        "works on what comes of its own output"
    )


# -- which layers -------------------------------------------------------------------------------


def _chosen(model: nn.Module) -> tuple[dict[_BatchNorm, str], list[KeptNorm]]:
    """The batch norms to recalibrate with their names, and those to leave."""
    named = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    others = [name for name, m in model.named_modules() if frozen_statistics(m)]
    if not named and not others:
        raise InputError("the model has no batch norm, so there is nothing to recalibrate.")
    learns = any(p.requires_grad for p in model.parameters())
    norms, left = {}, [KeptNorm(name, "is frozen, by its class") for name in others]
    for layer, name in named.items():
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise InputError(
                f"{name or 'the model'} is lazy; call the model once on a batch first."
            )
        reason = why_kept(layer, training=model.training, learns=learns)
        if reason:
            left.append(KeptNorm(name, reason))
        else:
            norms[layer] = name
    return norms, left


# -- data ---------------------------------------------------------------------------------------


class _Batches:
    """Some batches of ``source``; each time through begins from the same random state.

    ``examples`` are those of the last time through, as far as it has come.
    """

    def __init__(self, source: Iterable[Any], randoms: Randoms, numbers: Collection[int]) -> None:
        self._source, self._randoms, self._numbers = source, randoms, numbers
        self.examples = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Any]:
        self._randoms.rewind()
        end = max(self._numbers, default=-1) + 1
        self.examples = 0
        for number, batch in enumerate(itertools.islice(iter(self._source), end)):
            if number in self._numbers:
                self.examples += examples_of(batch)
                yield batch

    def without(self, numbers: Collection[int]) -> tuple[_Batches, _Batches]:
        """Those whose numbers are not in ``numbers``, and the others."""
        kept = frozenset(self._numbers) - frozenset(numbers)
        return (
            _Batches(self._source, self._randoms, kept),
            _Batches(self._source, self._randoms, frozenset(numbers)),
        )


def _batches(source: Any, most: int | None, randoms: Randoms, name: str) -> _Batches:
    if isinstance(source, Tensor) or not isinstance(source, Iterable):
        raise InputError(
            f"{name} must be batches that can be iterated, got {type(source).__name__}; put a "
            "single batch into a list."
        )
    if iter(source) is source:
        source = list(itertools.islice(source, most))
    count = _length(source)
    if count is None:
        randoms.rewind()
        count = sum(1 for _ in itertools.islice(iter(source), most))
    return _Batches(source, randoms, range(count if most is None else min(count, most)))


def _length(source: Any) -> int | None:
    """How many batches it says it has; None where it does not, or may be wrong, for streams."""
    if isinstance(source, DataLoader) and isinstance(source.dataset, IterableDataset):
        return None
    try:
        return len(source)
    except TypeError:
        return None


def _divided(
    data: Any, held_out: Any, most: int | None, call: Call, randoms: Randoms
) -> tuple[_Batches, _Batches, _Batches | None]:
    """All batches of ``data``, those for the statistics that are judged, and those held out."""
    batches = _batches(data, most, randoms, "data")
    if held_out is not None:
        return batches, batches, _batches(held_out, None, randoms, "held_out")
    count = len(batches)
    if count < 2 or call.prepare(next(iter(batches))).target is None:
        return batches, batches, None
    return batches, *batches.without(held_out_of(count))


def held_out_of(count: int) -> range:
    """Numbers of every tenth of ``count`` batches, at least one: a loader's end may differ.

    The last batch, which may be small, is left to the statistics where there are others.
    """
    return range(min(4, count // 2), count - count % 10 if count > 10 else 10, 10)


# -- measuring ----------------------------------------------------------------------------------


def measured(
    call: Call, holdout: Iterable[Any] | None, loss: Loss | None, ranks: Collective
) -> Measured:
    """Loss and accuracy over all examples held out on all ranks."""

    def totals() -> list[float]:
        lost, counted, right, judged, examples = 0.0, 0, 0.0, 0, 0
        for batch in holdout or ():
            output, target = call(batch)
            n = examples_of(batch)
            examples += n
            value, share = loss_of(output, target, loss), accuracy_of(output, target)
            if value is not None:
                lost, counted = lost + n * value, counted + n
            if share is not None:
                right, judged = right + n * share, judged + n
        return [lost, counted, right, judged, examples]

    lost, counted, right, judged, examples = ranks.sums(*ranks.jointly(totals))
    return Measured(
        lost / counted if counted else None, right / judged if judged else None, int(examples)
    )


# -- the result ---------------------------------------------------------------------------------


def _rows(
    norms: dict[_BatchNorm, str],
    seen: dict[_BatchNorm, InputMoments],
    old: dict[_BatchNorm, tuple[Tensor, Tensor]],
    batches: int,
    left: list[KeptNorm],
) -> list[RecalibratedNorm]:
    """A row for each layer with new statistics; the others go to ``left``."""
    rows = []
    for layer, name in norms.items():
        reason = _why_unwritten(layer, seen[layer])
        if reason:
            left.append(KeptNorm(name, reason))
            continue
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.data.fill_(max(batches, _half_life(layer.momentum)))
        rows.append(_row(layer, name, seen[layer], old[layer]))
    return rows


def _half_life(momentum: float | None) -> int:
    """The batches after which what came before them weighs no more than a half.

    A cumulative average (None) weighs by the true number, 0 and 1 by none.
    """
    if momentum is None or not 0 < momentum < 1:
        return 0
    batches = math.ceil(math.log(0.5) / math.log1p(-momentum))
    return batches if (1 - momentum) ** batches <= 0.5 else batches + 1


def _why_unwritten(layer: _BatchNorm, seen: InputMoments) -> str:
    if not seen.calls:
        return "was never called"
    if seen.calls == seen.skipped:
        return "no batch gave it finite input of shape (N, C, *S)"
    if not bool((seen.moments.count > 1).any()):
        return "saw fewer than two values per channel"
    if not bool(sound_statistics(layer, seen.moments)[2].any()):
        return "its new statistics do not fit into the dtype of its buffers"
    return ""


def _row(
    layer: _BatchNorm, name: str, seen: InputMoments, old: tuple[Tensor, Tensor]
) -> RecalibratedNorm:
    (mean, var), (new_mean, new_var) = (
        (widest(a), widest(b)) for a, b in (old, running_statistics(layer))
    )
    mean_dtype = str(old[0].dtype).removeprefix("torch.")
    eps = epsilon(layer)
    drift = (new_mean - mean).abs() / (var + eps).sqrt()
    drift = torch.where(new_mean == mean, 0, drift).nan_to_num(nan=math.inf)
    ratio = (new_var + eps) / (var + eps)
    ratio = torch.where(new_var == var, 1, torch.maximum(ratio, 1 / ratio)).nan_to_num(nan=math.inf)
    notes = []
    if not bool((torch.isfinite(mean) & torch.isfinite(var)).all()):
        notes.append("was not finite before")
    if seen.skipped:
        notes.append(f"{seen.skipped} of {seen.calls} calls were not finite and do not count")
    unsound = int((~sound_statistics(layer, seen.moments)[2]).sum())
    if unsound:
        notes.append(
            f"{unsound} channels stay: fewer than two values, or statistics beyond {mean_dtype}"
        )
    values = int(seen.moments.count.max())
    return RecalibratedNorm(name, drift.max().item(), ratio.max().item(), values, "; ".join(notes))
