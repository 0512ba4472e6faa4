"""The proof of each pair, while the original runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from truenorm.folding.affine import Affine, Weighted, rounded
from truenorm.folding.building import fill
from truenorm.folding.modules import ScaleShift, dtype_of, share_of_shift
from truenorm.folding.plan import ChangeSet, Destination
from truenorm.folding.subject import Subject, seeded
from truenorm.folding.wiring import parameter_of

# Largest error of an output over the largest output. Beyond it a fold passes if it errs no more
# than four times as much as the model that was not folded: both round, at different places.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
SLACK = 4
_PROVED_ON = 2  # examples of the inputs that a pair is proved on: float64 convolutions are slow


class _Prover(TorchFunctionMode):
    """While the original runs, compares each operation and its norms with what replaces them."""

    def __init__(self, subject: Subject, parts: list[ChangeSet]) -> None:
        super().__init__()
        self.subject = subject
        self._wanted = {
            id(parameter_of(subject.model, destination.weights.weight)): (destination, part)
            for part in parts
            for destination in part.destinations
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        destination, part = self._wanted.get(id(weight), (None, None))
        if destination is not None and part is not None:
            x = kwargs.get("input", args[0] if args else None)
            rest = args[3:]
            named = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
            run = _Operation(func, rest, named)
            unbatched = destination.outputs == 0  # one example without a batch axis
            x = x if unbatched else x[:_PROVED_ON]
            for error, unfolded in _errors(destination, run, x, weight.dtype, self.subject.model):
                part.error, part.unfolded = max(part.error, error), max(part.unfolded, unfolded)
        return func(*args, **kwargs)


class _Operation(NamedTuple):
    """A weighted operation with all but its tensors."""

    func: Callable[..., Tensor]
    rest: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, x: Tensor, weights: Weighted) -> Tensor:
        return self.func(x, weights.weight, weights.bias, *self.rest, **self.named)


def _errors(
    destination: Destination, run: _Operation, x: Tensor, dtype: torch.dtype, model: nn.Module
) -> Iterator[tuple[float, float]]:
    """Error of the folded and of the unfolded operations, on two inputs."""
    before, base, axis = destination.before, destination.base, destination.outputs
    taken = x.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(taken.shape, generator=generator, dtype=torch.float64).to(taken.device)
    if before is not None:  # what the norm got, where that can be told from what it gave
        view = [1] * x.ndim
        view[destination.inputs] = -1
        scale, shift = before.scale.view(view), before.shift.view(view)
        undone = (taken - shift) / torch.where(scale == 0, 1.0, scale)
        taken = torch.where(scale == 0, noise, undone)
    spread = float(taken.std()) if taken.numel() > 1 else 1.0
    conv = model.get_submodule(destination.weights.owner) if destination.padded else None

    def whole(u: Tensor, kind: torch.dtype) -> Tensor:
        """The operations as they were."""
        u = u.to(kind)
        u = u if before is None else before.along(u, destination.inputs)
        y = run(u, _in(base, kind))
        for affine in destination.after:
            y = affine.along(y, axis)
        return y.double()

    def folded(u: Tensor, kind: torch.dtype) -> Tensor:
        new = _in(destination.folded(), kind)
        y = run(u.to(kind), new)
        if new.border is not None:
            ones = torch.ones(1, 1, *u.shape[2:], dtype=kind, device=u.device)
            y = y + share_of_shift(conv, ones, new.border)
        return y.double()

    for u in (taken, noise * spread + taken.mean()):
        exact = whole(u, torch.float64)
        yield (
            max(distance(exact, folded(u, dtype)), distance(exact, folded(u, torch.float64))),
            distance(exact, whole(u, dtype)),
        )


def _in(weights: Weighted, dtype: torch.dtype) -> Weighted:
    bias = None if weights.bias is None else rounded(weights.bias, dtype)
    border = None if weights.border is None else rounded(weights.border, dtype)
    return weights._replace(weight=rounded(weights.weight, dtype), bias=bias, border=border)


def distance(exact: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value; infinite where only one is finite."""
    if exact.shape != other.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    sound = exact.isfinite()
    if not torch.equal(sound, other.isfinite()):
        return float("inf")
    a, b = exact[sound].double(), other[sound].double()
    if not a.numel():
        return 0.0
    size = float(a.abs().max())
    return float((a - b).abs().max()) / (size or 1.0)


def prove(subject: Subject, parts: list[ChangeSet]) -> None:
    """Fill each part's errors, and its fault where they are too large."""
    with _Prover(subject, parts):
        seeded(subject.model, subject.scaled(subject.args), subject.kwargs)
    for part in parts:
        for name, affine in part.alone.items():
            if subject.flow.calls_of(name):  # else only another example calls it
                _prove_alone(subject, part, name, affine)
        kinds = [parameter_of(subject.model, t.weights.weight).dtype for t in part.destinations]
        bound = max((bound_of(kind) for kind in kinds), default=bound_of(dtype_of(subject.model)))
        if not part.error <= max(bound, SLACK * part.unfolded):
            part.fault = f"the pair's proof failed: error {part.error:.1e}, allowed {bound:.0e}"


def _prove_alone(subject: Subject, part: ChangeSet, name: str, affine: Affine) -> None:
    module = subject.model.get_submodule(name)
    norm: Any = module
    call = subject.flow.calls_of(name)[0]
    shape = subject.flow.nodes[call.input or 0].shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    device = affine.scale.device
    own = Affine(norm.running_var.detach().double().sqrt(), norm.running_mean.detach().double())
    u = own.along(noise.to(device))  # as the norm's own statistics tell
    dtype = dtype_of(module, subject.model)
    there = ScaleShift(norm.running_mean)
    fill(there, affine)
    exact = affine.along(u)
    part.error = max(part.error, distance(exact, there.to(dtype)(u.to(dtype))))
    part.unfolded = max(part.unfolded, distance(exact, affine.along(u.to(dtype))))


def bound_of(dtype: torch.dtype) -> float:
    """The largest error that passes without a look at the original's own."""
    return BOUNDS.get(dtype, BOUNDS[torch.float32])
