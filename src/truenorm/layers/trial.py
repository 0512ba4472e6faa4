"""Whether a module computes the same when it is changed: outputs, gradients, statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.calling.borrowing import Randoms, borrowed
from truenorm.calling.nested import mapped, tensors_in

# How far both ways may be apart, of the norm of all. In single precision a ReLU or a pooling may
# decide the other way on rounding, of which a gradient is all or nothing: so in double where the
# module can.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF = 0.05

_KINDS = ("outputs", "gradients", "running statistics", "what it writes into its arguments")
_Results = tuple[list[Tensor | None], ...]  # of each kind


def difference(module: nn.Module, change: Callable[[], None], args: Any, kwargs: Any) -> str:
    """How what ``module`` computes differs after ``change``, in words; "" if it does not.

    In evaluation and in training, on ``args`` and ``kwargs``; everything is given back, what
    ``change`` did, too.
    """
    for training in (False, True):
        mode = "training" if training else "evaluation"
        trial = partial(_results, module, args, kwargs, training=training)
        try:
            before, double = _first(partial(trial, change=None))
        except Exception as error:  # others wrote it
            told = str(error).partition("\n")[0]
            return f"nothing can be proved on this example, for in {mode} it raises: {told}"
        try:
            after = trial(change=change, double=double)
        except Exception as error:
            return f"with it the forward raises in {mode}: {str(error).partition(chr(10))[0]}"
        for kind, ones, others in zip(_KINDS, before, after, strict=True):
            if not _near(ones, others):
                return f"{kind} would differ in {mode}"
    return ""


def _first(trial: Callable[..., _Results]) -> tuple[_Results, bool]:
    """The results in double precision, if the module can, else in its own; and which."""
    try:
        return trial(double=True), True
    except Exception:  # others wrote it: a tensor of theirs may be single
        return trial(double=False), False


def _results(
    module: nn.Module,
    args: Any,
    kwargs: Any,
    *,
    training: bool,
    change: Callable[[], None] | None,
    double: bool,
) -> _Results:
    """What a forward of ``module`` comes to, by kind; all is given back."""
    leaves: list[Tensor] = []
    lent: list[Tensor] = []

    def lend(x: Tensor) -> Tensor:
        x = x.detach().double() if double and x.is_floating_point() else x.detach()
        if x.is_floating_point():
            leaves.append(x.clone().requires_grad_())
            x = leaves[-1]
        x = x.clone()  # which may be overwritten
        lent.append(x)
        return x

    with borrowed(module, Randoms(), parameters=double), torch.enable_grad():
        module.train(training)
        if double:
            module.double()
        if change is not None:
            change()
        args, kwargs = mapped(args, lend), mapped(kwargs, lend)
        outs = list(tensors_in(module.forward(*args, **kwargs)))
        learn = [p for p in module.parameters() if p.requires_grad]
        ends = [out for out in outs if out.requires_grad]
        grads: tuple[Tensor | None, ...] = ()
        if ends:
            of = [*leaves, *learn]
            grads = torch.autograd.grad(ends, of, [*map(_along, ends)], allow_unused=True)
        buffers: list[Tensor | None] = [b.clone() for b in module.buffers()]
    return [out.detach() for out in outs], list(grads), buffers, [x.detach() for x in lent]


def _along(out: Tensor) -> Tensor:
    """A gradient of an output, in which no element is like the others."""
    return torch.arange(out.numel(), device=out.device).cos().view(out.shape).to(out.dtype)


def _near(ones: list[Tensor | None], others: list[Tensor | None]) -> bool:
    """Whether both hold the same, but for rounding: beside the largest a gradient may be none."""
    if [_kind(x) for x in ones] != [_kind(x) for x in others]:
        return False
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None and b is not None]
    sizes = (one.double().norm().item() for one, _ in pairs if one.isfinite().all())
    largest = max(sizes, default=0.0)
    return all(_same(one, other, largest) for one, other in pairs)


def _kind(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.dtype)


def _same(one: Tensor, other: Tensor, largest: float) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    a, b, tolerance = one.double(), other.double(), _TOLERANCES.get(one.dtype, _HALF)
    if not bool(a.isfinite().all()):
        return torch.allclose(a, b, rtol=tolerance, equal_nan=True)
    return bool((a - b).norm() <= tolerance * (a.norm() + 1e-3 * largest))
