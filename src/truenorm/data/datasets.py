"""Data sets as tensors in memory: validated, split, scaled, and gathered a batch at a time.

Examples stay the bytes they are (uint8 stays uint8) until their batch is gathered. Nothing
here touches one example at a time.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truenorm.data.preparation import Column, Preparation
from truenorm.errors import InputError

_MOST_FRACTIONLESS = 50  # different whole numbers stored as floats: more are measurements


@dataclass(frozen=True)
class Dataset:
    """Examples and their labels.

    Attributes:
        x: (N, F) rows or (N, C, H, W) images; uint8 or float32.
        y: (N,) int64, each an index into ``classes``.
        classes: the label of each class, in order, as Python values.
        weight: (N,) float32, each example's weight in the loss, or None for equal ones.
        features: (F,) column names of rows, or None.
        name: where the data came from, for messages and reports.
        ids: (N,) what each example is called, a file or an id; or None.
        rows: (N,) int64, each example's place in its source; None for the place here.
        columns: what the columns of a table hold that is not prepared yet (its ``x`` has NaN for
            empty cells and places in categories for texts), or None.
        left_out: names of a table's columns that are not in ``x``, with the reasons.
    """

    x: Tensor
    y: Tensor
    classes: tuple[Any, ...]
    weight: Tensor | None = None
    features: tuple[str, ...] | None = None
    name: str = "data"
    ids: np.ndarray[Any, Any] | None = None
    rows: Tensor | None = None
    columns: tuple[Column, ...] | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> Dataset:
        """The examples at ``index``, (M,) int64."""
        return replace(
            self,
            x=self.x[index],
            y=self.y[index],
            weight=None if self.weight is None else self.weight[index],
            ids=None if self.ids is None else self.ids[index.numpy()],
            rows=index if self.rows is None else self.rows[index],
        )

    def name_of(self, number: int) -> str:
        """What the example at ``number`` is called: its file, its id, or its row in the source."""
        if self.ids is not None:
            return str(self.ids[number])
        return f"row {number if self.rows is None else int(self.rows[number])}"

    def fingerprint(self) -> str:
        """SHA-256 of examples, labels and classes: equal data, equal fingerprint."""
        digest = hashlib.sha256(repr((tuple(self.x.shape), str(self.x.dtype))).encode())
        for tensor in (self.x, self.y, self.weight):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(repr(self.classes).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Scaling:
    """How stored examples become network input: (x - shift) * scale, in float32.

    ``shift`` (None for zero) and ``scale`` broadcast over an example: (1,), (F,) or (C, 1, 1).
    """

    shift: Tensor | None
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scaling:
        """The scaling that suits training examples ``x``, computed from nothing else.

        Bytes go to [0, 1]. Rows of numbers are standardized a feature at a time, float
        images a channel at a time; what is constant there maps to zero.
        """
        if x.dtype == torch.uint8:
            return cls(None, torch.full((1,), 1 / 255))
        dims = [d for d in range(x.ndim) if d != 1]
        var, mean = torch.var_mean(x.double(), dims, correction=0)
        std = var.sqrt()
        # Rounding leaves a constant feature a tiny spread, which must not be blown up.
        constant = std <= 1e-6 * mean.abs()
        scale = torch.where(constant, 1.0, 1 / std)
        shape = (-1,) + (1,) * (x.ndim - 2)
        return cls(mean.float().reshape(shape), scale.float().reshape(shape))

    def __call__(self, x: Tensor) -> Tensor:
        """Scale a batch (N, ...) into a new float32 tensor on its own device."""
        wide = x.to(torch.float32, copy=True)
        if self.shift is not None:
            wide.sub_(self.shift.to(wide.device))
        return wide.mul_(self.scale.to(wide.device))

    def to_json(self) -> dict[str, Any]:
        """The numbers, exactly: a float32 survives the decimal form Python prints."""
        shift = None if self.shift is None else self.shift.tolist()
        return {"shift": shift, "scale": self.scale.tolist()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Scaling:
        """Undo :meth:`to_json`."""
        shift = None if stored["shift"] is None else torch.tensor(stored["shift"])
        return cls(shift, torch.tensor(stored["scale"]))


@dataclass(frozen=True)
class Splits:
    """Training, validation and, where there is one, test data, with the scaling for all three.

    The scaling comes from the training part alone unless it is given. Of a table that is not
    prepared yet the preparation is learned from the training part, and all parts become numbers.

    Attributes:
        preparation: what became of a table's columns, or None.
        notes: what the user should know of how the data were read.

    Raises:
        InputError: the parts differ in classes or shape, one is empty, or there are fewer
            training examples than classes.
    """

    train: Dataset
    valid: Dataset
    test: Dataset | None = None
    scaling: Scaling = field(default=None)  # type: ignore[assignment]  # set below
    preparation: Preparation | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.columns is not None:
            self._prepare(self.train.columns)
        for name, part in (("valid", self.valid), ("test", self.test)):
            if part is not None:
                _same_kind(self.train, part, name)
        for name, part in (("train", self.train), ("valid", self.valid)):
            if len(part) == 0:
                raise InputError(f"{self.train.name}: the {name} part is empty; give more data.")
        if len(self.train) < len(self.classes):
            raise InputError(
                f"{self.train.name}: has fewer training examples ({len(self.train)}) than classes "
                f"({len(self.classes)}); give more data, or another label if this one is an id."
            )
        if self.scaling is None:
            object.__setattr__(self, "scaling", Scaling.of(self.train.x))

    def _prepare(self, columns: tuple[Column, ...]) -> None:
        learned = Preparation.learn(self.train.x.numpy(), columns, self.train.left_out)
        object.__setattr__(self, "preparation", learned)
        for part in ("train", "valid", "test"):
            if (data := getattr(self, part)) is not None:
                object.__setattr__(self, part, prepared(data, learned))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example: (F,) or (C, H, W)."""
        return tuple(self.train.x.shape[1:])

    @property
    def classes(self) -> tuple[Any, ...]:
        """The label of each class, in order."""
        return self.train.classes

    def fingerprint(self) -> str:
        """One digest over all parts."""
        parts = [p.fingerprint() for p in (self.train, self.valid, self.test) if p is not None]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def prepared(data: Dataset, preparation: Preparation) -> Dataset:
    """A table's rows as numbers."""
    if data.columns is None:
        return data
    x = torch.from_numpy(preparation.apply(data.x.numpy(), data.columns))
    return replace(data, x=x, features=preparation.features, columns=None)


def _same_kind(train: Dataset, part: Dataset, name: str) -> None:
    if part.classes != train.classes:
        raise InputError(
            f"{train.name}: the {name} part has classes {_some(part.classes)}, the training part "
            f"{_some(train.classes)}; both must name the same classes in the same order."
        )
    if part.x.shape[1:] != train.x.shape[1:] or part.x.dtype != train.x.dtype:
        raise InputError(
            f"{train.name}: examples of the {name} part have shape {tuple(part.x.shape[1:])} and "
            f"type {part.x.dtype}, those of the training part {tuple(train.x.shape[1:])} and "
            f"{train.x.dtype}; convert one to the other."
        )


def dataset(
    x: Any,
    y: Any,
    *,
    classes: tuple[Any, ...] | None = None,
    weight: Any = None,
    features: tuple[str, ...] | None = None,
    name: str = "data",
    ids: Any = None,
    columns: tuple[Column, ...] | None = None,
) -> Dataset:
    """Check arrays or tensors and hold them as a :class:`Dataset`.

    Args:
        x: (N, F) rows, (N, H, W) grey images, or (N, C, H, W) or (N, H, W, C) images. Bytes
            stay bytes; every other number becomes float32.
        y: (N,) labels of any sortable kind.
        classes: all labels that may occur, sorted; by default those that do.
        weight: (N,) finite weights of at least 0.
        features: column names of rows.
        name: what errors call the data.
        ids: (N,) what each example is called.
        columns: what the columns of a table hold, whose empty cells are NaN.

    Raises:
        InputError: shapes, NaN or infinite cells, unknown labels, or fewer than two classes;
            the text says where.
    """
    checked = examples(x, name, empty_cells=columns is not None)
    labels = _labels(y, len(checked), name)
    found = np.unique(labels)
    order = found if classes is None else np.asarray(classes)
    index = np.searchsorted(order, labels).clip(max=len(order) - 1)
    wrong = np.flatnonzero(order[index] != labels)
    if len(wrong):
        raise InputError(
            f"{name}: the label {labels[wrong[0]].item()!r} of example {wrong[0]} is none of the "
            f"known classes {_some(tuple(order.tolist()))}; correct the label."
        )
    if len(order) < 2:
        raise InputError(
            f"{name}: needs at least two classes to tell apart, got only "
            f"{_some(tuple(order.tolist()))}; add examples of another class."
        )
    return Dataset(
        checked,
        torch.from_numpy(index.astype(np.int64)),
        tuple(order.tolist()),
        _weights(weight, len(checked), name),
        features,
        name,
        None if ids is None else np.asarray(ids),
        columns=columns,
    )


def examples(x: Any, name: str, *, empty_cells: bool = False) -> Tensor:
    """Check examples and hold them as (N, F) or (N, C, H, W), uint8 or float32.

    With ``empty_cells`` NaN is one, and passes.
    """
    tensor = x.detach().cpu() if isinstance(x, Tensor) else _tensor(np.asarray(x), name)
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif tensor.ndim == 4 and tensor.shape[1] not in (1, 3, 4) and tensor.shape[3] in (1, 3, 4):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim not in (2, 4) or 0 in tensor.shape:
        raise InputError(
            f"{name}: examples must be (N, features) rows or (N, C, H, W), (N, H, W, C) or "
            f"(N, H, W) images with nothing empty, got shape {tuple(tensor.shape)}."
        )
    if tensor.dtype != torch.uint8:
        if tensor.is_complex():
            raise InputError(f"{name}: examples must be real numbers, got {tensor.dtype}.")
        tensor = tensor.to(torch.float32)
        if not empty_cells:
            refuse_non_finite(tensor, name)
    return tensor.contiguous()


def _tensor(array: np.ndarray[Any, Any], name: str) -> Tensor:
    if array.dtype.kind not in "buif":
        raise InputError(
            f"{name}: examples must be numbers, got {array.dtype}; encode text and categories as "
            "numbers first."
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    # torch shares the memory of an array and wants it writable and in native byte order.
    return torch.from_numpy(
        np.require(array.astype(array.dtype.newbyteorder("=")), None, ["C", "W"])
    )


def refuse_non_finite(x: Tensor, name: str, columns: tuple[str, ...] | None = None) -> None:
    """Raise InputError naming the first NaN or infinite cell of ``x``, if there is one."""
    if torch.isfinite(x.sum()):  # one cheap pass; an overflowing sum is looked at below
        return
    bad = (~torch.isfinite(x)).nonzero()
    if not len(bad):
        return
    row, rest = int(bad[0, 0]), tuple(bad[0, 1:].tolist())
    where = f"column {columns[rest[0]]!r}" if columns else f"position {rest}"
    value = x[tuple(bad[0].tolist())].item()
    raise InputError(
        f"{name}: row {row} (counted from 0), {where} is {value}; every cell must be a finite "
        "float32 number. Drop or fill such rows."
    )


def _labels(y: Any, count: int, name: str) -> np.ndarray[Any, Any]:
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.shape == (count, 1):  # as Keras stores them
        labels = labels[:, 0]
    if labels.dtype.kind == "S":
        try:
            labels = np.char.decode(labels)
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: labels are bytes that are no UTF-8; decode them.") from error
    if labels.shape != (count,):
        raise InputError(
            f"{name}: needs one label per example, shape ({count},), got labels of shape "
            f"{labels.shape}."
        )
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            row = int(np.flatnonzero(~np.isfinite(labels))[0])
            raise InputError(f"{name}: the label of row {row} (counted from 0) is {labels[row]}.")
        if (labels != np.rint(labels)).any():
            raise InputError(
                f"{name}: labels are measurements such as {labels[labels != np.rint(labels)][0]}; "
                "TrueNorm classifies, it does not fit curves. Name a column of classes, or cut "
                "the measurements into ranges first."
            )
        if (found := len(np.unique(labels))) > _MOST_FRACTIONLESS and count < 5 * found:
            raise InputError(
                f"{name}: labels are {found} different numbers such as {labels[0]} in {count} "
                "rows, measurements rather than classes; TrueNorm classifies, it does not fit "
                "curves. Cut them into ranges first, or store classes as integers or text."
            )
    elif labels.dtype.kind == "O":
        missing = [
            i for i, v in enumerate(labels) if v is None or (isinstance(v, float) and math.isnan(v))
        ]
        if missing:
            raise InputError(f"{name}: the label of row {missing[0]} (counted from 0) is missing.")
        if len({type(v) for v in labels}) > 1:
            raise InputError(f"{name}: labels mix types; make them all text or all numbers.")
    elif labels.dtype.kind not in "biuU":
        raise InputError(f"{name}: labels must be numbers or text, got {labels.dtype}.")
    return labels


def _weights(weight: Any, count: int, name: str) -> Tensor | None:
    if weight is None:
        return None
    weights = torch.as_tensor(np.asarray(weight), dtype=torch.float32)
    if weights.shape != (count,):
        raise InputError(f"{name}: weights must have shape ({count},), got {tuple(weights.shape)}.")
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError(f"{name}: weights must be finite, at least 0, and not all 0.")
    return weights


def split(
    data: Dataset,
    *,
    test: Dataset | float | None = 0.2,
    valid: float = 0.2,
    seed: int = 0,
) -> Splits:
    """Cut ``data`` into training, validation and test parts by a seeded permutation.

    ``test`` is a held-out data set of its own, the share of ``data`` to hold out, or None for
    no test part; ``valid`` is the share of what then remains. Data that come with a test set
    are cut by the plain permutation that published protocols use; otherwise every part keeps
    the shares of the classes.

    Raises:
        InputError: a share outside (0, 1), or too few examples to fill every part.
    """
    for name, share in (("valid", valid), ("test", test)):
        if isinstance(share, float | int) and not 0 < share < 1:
            raise InputError(f"{name} must lie in (0, 1), got {share!r}.")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(test, Dataset):
        first, last = _cut(torch.randperm(len(data), generator=generator), valid, data.name)
        return Splits(data.take(first), data.take(last), test)
    rest, test_part = data, None
    if test is not None:
        rest, test_part = _stratified_cut(data, test, generator)
    train_part, valid_part = _stratified_cut(rest, valid, generator)
    return Splits(train_part, valid_part, test_part)


def _cut(order: Tensor, share: float, name: str) -> tuple[Tensor, Tensor]:
    total = round(share * len(order))
    if not 0 < total < len(order):
        raise InputError(
            f"{name}: {len(order)} examples are too few to hold out a share of {share}; "
            "give more data."
        )
    return order[: len(order) - total], order[len(order) - total :]


def _stratified_cut(
    data: Dataset, share: float, generator: torch.Generator
) -> tuple[Dataset, Dataset]:
    """Cut so that each class is split in the same ratio, and the parts are in random order."""
    order = torch.randperm(len(data), generator=generator)
    # Deal the classes out one after another: then every run of 1/share examples gives one.
    dealt = order[torch.argsort(data.y[order], stable=True)]
    total = round(share * len(data))
    if not 0 < total < len(data):
        raise InputError(
            f"{data.name}: {len(data)} examples are too few to hold out a share of {share}; "
            "give more data."
        )
    place = torch.arange(len(data))
    taken = (place + 1) * total // len(data) > place * total // len(data)
    parts = []
    for mask in (~taken, taken):
        part = dealt[mask]
        parts.append(data.take(part[torch.randperm(len(part), generator=generator)]))
    return parts[0], parts[1]


@dataclass(frozen=True)
class Uncut:
    """Checked, labelled data that many seeds can cut; parts it brings itself stay as they are.

    ``scaling`` is None for the one that each cut's training part suggests.
    """

    train: Dataset
    test: Dataset | None = None
    valid: Dataset | None = None
    scaling: Scaling | None = None
    notes: tuple[str, ...] = ()

    def cut(self, seed: int, *, valid: float = 0.2, test: float = 0.2) -> Splits:
        """Training, validation and test parts by the permutation of ``seed``."""
        if self.valid is not None:
            parts = Splits(self.train, self.valid, self.test, self.scaling)  # type: ignore[arg-type]
        else:
            held_out = test if self.test is None else self.test
            parts = split(self.train, test=held_out, valid=valid, seed=seed)
        return replace(parts, notes=self.notes)

    def fingerprint(self) -> str:
        """One digest over all parts: equal data, equal fingerprint."""
        parts = (self.train, self.test, self.valid)
        digests: list[Any] = [None if p is None else p.fingerprint() for p in parts]
        scaling = None if self.scaling is None else self.scaling.to_json()
        if self.train.columns and any(c.kind == "category" for c in self.train.columns):
            digests.append(self.train.columns)  # the places in x mean nothing without
        return hashlib.sha256(repr((digests, scaling)).encode()).hexdigest()


def _some(values: tuple[Any, ...], most: int = 8) -> str:
    """A short list for a message."""
    shown = ", ".join(repr(v) for v in values[:most])
    return shown + (f", ... ({len(values)} in all)" if len(values) > most else "")
