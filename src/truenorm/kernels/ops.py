"""The compiled kernels: whether they are live, and torch's batch norm on them.

The library holds kernels for several instruction sets and takes the best that this processor
runs. It replaces, for tensors on a CPU and in eager mode, what stands behind two pairs of torch's
operators, whose nodes of autograd stay torch's own:

- ``_batch_norm_with_update`` and ``batch_norm_backward``, which nothing in torch calls in eager
  mode and TrueNorm's layers do;
- ``native_batch_norm`` and ``native_batch_norm_backward``, behind ``torch.nn``'s layers and
  ``torch.nn.functional.batch_norm``, between :func:`accelerate` and its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from truenorm.errors import InputError
from truenorm.kernels.build import LIBRARY

VARIABLE = "TRUENORM_KERNELS"
"""The variable of the environment: "auto", "torch", or the name of an instruction set."""


class Kernels(NamedTuple):
    """What computes batch norm in this process.

    Attributes:
        live: whether the compiled kernels do.
        instructions: the instruction set they are compiled for, "" without.
        reason: why they do not, "" where they do.
    """

    live: bool
    instructions: str
    reason: str


_with_update = torch.ops.aten._batch_norm_with_update.default._op  # past what eager mode skips


def batch_norm(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor, Tensor],
    momentum: float,
    eps: float,
) -> tuple[Tensor, bool]:
    """Batch norm in training, with torch's own node of autograd; needs live kernels.

    Args:
        x: (N, C, *S) on a CPU, of any layout and floating dtype, with a value a channel at least.
        affine: weight and bias, (C,), or None for 1 and 0.
        running: mean and variance, (C,); moved, but by a batch that is not finite.
        momentum: weight of the new value.
        eps: added to the variance.

    Returns:
        The output, of shape and dtype of ``x``, and whether the batch was finite.
    """
    # Past autograd's count of versions: the node holds them, and a second forward moves them.
    mean, var = running[0].data, running[1].data
    weight, bias = affine
    if weight is None:  # which the operator's gradient cannot be
        weight = torch.ones_like(mean if bias is None else bias, requires_grad=False)
    out, _, _, told = _with_update(x, weight, bias, mean, var, momentum, eps)
    return out, told.numel() == 0


def moments(
    x: Tensor, mask: Tensor | None = None, groups: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (G, C) of float64, outside of the graph; needs live kernels.

    Args:
        x: (N, C, *S) on a CPU, of any layout and floating dtype.
        mask: bool (N, *S), True for the values that count; of none both are 0.
        groups: examples of each of the G groups, in order; none for one of all.
    """
    mean, var = torch.ops.truenorm.moments(x.detach(), mask, groups)
    return mean, var


def track(
    running: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor, Tensor], momentum: float
) -> bool:
    """Move ``running`` by the groups of a batch, unless it was not finite; needs live kernels.

    Args:
        running: mean and variance, (C,) on a CPU.
        moments: mean and biased variance, (G, C), and values, (G, 1), float64 and contiguous. The
            groups come one after another; at a momentum of 1 they are weighed by their sizes.
        momentum: weight of the new value.

    Returns:
        Whether the batch was finite.
    """
    told: Tensor = torch.ops.truenorm.track(running[0].data, running[1].data, *moments, momentum)
    return told.numel() == 0


def with_moments(
    x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> tuple[Tensor, Tensor]:
    """As :func:`batch_norm`: the output, and the batch's mean and biased variance, (2, 1, C).

    These are float64, and NaN if the batch was not finite.
    """
    count = x.numel() // x.shape[1]
    table = torch.full((2, 1, x.shape[1]), torch.nan, dtype=torch.float64, device="cpu")
    mean, var = table.view(2, -1).unbind()
    out, _ = batch_norm(x, affine, (mean, var), 1.0, eps)
    var.mul_((count - 1) / count)
    return out, table


@cache
def kernels() -> Kernels:
    """Load the kernels, once in a process.

    Raises:
        InputError: the variable ``TRUENORM_KERNELS`` names none that there are.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "torch":
        return Kernels(False, "", f"{VARIABLE}=torch")
    if not LIBRARY.exists():
        return Kernels(
            False, "", "they were not compiled; python -m truenorm.kernels.build compiles them"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return Kernels(False, "", f"they do not load beside torch {torch.__version__}: {error}")
    library.truenorm_use.restype = ctypes.c_char_p
    name = library.truenorm_use(b"" if wanted == "auto" else wanted.encode())
    if name is None:
        raise InputError(
            f"{VARIABLE} must be auto, torch, or an instruction set that this processor runs "
            f"(x86-64-v4, x86-64-v3, baseline), got {wanted!r}; unset it to take the best."
        )
    _take_over(library, torch_too=False)
    _describe()
    return Kernels(True, name.decode(), "")


def notice() -> None:
    """Print one line if the kernels are not live; a build ends with it."""
    found = kernels()
    if not found.live:
        print(f"Batch norm runs on torch's own kernels: {found.reason}.")


_torch_alone = 0  # how many want torch's own


def live() -> bool:
    """Whether the compiled kernels compute the batch norm of TrueNorm's layers now."""
    return not _torch_alone and kernels().live


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Let the body run on the kernels, torch's layers too ("auto"), or on torch's own ("torch")."""
    global _torch_alone  # noqa: PLW0603
    if choice == "auto":
        with accelerate():
            yield
        return
    _torch_alone += 1
    try:
        yield
    finally:
        _torch_alone -= 1


def _take_over(library: ctypes.CDLL, *, torch_too: bool) -> None:
    """Put the kernels in the place of torch's, which is wanted and no reason for a warning.

    torch warns of it from C++, past Python, but for what runs within certain functions of its
    own, of which ``apply_`` is one that calls back.
    """

    def call(value: float) -> float:
        return float(library.truenorm_take_over(torch_too))

    with (
        warnings.catch_warnings(),
        torch._C._DisableFuncTorch(),  # the first use may be within one of its transforms
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        failed = torch.zeros(1, dtype=torch.float64, device="cpu").apply_(call).item()
    if failed:
        raise RuntimeError("torch refused the kernels")


def _shapes(  # noqa: PLR0917  as the operator
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    act: int,
    mask: Tensor | None = None,
    groups: Sequence[int] = (),
    rmax: float = 1.0,
    dmax: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    told = torch.library.get_ctx().new_dynamic_size()
    rows = 4 if training and (rmax > 1 or dmax > 0) else 2
    moments = x.new_empty((rows, len(groups) or 1, x.shape[1]), dtype=torch.float64)
    return torch.empty_like(x), moments, x.new_empty((told,), dtype=torch.uint8)


def _shapes_of_gradients(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, wanted = rest[2], rest[3], rest[8]
    of = x if bias is None else bias
    column = x.new_empty(x.shape[1], dtype=(of if weight is None else weight).dtype)
    nothing = x.new_empty(0, dtype=torch.float32)
    return tuple(
        torch.empty_like(like if want else nothing)
        for like, want in zip((x, column, column, x), wanted, strict=True)
    )


def _shapes_of_moments(x: Tensor, mask: Tensor | None = None, groups: Sequence[int] = ()) -> Tensor:
    return x.new_empty((2, len(groups) or 1, x.shape[1]), dtype=torch.float64)


def _nothing(running_mean: Tensor, *_: Any) -> Tensor:
    told = torch.library.get_ctx().new_dynamic_size()
    return running_mean.new_empty((told,), dtype=torch.uint8)


@cache
def _describe() -> None:
    """Tell torch the shapes that the operators of their own return, for tensors without data."""
    operators: dict[str, Callable[..., Any]] = {
        "track": _nothing,
        "batch_norm_act": _shapes,
        "batch_norm_act_backward": _shapes_of_gradients,
        "moments": _shapes_of_moments,
    }
    for name, shapes in operators.items():
        torch.library.register_fake(f"truenorm::{name}", shapes)


class _Users:
    """How many want torch's layers accelerated; the first begins it and the last ends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def enter(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                _take_over(ctypes.CDLL(str(LIBRARY)), torch_too=True)

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                ctypes.CDLL(str(LIBRARY)).truenorm_give_back()


_USERS = _Users()


def keep_freed_memory() -> None:
    """Let the process keep the memory that tensors free, for the next ones; for its whole life.

    glibc gives back to the system what is large as soon as it is free, and the system clears each
    page anew when it is next asked for: a third of a training step on some machines. What was
    reached stays taken, so that the process shrinks no more. Without glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_MAX, 0)  # nothing has a mapping of its own, which goes when it is freed
        set_option(_TRIM_THRESHOLD, (1 << 31) - 1)


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


class accelerate:  # called like a function, used like one
    """Run ``torch.nn``'s batch norms, in the whole process, on TrueNorm's kernels.

    One line at the top of a script is enough; in a ``with`` statement it ends with the body, and
    :meth:`undo` gives torch's kernels back at any time. Results are torch's to rounding, and do
    not depend on the number of threads. It concerns tensors on a CPU, in eager mode: what is
    compiled or exported stays as it is, as do other devices. Where the kernels are not there
    nothing changes; ``live`` and ``reason`` say so.

    Args:
        keep_memory: also keep what tensors free, see :func:`keep_freed_memory`; not undone.

    Attributes:
        live: whether the kernels run.
        reason: why they do not, "" where they do.
    """

    def __init__(self, *, keep_memory: bool = False) -> None:
        found = kernels()
        if keep_memory:
            keep_freed_memory()
        self.live, self.reason = found.live, found.reason
        self._users: _Users | None = _USERS if found.live else None
        if self._users is not None:
            self._users.enter()

    def undo(self) -> None:
        """Give torch's kernels back, unless another call of ``accelerate`` still holds them."""
        users, self._users, self.live = self._users, None, False
        if users is not None:
            users.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
