"""What Python hands over: pairs of arrays, torch's data sets and loaders, data frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from truenorm.data.readers.examples import Examples
from truenorm.data.readers.tables import Asked, examples_of
from truenorm.data.reading import Reading
from truenorm.errors import InputError, one_line

_WHAT = (
    "give a name or path, a pair (x, y) of arrays or tensors, a torch data set or loader of "
    "such pairs, or a data frame with target=."
)


def handed(source: Any, target: str | None, reading: Reading) -> Examples:
    """Gather in memory what Python hands over.

    Raises:
        InputError: it is nothing that examples and labels can be had from.
    """
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas, polars
        named = None if target is None else str(target)  # Arrow names all columns in text
        return examples_of(_arrow(source), "data frame", Asked(named), reading)
    if target is not None:
        raise InputError(f"target={target!r} names a column of a table, got {_kind(source)}.")
    if isinstance(source, dict) and {"data", "target"} <= source.keys():  # scikit-learn's Bunch
        return _pair(source["data"], source["target"], source.get("target_names"))
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        return _pair(*source.tensors)
    if isinstance(source, DataLoader):
        return _gathered(((x, y) for x, y in _pairs(source)), batched=True)
    if isinstance(source, TorchDataset):
        if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
            raise InputError(f"{_kind(source)} has no length; wrap it in a DataLoader that ends.")
        return _gathered(_pairs(source[i] for i in range(len(source))), batched=False)
    if isinstance(source, tuple | list) and len(source) == 2:
        x, y = source
        if not isinstance(x, str) and hasattr(x, "__len__"):
            return _pair(x, y)
    raise InputError(f"cannot load {_kind(source)}: {_WHAT}")


def _kind(source: Any) -> str:
    count = f" of {len(source)}" if isinstance(source, tuple | list) else ""
    return type(source).__name__ + count


def _pair(x: Any, y: Any, names: Any = None) -> Examples:
    if names is not None:
        y = np.asarray(names)[np.asarray(y)]
    try:
        x = x if isinstance(x, Tensor) else np.asanyarray(x)
        y = y if isinstance(y, Tensor) else np.asanyarray(y)
    except ValueError as error:
        raise InputError(
            f"x and y must be arrays, whose rows are of one length: {one_line(error)}"
        ) from error
    for array in (x, y):
        if isinstance(array, np.ma.MaskedArray) and array.mask.any():
            raise InputError("x and y must hold values throughout, got a masked array; fill it.")
    return Examples(x, y, "data")


def _pairs(items: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    for number, item in enumerate(items):
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InputError(
                f"item {number} of the data is {_kind(item)}, not a pair (x, y); {_WHAT}"
            )
        yield item[0], item[1]


def _gathered(pairs: Iterable[tuple[Any, Any]], *, batched: bool) -> Examples:
    """All pairs in one array each; ``batched`` ones are joined, single ones stacked."""
    found = [(_tensor(x), y) for x, y in pairs]
    if not found:
        raise InputError(f"the data hold no example; {_WHAT}")
    xs, ys = zip(*found, strict=True)
    join = torch.cat if batched else torch.stack
    try:
        x, y = join(xs), _labels(ys, join, batched=batched)
    except RuntimeError as error:
        shapes = list(dict.fromkeys(tuple(x.shape) for x in xs))[:3]
        raise InputError(
            f"the data's examples differ in shape, such as {', '.join(map(str, shapes))}; bring "
            "them to one shape first."
        ) from error
    return Examples(x, y, "data")  # type: ignore[arg-type]  # tensors are checked as arrays are


def _labels(ys: Any, join: Callable[[list[Tensor]], Tensor], *, batched: bool) -> Any:
    """All labels in one tensor, or, where they are texts, in one array."""
    texts = [text for y in ys for text in y] if batched else list(ys)
    if texts and all(isinstance(text, str) for text in texts):
        return np.array(texts)
    return join([_tensor(y) for y in ys])


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)  # of numbers, arrays and Pillow's images
        return torch.from_numpy(np.array(array))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the data hold {type(value).__name__} where numbers are needed; convert them to "
            "tensors first."
        ) from error


def _arrow(frame: Any) -> Any:
    import pyarrow as arrow

    try:
        if hasattr(frame, "to_arrow"):
            return frame.to_arrow()
        return arrow.Table.from_pandas(frame, preserve_index=False)
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, TypeError, ValueError) as error:
        raise InputError(
            f"the data frame cannot be read: {one_line(error)}; give each column a name and a "
            "type of its own."
        ) from error
