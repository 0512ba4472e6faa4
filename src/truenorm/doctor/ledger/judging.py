"""What a ledger's book says of a model: a function for each code that training can show."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from truenorm.doctor.check import Found, NotApplicable, Severity
from truenorm.doctor.checks.batches import (
    CALLS_RATIO,
    CALLS_SHIFT,
    FEW_VALUES,
    calls_differ,
    synced,
)
from truenorm.doctor.facts import Facts
from truenorm.doctor.ledger.book import RENEWED, Book, Layer, Record, Strays
from truenorm.layers.functional import Moments


def none_called(unseen: list[str]) -> None:
    """Refuse to judge what was not seen."""
    if unseen:
        raise NotApplicable(f"no call of a batch norm was seen, though {len(unseen)} moved: "
                            "compiled models call none")  # fmt: skip
    raise NotApplicable("no batch norm was called while it was watched")


def not_all_seen(unseen: list[str]) -> None:
    """Refuse to call a part the whole."""
    raise NotApplicable(
        f"nothing was found in the layers seen; not seen were {', '.join(unseen)}: compiled ones "
        "and those that came in later are not"
    )


# -- TN1xx, TN2xx -------------------------------------------------------------------------------


def not_finite(book: Book, facts: Facts) -> Iterator[Found]:
    """TN102: the step at which statistics ceased to be finite."""
    bad = [layer for layer in book.called if layer.bad is not None]
    for layer in bad:
        low, step = layer.bad or (0, 0)
        exact = step - low <= 1 or layer.module.running_var.is_cpu
        evidence: dict[str, object] = {"first at step": step} if exact else {
            "not before step": low, "not after step": step,
        }  # fmt: skip
        evidence["layers"] = len(bad)
        yield Found(layer.name, "error", "a batch that was not finite was written", evidence)


def evaluated_on_others(book: Book, facts: Facts) -> Iterator[Found]:
    """TN103: what a model was evaluated on is not what its statistics were made of.

    Only the first norm of a forward is judged: what the others get depends on it.
    """
    found = []
    for layer in book.called:
        rested = [r for r in layer.records if r.tracked is not None and r.mean is not None]
        last = [r for r in rested if r.step == rested[-1].step]
        if not last or last[0].tracked is None:
            continue
        mean, var = last[0].tracked.double().cpu()
        given = _pooled(last, one=False)
        differ, shift, ratio = calls_differ([given, Moments(mean[None], var[None], given.count)])
        if differ:
            cause = "the data it was evaluated on have other moments than those it was trained on"
            evidence = {"shift in standard deviations": shift, "variances": ratio}
            found.append(Found(layer.name, "warning", cause, evidence))
    if not found:
        raise NotApplicable("needs data")  # a part of the answer is no pass
    yield from found


# Strays before nearly every step are a part of the step.
EVERY_STEP = 0.8
# A forward in a hundred that goes nowhere, each by itself, is a loss that was skipped.
SKIPPED = 0.01


def wrong_mode(book: Book, facts: Facts) -> Iterator[Found]:
    """TN201: steps made with forwards in eval mode."""
    if not book.steps:
        raise NotApplicable("no step of an optimizer was seen")
    trained = any(layer.trained for layer in book.called)
    whole = book.resting_steps * 2 > book.steps
    for layer in book.called:
        if not layer.rested_stepped or not layer.learns:
            continue
        evidence = {
            "steps": book.steps,
            "steps with the model in eval mode": book.resting_steps,
            "forwards in train mode": layer.trained,
        }
        if whole and not trained:
            yield Found(layer.name, "warning", "training ran in eval mode", evidence)
        elif whole:
            cause = "most steps were made in eval mode: train() was not called again"
            yield Found(layer.name, "warning", cause, evidence)
        elif not layer.trained:
            cause = "it rested in eval mode while its weight and bias learned"
            yield Found(layer.name, "note", cause, evidence)


def half_frozen(book: Book, facts: Facts) -> Iterator[Found]:
    """TN202: weight and bias frozen, statistics not."""
    for layer in book.called:
        # Frozen in turns, as a discriminator is for the generator's step, is not meant to be fixed.
        if not layer.frozen or layer.toggles > 2:
            continue
        if not book.steps and not layer.unfrozen:
            continue  # nothing was trained
        evidence = {"writes": layer.frozen}
        weight = layer.module.weight
        then = layer.weight
        followed = then is not None and not torch.equal(weight.detach(), then.to(weight))
        if followed and not layer.unfrozen:
            cause = "weight and bias follow others, as an average does; its statistics are its own"
            yield Found(layer.name, "note", cause, evidence)
        else:
            cause = "weight and bias are frozen, and its statistics were moved"
            yield Found(layer.name, "error", cause, evidence)


def stray(book: Book, facts: Facts) -> Iterator[Found]:
    """TN203: writes that belong to no step of the training that is going on."""
    if not any(layer.stepped for layer in book.called):
        raise NotApplicable("no forward in train mode was followed by its step")
    judges = {
        "no gradients": _without_gradients,
        "unreached": _unreached,
        "attack": _attack,
        "discarded": _discarded,
    }
    for layer in book.called:
        if not layer.stepped:
            continue  # none of its writes is any training's: a target network, or a recalibration
        found = [
            made
            for kind, judge in judges.items()
            if (strays := layer.strays.get(kind)) and (made := judge(layer, strays, book))  # type: ignore[call-overload]
        ]
        yield from found[:1]


def _evidence(layer: Layer, strays: Strays) -> dict[str, object]:
    return {"such writes": strays.total, "of": layer.writes}


def _without_gradients(layer: Layer, strays: Strays, book: Book) -> Found | None:
    evidence = _evidence(layer, strays)
    if _every_step(layer, strays, book):
        return _regular(layer, "no gradients", evidence, "a forward under no_grad in train mode")
    severity: Severity = "note"
    cause = "many forwards in a row under no_grad ran in train mode: a recalibration, or a test"
    if strays.between:
        severity, cause = "error", "forwards under no_grad ran in train mode between steps"
    elif not (_renews(layer, strays.leading) or _renews(layer, strays.tail)):
        where = "before the first" if strays.leading else "after the last"
        severity, cause = "warning", f"forwards under no_grad ran in train mode {where} step"
    return Found(layer.name, severity, cause, evidence)


def _unreached(layer: Layer, strays: Strays, book: Book) -> Found | None:
    evidence = _evidence(layer, strays)
    if _every_step(layer, strays, book):
        return _regular(layer, "unreached", evidence, "a forward without its backward")
    single = max(strays.longest, strays.tail) == 1 and not strays.leading
    few = strays.total == 1 or strays.total <= SKIPPED * layer.writes
    cause = "forwards in train mode had no backward: a dummy pass, or a validation"
    if single and few:
        return Found(layer.name, "note", "a forward in train mode had no backward", evidence)
    return Found(layer.name, "warning", cause, evidence)


def _attack(layer: Layer, strays: Strays, book: Book) -> Found | None:
    cause = "forwards that an attack on the input made were written, too"
    return Found(layer.name, "warning", cause, _evidence(layer, strays))


def _discarded(layer: Layer, strays: Strays, book: Book) -> Found | None:
    if strays.total <= SKIPPED * layer.writes or strays.total < 2:
        return None  # steps that a gradient scaler skipped
    cause = (
        "forwards whose gradient was thrown away were written, too, as of the first half of a step "
        "of SAM, a generator's step or skipped steps"
    )
    return Found(layer.name, "note", cause, _evidence(layer, strays))


def _every_step(layer: Layer, strays: Strays, book: Book) -> bool:
    """Whether strays are a part of each step, and not made between one and the next.

    A validation after each step is told by its place: none came before the first step, some
    after the last.
    """
    steps = layer.steps if book.steps else layer.stepped
    after = strays.tail > 0 and not strays.leading and not strays.inside
    return steps > 2 and strays.runs >= EVERY_STEP * steps and not after


def _regular(layer: Layer, fate: str, evidence: dict[str, object], what: str) -> Found:
    """A forward besides in every step: it harms if its data are others."""
    groups = [[r for r in _comparable(layer) if r.fate == f] for f in (fate, "stepped")]
    cause = f"{what} is a part of each step, and moves the statistics as well"
    if all(groups):
        differ, shift, ratio = calls_differ([_pooled(group, one=False) for group in groups])
        evidence |= {"shift in standard deviations": shift, "variances": ratio}
        if differ:
            return Found(layer.name, "warning", f"{cause}: its data are others", evidence)
    return Found(layer.name, "note", cause, evidence)


def _renews(layer: Layer, number: int) -> bool:
    """Whether so many writes make nearly all of the average, as a recalibration wants."""
    momentum = layer.momentum
    share = 1.0 if momentum is None else 1 - (1 - min(momentum, 1)) ** number
    return number > 0 and share >= RENEWED


def twice(book: Book, facts: Facts) -> Iterator[Found]:
    """TN204: writes of recomputed forwards."""
    for layer in book.called:
        if layer.in_backward:
            cause = "a forward that was repeated in the backward pass counted again"
            evidence = {"writes in backward": layer.in_backward, "of": layer.writes}
            yield Found(layer.name, "warning", cause, evidence)


def predicted_in_train_mode(book: Book, facts: Facts) -> Iterator[Found]:
    """TN205: forwards without gradients in train mode, where nothing was trained."""
    for layer in book.called:
        strays = layer.strays.get("no gradients")
        if book.steps or layer.stepped or strays is None:
            continue
        # Many in a row may be a recalibration; an average of another model has frozen weights.
        doubtful = _renews(layer, strays.total) or not layer.learns
        cause = "it ran in train mode without gradients, by the batch's own statistics"
        severity: Severity = "note" if doubtful else "warning"
        yield Found(layer.name, severity, cause, _evidence(layer, strays))


# -- TN3xx --------------------------------------------------------------------------------------


def last_batch(book: Book, facts: Facts) -> Iterator[Found]:
    """TN302: a batch of very few values, where most have many."""
    for layer in book.called:
        norm = facts.norms.get(layer.name)
        if not layer.sizes or layer.pooled or (norm is not None and synced(norm)):
            continue
        (rows, usual), _ = layer.sizes.most_common(1)[0]
        # As many rows with fewer positions are a small map, not a small batch.
        few = [n for number, n in layer.sizes if number < rows]
        least = min(few, default=usual)
        ours = (layer.module.options.min_count or 0) if layer.ours else 0
        if least < FEW_VALUES and least * 4 <= usual and ours <= least:
            cause = "a batch was too small for statistics and counted as a full one"
            evidence = {"values per channel": least, "in most batches": usual}
            yield Found(layer.name, "warning", cause, evidence)


# Accumulated micro-batches below it are noisier than the batch they make up by a sixth or more.
SMALL_MICRO_BATCH = 32
# Means of one batch seen twice differ by less than this share of what those of two batches do.
SAME_DATA = 0.1
# Odds by chance below which the parts of a step are taken to be of different data.
ROLES = 1e-3


def accumulated(book: Book, facts: Facts) -> Iterator[Found]:
    """TN303: several forwards and backwards a step, on micro-batches of one kind."""
    if not book.steps:
        raise NotApplicable("no step of an optimizer was seen")
    for layer in book.called:
        if layer.pooled or layer.accumulated < 2 or layer.accumulated * 2 < layer.steps:
            continue
        records = [r for r in _comparable(layer) if r.passes > 1]
        if not _micro_batches(_blocks(records, 1, steps=True)):
            continue
        (_, usual), _ = layer.sizes.most_common(1)[0]
        severity: Severity = "warning" if usual < SMALL_MICRO_BATCH else "note"
        cause = "each micro-batch is normalized by itself and counts as a batch"
        evidence = {"forwards per step": layer.stepped / layer.steps, "values per channel": usual}
        yield Found(layer.name, severity, cause, evidence)


def _micro_batches(blocks: list[list[Record]]) -> bool:
    """Whether the parts of a step are equally large, and neither the same data nor of two kinds.

    A discriminator is given real images and others; two tasks may be given the same ones.
    """
    if not blocks:
        return False
    sizes = [Counter(r.n for r in part).most_common(1)[0][0] for part in zip(*blocks, strict=True)]
    if any(size != sizes[0] for size in sizes[:-1]) or sizes[-1] > sizes[0]:
        return False
    features = _features(blocks)
    if len(blocks) < FEWEST_BLOCKS or features is None:
        return True
    if min(_odds(feature) for feature in features) < ROLES:
        return False
    means = features[0]
    within = means.var(1).mean(0)
    between = means.mean(1).var(0) * means.shape[1]
    return float((within / between.clamp(min=1e-12)).median()) > SAME_DATA


# Odds by chance at which a pattern is believed: with a hundred layers and a dozen patterns in
# each it is wrong in one of a thousand trainings.
TURNS = 1e-6
LONGEST = 6  # steps after which a pattern begins again, at most
MOST_PARTS = 12  # of a pattern
FEWEST_BLOCKS, FEWEST = 6, 16  # patterns, and forwards, that it takes to tell


def in_turns(book: Book, facts: Facts) -> Iterator[Found]:
    """TN305: data of several kinds that take turns, from step to step or within one."""
    found, judged = [], False
    for layer in book.called:
        records = _comparable(layer)
        if len(records) < FEWEST:
            continue
        judged = True
        turns = _turns(records, steps=book.steps > 0)
        if turns is not None:
            found.append((turns, layer.name))
    if not judged:
        raise NotApplicable(f"fewer than {FEWEST} forwards in train mode were recorded in detail")
    if found:
        turns, name = max(found, key=lambda row: row[0].size)
        severity: Severity = "warning"
        cause = "batches of several distributions take turns: the moments swing with them"
        if turns.generated:
            severity = "note"
            cause = (
                "a discriminator's real and generated batches differ: its running statistics fit "
                "neither, which matters where it is used in eval mode"
            )
        yield Found(name, severity, cause, turns.evidence | {"layers": len(found)})


@dataclass(frozen=True)
class _Turns:
    period: int
    parts: int
    shift: float  # standard deviations
    ratio: float  # of variances
    generated: bool  # some of the parts were made by another network that learns, and some not

    @property
    def size(self) -> float:
        return max(self.shift / CALLS_SHIFT, self.ratio / CALLS_RATIO)

    @property
    def evidence(self) -> dict[str, object]:
        return {
            "shift in standard deviations": self.shift,
            "variances": self.ratio,
            "steps until they come again": self.period,
            "forwards until they come again": self.parts,
        }


def _turns(records: list[Record], *, steps: bool) -> _Turns | None:
    """The shortest pattern whose parts differ, beyond chance and by enough to harm."""
    for period in range(1 if steps else 2, LONGEST + 1):
        for chosen in (records, [r for r in records if r.grad]):
            blocks = _blocks(chosen, period, steps=steps)
            parts = len(blocks[0]) if blocks else 0
            enough = len(blocks) >= FEWEST_BLOCKS and len(blocks) * parts >= FEWEST
            if not enough or not 1 < parts <= MOST_PARTS:
                continue
            features = _features(blocks)
            if features is None or min(_odds(feature) for feature in features) > TURNS:
                continue
            # Chance is a single batch's: a few batches that come again in the same order differ
            # by it for ever.
            pooled = [_pooled(list(part), one=True) for part in zip(*blocks, strict=True)]
            differ, shift, ratio = calls_differ(pooled)
            if differ:
                made = len({record.generated for record in blocks[-1]}) > 1
                return _Turns(period, parts, shift, ratio, made)
    return None


def called_again(book: Book, facts: Facts) -> Iterator[Found]:
    """TN306: several calls in one forward."""
    for layer in book.called:
        if not layer.later or not (layer.writes or layer.pooled):
            continue
        calls: dict[int, list[Record]] = defaultdict(list)
        for record in layer.records:
            if record.phase == "train" and record.mean is not None and not record.backward:
                calls[record.call].append(record)
        evidence: dict[str, object] = {
            "calls beyond the first": layer.later,
            "forwards": layer.trained - layer.later,
        }
        differ, cause = False, "each forward moves its statistics once per call"
        if len(calls) > 1:
            pooled = [_pooled(records, one=False) for records in calls.values()]
            differ, shift, ratio = calls_differ(pooled)
            evidence |= {"shift in standard deviations": shift, "variances": ratio}
            cause = (
                "its running statistics are an average over calls that differ"
                if differ
                else f"{cause}; the calls are alike"
            )
        yield Found(layer.name, "warning" if differ else "note", cause, evidence)


# -- comparisons --------------------------------------------------------------------------------


def _comparable(layer: Layer) -> list[Record]:
    """Detailed records of first calls in train mode with their moments, each forward once."""
    return [
        r
        for r in layer.records
        if r.phase == "train" and r.call == 0 and not r.backward and r.mean is not None and r.finite
    ]


def _blocks(records: list[Record], period: int, *, steps: bool) -> list[list[Record]]:
    """Records of ``period`` steps each, in the order they came; only blocks of the usual make-up.

    Blocks that were not recorded from their beginning to their end are none. Without steps each
    forward stands for one.
    """
    blocks: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        blocks[(record.step if steps else record.forward) // period].append(record)
    made: dict[tuple[int, ...], list[list[Record]]] = defaultdict(list)
    for block in blocks.values():
        key = tuple((r.step if steps else r.forward) % period for r in block)
        made[key].append(block)
    complete = {key: of for key, of in made.items() if len(set(key)) == period}
    return max(complete.values(), key=len, default=[])


def _features(blocks: list[list[Record]]) -> tuple[Tensor, Tensor] | None:
    """Means in standard deviations, and logarithms of these: each (blocks, parts, channels)."""
    shape = (len(blocks), len(blocks[0]), -1)
    flat = [record for block in blocks for record in block]
    mean = torch.stack([r.mean for r in flat if r.mean is not None]).double().cpu()
    var = torch.stack([r.var for r in flat if r.var is not None]).double().cpu()
    alive = var.amin(0) > 1e-12
    if not bool(alive.any()):
        return None
    mean, var = mean[:, alive], var[:, alive]
    return (mean / var.mean(0).sqrt()).view(shape), (0.5 * var.log()).view(shape)


def _odds(feature: Tensor) -> float:
    """Chance that parts of blocks, (blocks, parts, channels), differ as much if they are alike.

    An analysis of variance with blocks, of the median channel, as if there were no other. What
    drifts from block to block, as activations do in training, takes no part in it.
    """
    blocks, parts, _ = feature.shape
    centred = feature - feature.mean(1, keepdim=True)
    effect = centred.mean(0)
    rest = (centred - effect).square().sum((0, 1)) / ((parts - 1) * (blocks - 1))
    ratio = blocks * effect.square().sum(0) / (parts - 1) / rest.clamp(min=1e-30)
    return float(stats.f.sf(float(ratio.median()), parts - 1, (parts - 1) * (blocks - 1)))


def _pooled(records: list[Record], *, one: bool) -> Moments:
    """Moments of all, (1, C); the count is what the mean is worth, of one batch or of all."""
    mean = torch.stack([r.mean for r in records if r.mean is not None]).double().cpu()
    var = torch.stack([r.var for r in records if r.var is not None]).double().cpu()
    worths = [r.worth for r in records]
    count = statistics.median(worths) if one else sum(worths)
    return Moments(mean.mean(0, True), var.mean(0, True), mean.new_full((1, 1), count))


VERDICTS: dict[str, Callable[[Book, Facts], Iterator[Found]]] = {
    "TN102": not_finite,
    "TN103": evaluated_on_others,
    "TN201": wrong_mode,
    "TN202": half_frozen,
    "TN203": stray,
    "TN204": twice,
    "TN205": predicted_in_train_mode,
    "TN302": last_batch,
    "TN303": accumulated,
    "TN305": in_turns,
    "TN306": called_again,
}
