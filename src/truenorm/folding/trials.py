"""What a folded model is compared on: the examples, inputs like them, other sizes, flags, methods.

An example shows one path through the forward. Which others there are shows in part by trying.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truenorm.calling.nested import mapped, tensors_in
from truenorm.folding.subject import Subject

# Flags that ask for training, of which a model for inference promises nothing.
_TRAINS = {"train", "training", "is_training", "deterministic"}
# Public methods whose names say that they change, write or train: they are not called.
_NOT_CALLED = (
    "fit", "train", "validation", "test", "step", "on_", "configure", "reset", "set_", "init",
    "freeze", "prune", "get_", "save", "load", "export", "write", "push", "log", "plot", "generate",
)  # fmt: skip


class Trial(NamedTuple):
    """One call of the model.

    Attributes:
        label: what it is, as a person reads it.
        args: positional arguments.
        kwargs: by name.
        method: that is called.
        example: whether it is an example or an input like one: compared in float64, too, and
            never left out.
        sized: whether its input has another size than the example's, rows aside.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: str = "forward"
    example: bool = False
    sized: bool = False


def example_trials(subjects: Sequence[Subject]) -> Iterator[Trial]:
    """The examples, and for each two inputs with other numbers."""
    for i, subject in enumerate(subjects):
        name = "the example" if i == 0 else f"examples[{i - 1}]"
        yield Trial(name, subject.args, subject.kwargs, example=True)
        generator = torch.Generator().manual_seed(0)
        for sign, kind in ((1, "like"), (-1, "opposite to")):
            change = _other(generator, sign)
            args, kwargs = mapped(subject.args, change), mapped(subject.kwargs, change)
            yield Trial(f"random numbers {kind} {name}", args, kwargs, example=True)


def size_trials(subject: Subject) -> Iterator[list[Trial]]:
    """The example in other sizes; of each list the first that the model takes is to be tried.

    Odd and even, smaller and larger, not square, and of 1, 2 and 3 rows, cut from the example or
    repeated. The last of each list is of the example's own size.
    """
    first = next(tensors_in((subject.args, subject.kwargs)), None)
    if first is None or first.ndim < 2:
        return
    choices = _sized_axes(first)
    if not choices:
        yield from ([_resized(subject, first, (), rows, _one_more)] for rows in _ROWS)
        return
    for rows, changes in _CHANGES:
        sized = [_resized(subject, first, axes, rows, how) for how in changes for axes in choices]
        yield [*sized, _resized(subject, first, (), rows, _one_more)]


def _one_more(size: int, place: int) -> int:
    return size + 1


def _one_less(size: int, place: int) -> int:
    return max(size - 1, 1)


def _double(size: int, place: int) -> int:
    return 2 * size


def _half(size: int, place: int) -> int:
    return max(size // 2, 1)


def _above(change: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """Not square, and of the other parity along one axis."""
    return lambda size, place: change(size, place) + place


_ROWS = (3, 1)  # of an example that has no other size
# Rows, and what becomes of each size: one more of a multiple of 32 is odd at every stride.
_CHANGES: list[tuple[int, list[Callable[[int, int], int]]]] = [
    (3, [_one_more]),
    (1, [_one_less]),
    (1, [_above(_double), _double]),
    (2, [_above(_half), _half]),
]


def _sized_axes(first: Tensor) -> list[tuple[int, ...]]:
    """Axes of the first tensor that may be of any size: those of space, else that of time."""
    if first.ndim == 2:
        return [] if first.is_floating_point() else [(1,)]
    space = tuple(range(2, first.ndim))
    return [space, (1,)] if first.ndim == 3 else [space]


def _resized(
    subject: Subject,
    first: Tensor,
    axes: tuple[int, ...],
    rows: int,
    change: Callable[[int, int], int],
) -> Trial:
    """The example with ``rows``, and other sizes of ``axes`` in all tensors that share them."""
    sizes = [first.shape[axis] for axis in axes]
    new = [change(size, place) for place, size in enumerate(sizes)]

    def resize(t: Tensor) -> Tensor:
        if not t.ndim:
            return t
        if len(t) == len(first):
            t = _repeated(t, 0, rows)
        trailing = list(t.shape[t.ndim - len(axes) :])
        places = axes if t.ndim == first.ndim else range(t.ndim - len(axes), t.ndim)
        if axes and (t.ndim == first.ndim or trailing == sizes):
            for axis, size, old in zip(places, new, sizes, strict=True):
                t = _repeated(t, axis, size) if t.shape[axis] == old else t
        return t

    args, kwargs = mapped(subject.args, resize), mapped(subject.kwargs, resize)
    shape = next(tensors_in((args, kwargs))).shape
    label = f"an input of {' x '.join(map(str, shape))}"
    return Trial(label, args, kwargs, sized=bool(axes))


def _repeated(t: Tensor, axis: int, size: int) -> Tensor:
    """``t`` cut to ``size`` along an axis, or repeated up to it."""
    return t.index_select(axis, torch.arange(size, device=t.device) % t.shape[axis])


def flag_trials(subject: Subject) -> Iterator[Trial]:
    """The example with each true-or-false argument turned over, one at a time."""
    bound = _bound(subject)
    if bound is None:
        return
    bound.apply_defaults()
    for name, value in list(bound.arguments.items()):
        if isinstance(value, bool) and name not in _TRAINS:
            turned = _bound(subject)
            assert turned is not None
            turned.arguments[name] = not value
            yield Trial(f"{name}={not value}", turned.args, dict(turned.kwargs))


def silent_arguments(subject: Subject) -> list[str]:
    """Arguments of the forward that the example leaves at None."""
    bound = _bound(subject)
    if bound is None:
        return []
    bound.apply_defaults()
    return [name for name, value in bound.arguments.items() if value is None]


def readers(subject: Subject) -> list[str]:
    """Dotted names of the modules whose forward makes Python numbers of tensors."""
    return list(dict.fromkeys(n.module for n in subject.flow.nodes if n.dtype is None))


def _bound(subject: Subject) -> inspect.BoundArguments | None:
    try:
        signature = inspect.signature(subject.model.forward)
        return signature.bind(*subject.args, **subject.kwargs)
    except (TypeError, ValueError):  # the model is called by other means
        return None


def method_trials(subject: Subject) -> Iterator[Trial]:
    """Public methods of the model's class that use its parts and take the example."""
    for name in _methods(subject.model):
        try:
            bound = inspect.signature(getattr(subject.model, name))
            bound.bind(*subject.args, **subject.kwargs)
        except (TypeError, ValueError):
            continue
        yield Trial(name, subject.args, subject.kwargs, method=name)


def _methods(model: nn.Module) -> list[str]:
    """Public methods, torch's own aside, that name a child of the model or such a method."""
    own: dict[str, types.FunctionType] = {}
    for kind in type(model).__mro__:
        if kind.__module__.partition(".")[0] == "torch":
            continue
        for name, found in vars(kind).items():
            if isinstance(found, types.FunctionType) and not hasattr(nn.Module, name):
                own.setdefault(name, found)
    names = {name: _names_in(function.__code__) for name, function in own.items()}
    parts = set(model._modules)
    while more := {n for n, used in names.items() if n not in parts and used & parts}:
        parts |= more
    return [n for n in names if n in parts and not n.startswith(("_", *_NOT_CALLED))]


def _names_in(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _other(generator: torch.Generator, sign: int) -> Callable[[Tensor], Tensor]:
    """Makes of a tensor one with other real numbers of its mean, or of minus it, and its spread."""

    def other(t: Tensor) -> Tensor:
        if t.dtype == torch.uint8:
            made = torch.randint(0, 256, t.shape, generator=generator, dtype=torch.uint8)
            return made.to(t.device)
        if not t.is_floating_point() or t.numel() < 2:
            return t
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        values = t.double()
        return (noise * values.std() + sign * values.mean()).to(t.dtype)

    return other
