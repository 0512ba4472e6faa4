"""The proofs: of each pair, while the original runs, and of the model from end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from truenorm.calling.nested import mapped, tensors_in
from truenorm.folding.affine import Affine, Weighted, rounded
from truenorm.folding.building import built, fill
from truenorm.folding.modules import ScaleShift, dtype_of, share_of_shift
from truenorm.folding.plan import ChangeSet, Destination
from truenorm.folding.subject import Subject, in_double, seeded
from truenorm.folding.wiring import parameter_of

# Largest error of an output over the largest output. Beyond it a fold passes if it errs no more
# than four times as much as the model that was not folded: both round, at different places.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
_SLACK = 4
_EXACT = 1e-9  # in float64, from end to end: some thousand roundings of 1e-16, times gains
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
            _prove_alone(subject, part, name, affine)
        kinds = [parameter_of(subject.model, t.weights.weight).dtype for t in part.destinations]
        bound = max((bound_of(kind) for kind in kinds), default=bound_of(dtype_of(subject.model)))
        if not part.error <= max(bound, _SLACK * part.unfolded):
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


class Whole:
    """The original's outputs, and how far a folded model's are from them."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.inputs = list(_inputs_like(subject))
        original = built(subject, [])
        self.outputs = [self._run(original, *given) for given in self.inputs]
        self.sound = [i for i, out in enumerate(self.outputs) if out is not None]
        self.exact: list[list[Tensor] | None] | None = None
        if dtype_of(subject.model) is not torch.float64:
            exact = self._exactly([])
            self.exact = exact if exact[0] is not None else None

    def _exactly(self, parts: list[ChangeSet]) -> list[list[Tensor] | None]:
        """The outputs in float64."""
        model = built(self.subject, parts, torch.float64)
        with in_double():
            return [self._run(model, *_double(given)) for given in self.inputs]

    def _run(self, model: nn.Module, args: Any, kwargs: Any) -> list[Tensor] | None:
        try:
            out = seeded(copy.deepcopy(model), args, kwargs)
        except Exception:  # what does not run on other inputs, or in float64, proves nothing
            return None
        return [t for t in tensors_in(out) if t.is_floating_point()]

    def errors(self, parts: list[ChangeSet]) -> tuple[float, float | None, float, float]:
        """From the original; in float64; against float64, and the original's own against it."""
        folded = built(self.subject, parts)
        outs = [self._run(folded, *given) for given in self.inputs]
        error = max(self._apart(self.outputs[i], outs[i]) for i in self.sound)
        if self.exact is None:
            return error, None, error, 0.0
        exact, wide = self.exact, self._exactly(parts)
        known = [i for i in self.sound if exact[i] is not None]
        precise = max(self._apart(exact[i], wide[i]) for i in known)
        against = max(self._apart(exact[i], outs[i]) for i in known)
        own = max(self._apart(exact[i], self.outputs[i]) for i in known)
        return error, precise, against, own

    @staticmethod
    def _apart(a: list[Tensor] | None, b: list[Tensor] | None) -> float:
        if a is None or b is None or len(a) != len(b):
            return float("inf")
        return max(
            (distance(x.double(), y.double()) for x, y in zip(a, b, strict=True)), default=0.0
        )

    def passes(self, parts: list[ChangeSet]) -> bool:
        """Whether the folded model is the original, but for rounding."""
        error, precise, against, own = self.errors(parts)
        if precise is not None and not precise <= _EXACT:
            return False
        bound = bound_of(dtype_of(self.subject.model))
        return error <= bound or against <= max(bound, _SLACK * own)


def _double(
    given: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = given

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return mapped(args, wide), mapped(kwargs, wide)


def _inputs_like(subject: Subject) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example, and two with other real numbers of its mean and spread."""
    yield subject.args, subject.kwargs
    generator = torch.Generator().manual_seed(0)

    def other(t: Tensor) -> Tensor:
        if t.dtype == torch.uint8:
            made = torch.randint(0, 256, t.shape, generator=generator, dtype=torch.uint8)
            return made.to(t.device)
        if not t.is_floating_point() or t.numel() < 2:
            return t
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        values = t.double()
        return (noise * values.std() + values.mean()).to(t.dtype)

    for _ in range(2):
        yield mapped(subject.args, other), mapped(subject.kwargs, other)


def sifted(whole: Whole, parts: list[ChangeSet]) -> list[ChangeSet]:
    """The parts that, together, leave the model what it is; halves are tried where all fail."""
    kept: list[ChangeSet] = []

    def add(group: list[ChangeSet]) -> None:
        if not group or whole.passes([*kept, *group]):
            kept.extend(group)
        elif len(group) == 1:
            group[0].fault = "with it, the model's outputs are others"
        else:
            add(group[: len(group) // 2])
            add(group[len(group) // 2 :])

    add(parts)
    return kept
