"""Tensors inside nested tuples, lists and mappings: found, moved, changed, cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, however deep in tuples, lists and dicts, on ``device``."""
    return mapped(value, lambda tensor: tensor.to(device))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` made to every tensor in it, in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in ``value``, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors_in(getattr(value, entry.name))


def examples_of(batch: Any) -> int:
    """The number of examples in ``batch``: the first axis of its first tensor that has one."""
    return next((t.shape[0] for t in tensors_in(batch) if t.ndim), 1)


def part_of(value: Any, which: slice, examples: int) -> Any:
    """Some of the examples of a batch, wherever an axis counts them.

    Args:
        value: a batch, or a part of one.
        which: of them.
        examples: how many there are.
    """
    if isinstance(value, Tensor):
        return value[which] if value.ndim and len(value) == examples else value
    if isinstance(value, Mapping):
        return {key: part_of(part, which, examples) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [part_of(part, which, examples) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
