"""Where a training's batches come from: parts in memory, or a user's own data sets and loaders."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

from truenorm.calling.call import Arguments, Call, Loss
from truenorm.calling.nested import examples_of, tensors_in
from truenorm.data.augmentation import lightly, shifted
from truenorm.data.batches import Batch, chunks, in_batches, in_order
from truenorm.data.datasets import Dataset, Splits
from truenorm.errors import InputError
from truenorm.training.class_weight import weighted, weights_of
from truenorm.training.config import TrainConfig
from truenorm.training.evaluate import AnyBatch, Scores, check_classes, logits_of, score, scored


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order and augmentation; torch's own, of dropout, is set alike.

    A function of seed and epoch alone, so that a checkpoint needs no generator's state.
    """
    of_epoch = (seed * 1_000_003 + epoch) % 2**63
    torch.manual_seed(of_epoch)
    return torch.Generator().manual_seed(of_epoch)


class Feed(Protocol):
    """Gives a training its batches, and what it is validated by.

    Attributes:
        examples: in an epoch; None where that is not known beforehand.
        batches: in an epoch, likewise.
    """

    @property
    def examples(self) -> int | None: ...
    @property
    def batches(self) -> int | None: ...

    def epoch(self, number: int) -> Iterator[AnyBatch]:
        """The batches of an epoch, from 1."""

    def few(self) -> AnyBatch:
        """Some examples, to try a model on."""

    def validate(self, model: nn.Module, loss: Loss | None, *, amp: bool) -> Scores:
        """Scores of ``model`` on what is held out."""

    def described(self, few: AnyBatch) -> str:
        """What a batch is, for a message."""

    def check(self, logits: Tensor) -> None:
        """Refuse logits that have not a column for each class, where classes are known."""

    def state(self) -> list[Tensor]:
        """What its order depends on beside seed and epoch, after an epoch."""

    def load(self, state: list[Tensor]) -> None:
        """Take over what :meth:`state` gave."""


class InMemory:
    """:class:`Splits`: examples gathered, scaled and, where the config says so, moved here."""

    def __init__(self, splits: Splits, config: TrainConfig, device: torch.device) -> None:
        config.check_shape(splits.input_shape)
        self.splits, self._config, self._device = splits, config, device
        self._class_weights = weights_of(config.class_weight, splits.train)
        self._train = weighted(splits.train, self._class_weights)
        self.examples = len(splits.train)
        self.batches = len(chunks(torch.arange(self.examples), config.batch_size))

    def epoch(self, number: int) -> Iterator[Batch]:
        config, splits = self._config, self.splits
        order, generator = self.order(number)
        batches = in_batches(self._train, order, config.batch_size, splits.scaling, self._device)
        if config.shift:
            batches = (b._replace(x=shifted(b.x, config.shift, generator)) for b in batches)
        if config.augment == "light":
            batches = (b._replace(x=lightly(b.x, generator)) for b in batches)
        return batches

    def order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The order of the training examples in ``epoch``, from 1, and what draws after it."""
        generator = seeded(self._config.seed, epoch)
        return torch.randperm(self.examples, generator=generator), generator

    def few(self) -> Batch:
        valid = self.splits.valid
        some = valid.take(torch.arange(min(2, len(valid))))
        return next(in_order(some, self.splits.scaling, self._device))

    def validate(self, model: nn.Module, loss: Loss | None, *, amp: bool) -> Scores:
        valid, scaling, device = self.splits.valid, self.splits.scaling, self._device
        if loss is not None:
            return scored(model, in_order(valid, scaling, device), device, loss=loss, amp=amp)
        logits = logits_of(model, valid, scaling, device, amp=amp)
        return score(logits, valid, self._class_weights)

    def described(self, few: AnyBatch) -> str:
        return f"shape (N, {', '.join(map(str, self.splits.input_shape))})"

    def check(self, logits: Tensor) -> None:
        check_classes(logits, self.splits.valid)

    def state(self) -> list[Tensor]:
        return []

    def load(self, state: list[Tensor]) -> None:
        pass


class Given(NamedTuple):
    """A batch of a user's own, taken apart by :class:`truenorm.calling.call.Call`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Any
    examples: int
    weight: None = None

    def run(self, model: nn.Module) -> Any:
        """What ``model`` says of it."""
        return model(*self.args, **self.kwargs)


class Loaded:
    """A user's loaders, gone through as they are, and data sets, given out in the epoch's order.

    Args:
        train: a loader, or a data set.
        valid: likewise.
        config: of which the batch size is that of data sets.
        call: what makes a call of a batch.
    """

    def __init__(self, train: Any, valid: Any, config: TrainConfig, call: Call) -> None:
        for name, value in config.augmentation().items():
            raise InputError(
                f"{name} moves the images of Splits, got {value!r} with data of your own; "
                f"augment in your Dataset, and leave {name} out."
            )
        if config.class_weight != "none":
            raise InputError(
                f"class_weight counts the classes of Splits, got {config.class_weight!r} with data "
                "of your own; give loss=torch.nn.CrossEntropyLoss(weight=...)."
            )
        self._config, self._call = config, call
        self._train, self._valid = train, valid
        self.examples, self.batches = _sizes(train, config.batch_size)
        holders = [h for one in (train, valid) for h in (one, getattr(one, "sampler", None))]
        found = [getattr(holder, "generator", None) for holder in holders]
        self._generators = [g for g in found if isinstance(g, torch.Generator)]

    def epoch(self, number: int) -> Iterator[Given]:
        generator = seeded(self._config.seed, number)
        # Transforms draw from these, too.
        random.seed(torch.initial_seed())
        np.random.seed(torch.initial_seed() % 2**32)  # noqa: NPY002  the global one is what they use
        sampler: Any = getattr(self._train, "sampler", None)
        if hasattr(sampler, "set_epoch"):  # a DistributedSampler's order is the epoch's
            sampler.set_epoch(number)
        return self._taken(_loader(self._train, self._config.batch_size, generator))

    def few(self) -> Given:
        return next(self._validation(), None) or _refuse_empty("validation")

    def validate(self, model: nn.Module, loss: Loss | None, *, amp: bool) -> Scores:
        return scored(model, self._validation(), self._call.device, loss=loss, amp=amp)

    def described(self, few: AnyBatch) -> str:
        assert isinstance(few, Given), "its own"
        shapes = [tuple(t.shape) for t in tensors_in((few.args, few.kwargs))]
        return f"shape {', '.join(map(str, shapes))}"

    def check(self, logits: Tensor) -> None:
        """There is no list of classes."""

    def state(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def load(self, state: list[Tensor]) -> None:
        for generator, stored in zip(self._generators, state, strict=True):
            generator.set_state(stored)

    def _validation(self) -> Iterator[Given]:
        return self._taken(_loader(self._valid, self._config.batch_size, None))

    def _taken(self, batches: Iterable[Any]) -> Iterator[Given]:
        return given(self._call, batches)


def given(call: Call, batches: Iterable[Any]) -> Iterator[Given]:
    """Each batch, taken apart."""
    for batch in batches:
        args, kwargs, target = call.prepare(batch)
        yield Given(args, kwargs, target, examples_of(batch))


def _refuse_empty(part: str) -> Given:
    raise InputError(f"the {part} loader gives no batch; give one that can be gone through again.")


# What a user gives ------------------------------------------------------------------------------

_ALL = (
    "give Splits, a torch Dataset, or a pair (train, valid) of Datasets, DataLoaders or (x, y) "
    "arrays"
)
_PART = "give Splits, a torch Dataset, a DataLoader or a pair (x, y) of arrays"


def feed_of(
    data: Any,
    valid: float,
    config: TrainConfig,
    model: nn.Module,
    arguments: Arguments | None = None,
) -> Feed:
    """What feeds a training of ``model``, which is where it is to be trained.

    Args:
        data: as :func:`truenorm.fit` takes it.
        valid: the share of one data set that is held out for validation.
        config: how to train.
        model: the model.
        arguments: what makes its arguments of a batch.

    Raises:
        InputError: ``data`` are nothing such, or there is nothing to validate by.
    """
    if isinstance(data, Splits):
        if arguments is not None:
            raise InputError("arguments= is for batches of your own; Splits give x alone.")
        return InMemory(data, config, Call(model).device)
    if isinstance(data, tuple | list) and len(data) == 2 and not _are_arrays(data):
        train, held_out = part_of(data[0], _ALL), part_of(data[1], _ALL)
    else:
        train, held_out = _cut(part_of(data, _ALL), valid, config.seed)
    return Loaded(train, held_out, config, Call(model, arguments=arguments))


def part_of(data: Any, what: str = _PART) -> Any:
    """A loader or a data set, with (x, y) arrays made one.

    Raises:
        InputError: it is nothing such; the text says ``what`` to give.
    """
    if isinstance(data, Dataset):
        raise InputError(
            "a truenorm.Dataset does not say how its examples are scaled; give Splits: "
            "truenorm.split(data), or truenorm.Splits(train, valid)."
        )
    if isinstance(data, tuple | list):
        if len(data) == 2 and _are_arrays(data):
            return _of_arrays(*data)
        if isinstance(data, list) and _is_batch(data[:1]):
            return data
    elif not isinstance(data, str | Splits | Mapping) and not _is_array(data):
        again = isinstance(data, Iterable) and not isinstance(data, Iterator)
        if again or _is_data_set(data):
            return data
    given = f"{data!r}, which truenorm.load reads" if isinstance(data, str) else _kind_of(data)
    raise InputError(f"data cannot be {given}; {what}.")


def _is_batch(first: list[Any]) -> bool:
    """Whether a list of one thing is one of batches."""
    return any(isinstance(b, tuple | list | Mapping) and [*tensors_in(b)] for b in first)


def _kind_of(data: Any) -> str:
    once = ", which can be gone through only once" if isinstance(data, Iterator) else ""
    return f"a {type(data).__name__}{once}"


def _are_arrays(pair: Any) -> bool:
    """Whether it is (x, y) rather than (train, valid)."""
    return all(map(_is_array, pair))


def _is_array(value: Any) -> bool:
    if isinstance(value, list | tuple):
        first = value[0] if value else None
        nested = isinstance(first, list | tuple) and _is_array(first)
        return nested or isinstance(first, int | float | str | np.generic)
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _of_arrays(x: Any, y: Any) -> TensorDataset:
    """Examples and targets as they are, without any scaling; wide floats become float32."""
    tensors = []
    for name, values in (("x", x), ("y", y)):
        try:
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{name}: must be an array of numbers ({error}); truenorm.load((x, y)) makes "
                "Splits of arrays with labels of any kind."
            ) from error
        tensors.append(tensor.float() if tensor.is_floating_point() else tensor)
    if len(tensors[0]) != len(tensors[1]):
        raise InputError(
            f"x and y must be as long as each other, got {len(tensors[0])} and {len(tensors[1])}."
        )
    return TensorDataset(*tensors)


def _is_data_set(part: Any) -> bool:
    """Whether its examples are had by number; others are gone through."""
    if isinstance(part, IterableDataset | DataLoader | list):
        return False
    return hasattr(part, "__getitem__") and hasattr(part, "__len__")


def _cut(data: Any, valid: float, seed: int) -> tuple[Any, Any]:
    """A data set without the share that is held out, and that share."""
    if not 0 < valid < 1:
        raise InputError(f"valid must lie in (0, 1), got {valid!r}.")
    if not _is_data_set(data):
        raise InputError(
            f"there is nothing to validate by, and a {type(data).__name__} cannot be cut; give a "
            "pair (train, valid)."
        )
    held_out = round(valid * len(data))
    if not 0 < held_out < len(data):
        raise InputError(
            f"{len(data)} examples are too few to hold out a share of {valid}; give more data, or "
            "a pair (train, valid)."
        )
    sizes = [len(data) - held_out, held_out]
    first, last = random_split(data, sizes, torch.Generator().manual_seed(seed))
    return first, last


def batches_of(data: Any, size: int) -> Iterable[Any]:
    """The batches of a loader as they are, or those of a data set in order.

    Raises:
        InputError: ``data`` are nothing such, or ``size`` is none.
    """
    if size < 1:
        raise InputError(f"batch_size must be an integer of at least 1, got {size!r}.")
    return _loader(part_of(data), size, None)


def _loader(part: Any, size: int, generator: torch.Generator | None) -> Iterable[Any]:
    """``part`` in batches; a data set in an order of the ``generator``'s, or its own."""
    if isinstance(part, IterableDataset):
        return DataLoader(part, size)
    if not _is_data_set(part):
        return cast(Iterable[Any], part)
    count = len(part)
    if generator is None:
        return DataLoader(part, size)
    order = torch.randperm(count, generator=generator)
    return DataLoader(part, batch_sampler=[run.tolist() for run in chunks(order, size)])


def _sizes(part: Any, size: int) -> tuple[int | None, int | None]:
    """Examples and batches of an epoch, where they are known."""
    if _is_data_set(part):
        return len(part), len(chunks(torch.arange(len(part)), size))
    try:
        batches = len(part)
        batch_size = getattr(part, "batch_size", None)
        if batch_size is None or isinstance(part, IterableDataset):
            return None, None if isinstance(part, IterableDataset) else batches
        return min(len(part.sampler), batches * batch_size), batches
    except (TypeError, AttributeError, NotImplementedError):
        return None, None
