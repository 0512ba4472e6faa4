"""Fold batch norm into the weights beside it, for inference; each pair proved, the rest told.

1. Observe one forward (``flow``), in which tensors show how they really flow.
2. Find for each norm what it can vanish into (``wiring``), or why it must stay.
3. Compute the new weights in float64 (``affine``), and prove each pair on the inputs that its
   operation got and on random ones.
4. Write them into a copy, and compare it with the original from end to end, in the model's dtype
   and in float64. What fails is undone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from truenorm.affine import Affine, Weighted, of_statistics, rounded
from truenorm.calling import mapped, tensors_in
from truenorm.data import Scaling
from truenorm.errors import InputError
from truenorm.flow import Call, Flow, Node, flow_of
from truenorm.layers import BatchNorm
from truenorm.remnants import Cast, Function, RawInput, Remainder, ScaleShift, Shifted
from truenorm.wiring import Neighbour, Partner, Refused, Weights, Wiring, hooks_of

Form = Literal["into producer", "into consumer", "into norm", "scale and shift"]

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
INPUT = "(input scaling)"
_SCALING = {"sub", "rsub", "div", "truediv", "true_divide", "mul", "add", "to", "float", "type"}
_SCALING |= {"view", "reshape", "getitem", "unsqueeze", "type_as", "expand", "detach", "as_tensor"}
_ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid"),
    *("tanh", "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "clamp"),
}


class Pair(NamedTuple):
    """A norm that has vanished.

    Attributes:
        norm: its dotted name.
        into: the module that took it up, or itself where it became a scale and shift.
        form: how.
        error: largest error of the pair's output, over the largest output, against float64, on
            the inputs that the pair got and on random ones.
        unfolded: the same of the two modules as they were.
    """

    norm: str
    into: str
    form: Form
    error: float
    unfolded: float


class Left(NamedTuple):
    """A norm that stays, and why."""

    norm: str
    reason: str


@dataclass(frozen=True)
class Folded:
    """A model for inference, and the proof that it is the one given.

    Attributes:
        model: a copy; what was given is untouched.
        pairs: what was folded.
        left: what was not.
        error: largest difference of the model's outputs from those of the original, over the
            largest output; on the example and on random inputs.
        exact: the same with both in float64; None if the model does not run in it.
        plan: what :func:`refold` needs to give a freshly built model the same structure.
    """

    model: nn.Module
    pairs: tuple[Pair, ...]
    left: tuple[Left, ...]
    error: float
    exact: float | None
    plan: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {
            "pairs": [pair._asdict() for pair in self.pairs],
            "left": [left._asdict() for left in self.left],
            "error": self.error,
            "exact": self.exact,
        }


def fold(model: nn.Module, example_inputs: Any, *, scaling: Scaling | None = None) -> Folded:
    """Fold every batch norm that can be folded, and prove it.

    A norm is y = s x + t in inference. Behind a convolution, transposed convolution or linear
    layer it becomes W' = s W and b' = s b + t; before one, W' = W s and b' = b + sum(W t). One
    that has neither becomes a scale and shift of channels. The arithmetic is in float64, rounded
    once.

    Args:
        model: any model that runs. Norms in train mode are left: call ``model.eval()`` first.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments, as the
            model takes them. What is folded is read off this one forward.
        scaling: of the model's first argument, to be folded into its first layer: the folded
            model takes what was not scaled (uint8, too), and so must ``example_inputs`` be.

    Returns:
        The folded copy, the pairs with their errors, and what was left with the reasons.

    Raises:
        InputError: the model cannot be copied, or does not run on the example.
    """
    job = _Job.of(model, example_inputs, scaling)
    parts, left = _planned(job)
    _prove(job, parts)
    sound = _sifted(job, [part for part in parts if not part.fault])
    return _result(job, parts, sound, left)


def refold(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built ``model`` the structure of a folded one, whose state dict then fits.

    Args:
        model: as it was before folding; changed in place.
        plan: ``Folded.plan``.
    """
    for name in plan["biases"]:
        owner = model.get_submodule(name)
        weight = owner.weight
        assert isinstance(weight, nn.Parameter)
        transposed = getattr(owner, "transposed", False)
        outputs = owner.out_channels if transposed else weight.shape[0]
        bias = weight.new_zeros(outputs)  # type: ignore[arg-type]
        owner.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    dtype = dtype_of(model)
    for name, (kind, *more) in plan["norms"].items():
        there = Cast(dtype) if kind == "cast" else _remnant(model.get_submodule(name), kind, *more)
        model = _put(model, name, there)
    for name in plan["shifted"]:
        model = _put(model, name, Shifted(model.get_submodule(name)))
    if plan["raw"] is None:
        return model
    shift, scale = plan["raw"]
    return RawInput(model, _tensor(shift), _tensor(scale))


# -- what is there --------------------------------------------------------------------------------


@dataclass
class _Norm:
    """A norm that is an affine map in this forward, and what its subclass does after it."""

    name: str
    affine: Affine
    after: list[Any]  # steps as _remnant() takes them
    activation: str | None
    scales_input: bool = False

    @property
    def bare(self) -> bool:
        """Whether it does nothing else."""
        return not self.after and self.activation is None


@dataclass
class _Job:
    """A copy of the model with its example, and what was seen of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scaling: Scaling | None
    flow: Flow
    norms: dict[str, _Norm]
    left: dict[str, str]
    whole: _Whole | None = None

    @classmethod
    def of(cls, model: nn.Module, example: Any, scaling: Scaling | None) -> _Job:
        model = unwrapped(model)
        args, kwargs = as_arguments(example)
        try:
            model = copy.deepcopy(model)
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            raise InputError(
                f"{type(model).__name__} cannot be copied ({error}); fold a freshly built model "
                "with the same state dict."
            ) from error
        job = cls(model, args, kwargs, scaling, Flow(), {}, {})
        inputs = job.scaled(args)
        try:
            flow = flow_of(model, lambda: seeded(model, inputs, kwargs), whole=True)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} does not run on example_inputs ({type(error).__name__}: "
                f"{error}); give what its forward takes."
            ) from error
        job.flow = flow
        job._look()
        return job

    def scaled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The model's own arguments for those given."""
        if self.scaling is None:
            return args
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        x = args[0].to(dtype)
        if self.scaling.shift is not None:
            x = x - self.scaling.shift.to(dtype)
        return (x * self.scaling.scale.to(dtype), *args[1:])

    def _look(self) -> None:
        """Find the norms; those that are not affine in this forward are left."""
        waiting: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if _normalizes(module):
                reason = _not_affine(module, self.flow.calls_of(name))
                if reason is None:
                    waiting[name] = module
                else:
                    self.left[name] = reason
        scalers = dict(_input_scalers(self.model, self.flow))
        with contextlib.ExitStack() as stack:
            for name, module in waiting.items():
                stack.callback(self._watched(name, module))
            seeded(self.model, self.scaled(self.args), self.kwargs)
        for name, module in scalers.items():
            affine = _scaler_as_affine(
                module, self.flow.nodes[self.flow.calls_of(name)[0].input or 0]
            )
            if affine is not None:
                self.norms[name] = _Norm(name, affine, [], None, scales_input=True)

    def _watched(self, name: str, module: nn.Module) -> Callable[[], None]:
        """Hook ``module`` to see whether it computes what its statistics say."""

        def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            found = _as_norm(name, module, self.flow, (args, kwargs), out)
            if isinstance(found, _Norm):
                self.norms[name] = found
            else:
                self.left[name] = found

        return module.register_forward_hook(look, with_kwargs=True).remove


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, under torch.compile, DDP and DataParallel."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments.

    Raises:
        InputError: it is none of a tensor, a tuple, a list and a mapping.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise InputError(
        "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {type(example).__name__}."
    )


@torch.no_grad()
def seeded(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """One forward from the same random numbers each time, which are given back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(*args, **kwargs)


def _normalizes(module: nn.Module) -> bool:
    """Whether it is a batch norm, or has what makes one."""
    if isinstance(module, _BatchNorm):
        return True
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.ndim == 1


def _not_affine(module: nn.Module, calls: list[Call]) -> str | None:
    """Why a norm cannot be a fixed map of its input."""
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return "has no running statistics: it normalizes by each batch"
    return _moving(module) or _unsound(mean, var) or _elsewhere(module, calls)


def _moving(module: nn.Module) -> str | None:
    frozen = isinstance(module, BatchNorm) and module.options.frozen
    if module.training and isinstance(module, _NormBase) and not frozen:
        return "is in train mode; call model.eval() first"
    return None


def _unsound(mean: Tensor, var: Tensor) -> str | None:
    if nn.parameter.is_lazy(mean) or not bool(
        torch.isfinite(mean).all() & torch.isfinite(var).all()
    ):
        return "has statistics that are not finite"
    return None


def _elsewhere(module: nn.Module, calls: list[Call]) -> str | None:
    if not calls:
        return "is not called in the forward of the example"
    if len(calls) > 1:
        return f"is called {len(calls)} times in a forward"
    if hooks_of(module):
        return "has hooks"
    return None


def _as_norm(
    name: str, module: nn.Module, flow: Flow, given: tuple[Any, dict[str, Any]], out: Any
) -> _Norm | str:
    """The norm as an affine map and what follows it, or why it is not that."""
    held: Any = module
    weight, bias = getattr(held, "weight", None), getattr(held, "bias", None)
    eps = float(getattr(held, "eps", 1e-5))
    affine = of_statistics(held.running_mean, held.running_var, weight, bias, eps)
    named = dict(zip(("input", "mask", "residual"), given[0], strict=False)) | given[1]
    x, residual = next(tensors_in(given)), None
    steps, activation = [], None
    if isinstance(module, BatchNorm):
        if named.get("mask") is not None:
            return "is called with a mask"
        residual, activation = named.get("residual"), module.options.act
    elif flow.calls_of(name)[0].tensors != 1 or not isinstance(out, Tensor):
        return "does not take one tensor and return one"
    else:
        found = _steps(name, module, flow)
        if isinstance(found, str):
            return found
        steps = found
    norm = _Norm(name, affine, steps, activation if residual is None else activation or "")
    if x.ndim < 2 or x.shape[1] != len(affine.scale):
        return "does not have its channels in the second axis"
    if not _computes(norm, module, x, residual, out):
        return "does not compute the affine map that its running statistics make"
    return norm


def _computes(
    norm: _Norm, module: nn.Module, x: Tensor, residual: Tensor | None, out: Tensor
) -> bool:
    """Whether ``out`` is what the affine map and the steps after it make of ``x``."""
    rest = _remnant(module, "gone", norm.after, norm.activation)
    rest = copy.deepcopy(rest).double()
    expected = norm.affine.along(x.double())
    size = max(float(expected.abs().max()), float(x.abs().max() * norm.affine.scale.abs().max()))
    more = () if residual is None else (None, residual.double())
    expected = rest(expected, *more)
    dtype = torch.promote_types(out.dtype, x.dtype)
    eps = torch.finfo(out.dtype if dtype.is_floating_point else torch.float32).eps
    return float((expected - out.double()).abs().max()) <= 64 * eps * max(size, 1e-30)


def _steps(name: str, module: nn.Module, flow: Flow) -> list[Any] | str:
    """What a subclass does behind the normalization: its children, and functions by name."""
    call = flow.calls_of(name)[0]
    inner = [n for n in range(call.first, call.end) if flow.nodes[n].op == "batch_norm"]
    if len(inner) != 1 or call.output == inner[0]:
        return []
    steps: list[Any] = []
    at = call.output
    while at is not None and at != inner[0]:
        node = flow.nodes[at]
        child = node.module.removeprefix(f"{name}." if name else "").partition(".")[0]
        if node.module == name and node.op in _ACTIVATIONS and len(node.inputs) == 1:
            steps.append(["function", node.op, node.arguments[1:], _serious(node.keywords)])
            at = node.inputs[0]
        elif node.module != name and child in module._modules:
            steps.append(["child", child])
            called = flow.calls_of(f"{name}.{child}" if name else child)
            at = called[0].input if len(called) == 1 else None
        else:
            return f"does {node.op} after normalizing, which cannot be kept"
    return "does not return what it normalized" if at is None else steps[::-1]


def _serious(keywords: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keywords.items() if key != "inplace"}


def _remnant(module: nn.Module, kind: str, steps: list[Any], activation: str | None) -> nn.Module:
    """What stands in a norm's place: nothing, or a scale and shift, and what it did after.

    ``activation`` is None for none; for TrueNorm's layers "" says that they add a residual.
    """
    made: list[nn.Module] = []
    if kind == "scale and shift":
        made.append(ScaleShift(module.running_mean))  # type: ignore[arg-type]
    for what, first, *more in steps:
        made.append(module.get_submodule(first) if what == "child" else Function(first, *more))
    if activation is not None:
        return Remainder(made, activation or None)
    if not made:
        return nn.Identity()
    return made[0] if len(made) == 1 else nn.Sequential(*made)


def _input_scalers(model: nn.Module, flow: Flow) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children that do nothing but scale and shift an input of the model."""
    for name, module in model.named_modules():
        calls = flow.calls_of(name)
        if not name or len(calls) != 1 or any(module.children()) or hooks_of(module):
            continue
        call = calls[0]
        inner = flow.nodes[call.first : call.end]
        # The node of the input itself may be the first that was made during the call.
        work = [node for node in inner if node.op != "input"]
        if call.input is None or call.tensors != 1 or flow.nodes[call.input].op != "input":
            continue
        if work and all(node.op in _SCALING for node in work) and not _normalizes(module):
            yield name, module


def _scaler_as_affine(module: nn.Module, given: Node) -> Affine | None:
    """The map that an input scaling makes, seen at 0, 1 and 2."""
    module = copy.deepcopy(module).double()
    try:
        with torch.no_grad(), _in_double():
            at = [module(torch.full(given.shape, float(v), dtype=torch.float64)) for v in range(3)]
    except (RuntimeError, TypeError, ValueError):
        return None
    if any(not isinstance(y, Tensor) or y.shape != given.shape or y.ndim < 2 for y in at):
        return None
    zero, one, two = (y.double().movedim(1, 0).flatten(1) for y in at)
    if not torch.allclose(two - one, one - zero, rtol=1e-9) or (zero != zero[:, :1]).any():
        return None
    slope = one - zero
    return None if (slope != slope[:, :1]).any() else Affine(slope[:, 0], zero[:, 0])


# -- what becomes of it ---------------------------------------------------------------------------


@dataclass
class _Target:
    """Weights that take norms up."""

    weights: Weights
    base: Weighted
    padded: bool
    inputs: int  # axis of the channels in what it takes
    outputs: int
    before: Affine | None = None
    after: list[Affine] = field(default_factory=list)

    def folded(self, base: Weighted | None = None) -> Weighted:
        """The new weights, in float64."""
        made = base or self.base
        if self.before is not None:
            made = made.preceded_by(self.before, padded=self.padded)
        for affine in self.after:
            made = made.followed_by(affine)
        return made


@dataclass
class _Part:
    """Changes that stand or fall together."""

    norms: dict[str, tuple[str, Form]] = field(default_factory=dict)  # what into, and how
    targets: list[_Target] = field(default_factory=list)
    alone: dict[str, Affine] = field(default_factory=dict)  # as a scale and shift
    error: float = 0.0
    unfolded: float = 0.0
    fault: str = ""


class _Planner:
    """Decides for each norm, in the order of the forward."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.wiring = Wiring(job.model, job.flow, job.norms)
        self.affines = {name: norm.affine for name, norm in job.norms.items()}
        self.targets: dict[str, _Target] = {}
        self.fates: dict[str, tuple[list[str], str, Form]] = {}  # what it meets, into, how
        self.left = dict(job.left)
        self.merged: set[str] = set()

    def decide(self, name: str) -> None:
        """Into its producer, else into its consumers, else alone; or left, with the reason."""
        norm = self.job.norms[name]
        producer = None if norm.scales_input else self.wiring.producer(name)
        if isinstance(producer, Partner):
            self._into_producer(norm, producer)
            return
        consumers = self.wiring.consumers(name) if norm.bare else None
        if isinstance(consumers, list):
            why = self._into_consumers(name, consumers)
            if why is None:
                return
            consumers = why
        reasons = [found.reason for found in (producer, consumers) if isinstance(found, Refused)]
        if norm.scales_input and not reasons:
            reasons = ["is not followed by weights alone"]
        if reasons and name not in self.merged:
            self.left[name] = "; ".join(reasons)
        else:
            self.fates[name] = ([], name, "scale and shift")

    def _into_producer(self, norm: _Norm, partner: Partner) -> None:
        target = self._target(partner.weights)
        target.after.append(self.affines[norm.name].of_channels(partner.channels))
        if norm.bare:
            self.wiring.absorbed.add(norm.name)
        weight = partner.weights.weight
        self.fates[norm.name] = ([weight], partner.weights.owner, "into producer")

    def _into_consumers(self, name: str, found: list[Partner | Neighbour]) -> Refused | None:
        for one in found:
            if isinstance(one, Partner) and (why := self._unfit(one.weights)):
                return Refused(why)
            if isinstance(one, Neighbour) and one.norm in self.left:
                return Refused(f"{one.norm}, which takes it, is left")
        affine = self.affines[name]
        for one in found:
            if isinstance(one, Partner):
                target = self._target(one.weights)
                target.before = affine.of_channels(one.channels)
            else:
                first = affine.of_channels(one.channels)
                self.affines[one.norm] = self.affines[one.norm].after(first)
                self.merged.add(one.norm)
        self.wiring.absorbed.add(name)
        meets = [o.weights.weight if isinstance(o, Partner) else o.norm for o in found]
        owners = [o.weights.owner if isinstance(o, Partner) else o.norm for o in found]
        form: Form = "into norm" if isinstance(found[0], Neighbour) else "into consumer"
        self.fates[name] = (meets, ", ".join(owners), form)
        return None

    def _unfit(self, weights: Weights) -> str | None:
        """Why a weighted operation cannot take up what is before it."""
        if weights.weight in self.targets and self.targets[weights.weight].before is not None:
            return f"{weights.owner} has taken up another norm"
        if not _padded(self.job.flow.nodes[weights.node], weights):
            return None
        module = self.job.model.get_submodule(weights.owner)
        plain = isinstance(module, nn.modules.conv._ConvNd) and weights.weight.endswith("weight")
        if plain and self.job.flow.nodes[weights.node].module == weights.owner:
            return None
        return f"zeros pad the input of {weights.owner}, which is no plain convolution"

    def _target(self, weights: Weights) -> _Target:
        if weights.weight in self.targets:
            return self.targets[weights.weight]
        flow, model = self.job.flow, self.job.model
        node = flow.nodes[weights.node]
        given = flow.nodes[node.inputs[0]]
        weight = _held(model, weights.weight)
        linear = weights.op == "linear"
        axes = [
            len(n.shape) - 1 if linear else len(n.shape) - weight.ndim + 1 for n in (given, node)
        ]
        groups = 1
        if not linear:
            groups = (
                node.shape[axes[1]] // weight.shape[1]
                if weights.transposed
                else given.shape[axes[0]] // weight.shape[1]
            )
        bias = None if weights.bias is None else _held(model, weights.bias).detach().double()
        base = Weighted(weight.detach().double(), bias, weights.transposed, groups)
        target = _Target(weights, base, _padded(node, weights), axes[0], axes[1])
        self.targets[weights.weight] = target
        return target

    def input_scaling(self) -> None:
        """Fold the scaling of the model's first argument into whatever takes it."""
        scaling = self.job.scaling
        if scaling is None:
            return
        value = self.job.flow.calls_of("")[0].input
        shape = () if value is None else self.job.flow.nodes[value].shape
        affine = _as_affine(scaling, shape)
        takers = None if value is None or affine is None else self.wiring.takers(value)
        if isinstance(takers, list) and affine is not None:
            self.affines[INPUT] = affine
            why = self._into_consumers(INPUT, takers)
            if why is None:
                return
            takers = why
        self.left[INPUT] = takers.reason if isinstance(takers, Refused) else (
            "the model's input is not taken by weights alone"
        )  # fmt: skip

    def parts(self) -> list[_Part]:
        """The decisions, those that touch the same weights together."""
        home: dict[str, _Part] = {}
        parts: list[_Part] = []
        for name, (meets, into, form) in self.fates.items():
            joined = {id(home[key]): home[key] for key in (name, *meets) if key in home}
            part = next(iter(joined.values()), None) or _Part()
            if id(part) not in joined:
                parts.append(part)
            for other in list(joined.values())[1:]:
                part.norms |= other.norms
                parts = [p for p in parts if p is not other]
                home |= {key: part for key, where in home.items() if where is other}
            part.norms[name] = (into, form)
            home |= dict.fromkeys((name, *meets), part)
        for weight, target in self.targets.items():
            home[weight].targets.append(target)
        for name, (_, _, form) in self.fates.items():
            if form == "scale and shift":
                home[name].alone[name] = self.affines[name]
        return parts


def _planned(job: _Job) -> tuple[list[_Part], dict[str, str]]:
    planner = _Planner(job)
    planner.input_scaling()
    order = {call.module: i for i, call in reversed(list(enumerate(job.flow.calls)))}
    for name in sorted(job.norms, key=lambda name: order[name]):
        planner.decide(name)
    return planner.parts(), planner.left


def _padded(node: Node, weights: Weights) -> bool:
    """Whether a shift of the input reaches some outputs less than others."""
    if weights.op == "linear":
        return False
    padding = node.arguments[4] if len(node.arguments) > 4 else node.keywords.get("padding", 0)
    if weights.transposed or isinstance(padding, str):
        return weights.transposed or padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _as_affine(scaling: Scaling, shape: tuple[int, ...]) -> Affine | None:
    """An input scaling as a map of channels, if it is one."""
    if len(shape) < 2:
        return None
    along = (shape[1], *(1,) * (len(shape) - 2))
    try:
        scale = scaling.scale.double().expand(along).flatten()
        shift = scaling.shift
        offset = (
            torch.zeros_like(scale) if shift is None else shift.double().expand(along).flatten()
        )
    except RuntimeError:  # it has a value for each position
        return None
    return Affine(scale, -offset * scale)


def _held(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    assert isinstance(found, Tensor)
    return found


# -- the proof of each pair -----------------------------------------------------------------------


class _Prover(TorchFunctionMode):
    """While the original runs, compares each operation and its norms with what replaces them."""

    def __init__(self, job: _Job, parts: list[_Part]) -> None:
        super().__init__()
        self.job = job
        self._wanted = {
            id(_held(job.model, target.weights.weight)): (target, part)
            for part in parts
            for target in part.targets
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        target, part = self._wanted.get(id(weight), (None, None))
        if target is not None and part is not None:
            x = kwargs.get("input", args[0] if args else None)
            rest = args[3:]
            named = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
            run = _Operation(func, rest, named)
            x = x if target.outputs == 0 else x[:_PROVED_ON]  # one example without a batch axis
            for error, unfolded in _errors(target, run, x, weight.dtype, self.job.model):
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
    target: _Target, run: _Operation, x: Tensor, dtype: torch.dtype, model: nn.Module
) -> Iterator[tuple[float, float]]:
    """Error of the folded and of the unfolded operations, on two inputs."""
    before, base, axis = target.before, target.base, target.outputs
    taken = x.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(taken.shape, generator=generator, dtype=torch.float64).to(taken.device)
    if before is not None:  # what the norm got, where that can be told from what it gave
        view = [1] * x.ndim
        view[target.inputs] = -1
        scale, shift = before.scale.view(view), before.shift.view(view)
        undone = (taken - shift) / torch.where(scale == 0, 1.0, scale)
        taken = torch.where(scale == 0, noise, undone)
    spread = float(taken.std()) if taken.numel() > 1 else 1.0
    conv = model.get_submodule(target.weights.owner) if target.padded else None

    def whole(u: Tensor, kind: torch.dtype) -> Tensor:
        """The operations as they were."""
        u = u.to(kind)
        u = u if before is None else before.along(u, target.inputs)
        y = run(u, _in(base, kind))
        for affine in target.after:
            y = affine.along(y, axis)
        return y.double()

    def folded(u: Tensor, kind: torch.dtype) -> Tensor:
        new = _in(target.folded(), kind)
        y = run(u.to(kind), new)
        if new.border is not None:
            ones = torch.ones(1, 1, *u.shape[2:], dtype=kind, device=u.device)
            y = y + Shifted.share(_Bare(conv), ones, new.border)  # type: ignore[arg-type]
        return y.double()

    for u in (taken, noise * spread + taken.mean()):
        exact = whole(u, torch.float64)
        yield (
            max(distance(exact, folded(u, dtype)), distance(exact, folded(u, torch.float64))),
            distance(exact, whole(u, dtype)),
        )


class _Bare(NamedTuple):
    """What :meth:`Shifted.share` asks of itself."""

    conv: nn.Module | None


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


def _prove(job: _Job, parts: list[_Part]) -> None:
    """Fill each part's errors, and its fault where they are too large."""
    with _Prover(job, parts):
        seeded(job.model, job.scaled(job.args), job.kwargs)
    for part in parts:
        for name, affine in part.alone.items():
            _prove_alone(job, part, name, affine)
        kinds = [_held(job.model, t.weights.weight).dtype for t in part.targets]
        bound = max((_bound(kind) for kind in kinds), default=_bound(dtype_of(job.model)))
        if not part.error <= max(bound, _SLACK * part.unfolded):
            part.fault = f"the pair's proof failed: error {part.error:.1e}, allowed {bound:.0e}"


def _prove_alone(job: _Job, part: _Part, name: str, affine: Affine) -> None:
    module = job.model.get_submodule(name)
    held: Any = module
    call = job.flow.calls_of(name)[0]
    shape = job.flow.nodes[call.input or 0].shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    device = affine.scale.device
    own = Affine(held.running_var.detach().double().sqrt(), held.running_mean.detach().double())
    u = own.along(noise.to(device))  # as the norm's own statistics tell
    dtype = dtype_of(module, job.model)
    there = ScaleShift(held.running_mean)
    _fill(there, affine)
    exact = affine.along(u)
    part.error = max(part.error, distance(exact, there.to(dtype)(u.to(dtype))))
    part.unfolded = max(part.unfolded, distance(exact, affine.along(u.to(dtype))))


def _bound(dtype: torch.dtype) -> float:
    return BOUNDS.get(dtype, BOUNDS[torch.float32])


def dtype_of(*models: nn.Module) -> torch.dtype:
    """The type of the first real parameter or buffer of the first model that has one."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


# -- the proof from end to end --------------------------------------------------------------------


def _plan_of(job: _Job, parts: Iterable[_Part]) -> dict[str, Any]:
    """The structure of a folded model, in plain values."""
    norms: dict[str, list[Any]] = {}
    biases, shifted, raw = [], [], None
    scaling = job.scaling
    folded = False
    for part in parts:
        for name, (_, form) in part.norms.items():
            if name == INPUT:
                folded = True
                continue
            norm = job.norms[name]
            if norm.scales_input:
                norms[name] = ["cast"]
                continue
            kind = "scale and shift" if form == "scale and shift" else "gone"
            norms[name] = [kind, norm.after, norm.activation]
        for target in part.targets:
            made = target.folded()
            if target.weights.bias is None and made.bias is not None:
                biases.append(target.weights.owner)
            if made.border is not None:
                shifted.append(target.weights.owner)
    if scaling is not None:
        raw = [None, None] if folded else list(scaling.to_json().values())
    return {"norms": norms, "biases": biases, "shifted": shifted, "raw": raw}


def _built(job: _Job, parts: list[_Part], dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model with ``parts`` folded; in ``dtype`` if one is given."""
    plan = _plan_of(job, parts)
    model = copy.deepcopy(job.model)
    if dtype is not None:
        model = model.to(dtype)
    targets = [target for part in parts for target in part.targets]
    weights = {t.weights.weight: model.get_submodule(t.weights.owner) for t in targets}
    model = refold(model, plan)
    inner = model.model if isinstance(model, RawInput) else model
    with torch.no_grad():
        for target in targets:
            _write(inner, target, weights[target.weights.weight])
        for part in parts:
            for name, affine in part.alone.items():
                _fill(_scale_shift(inner.get_submodule(name)), affine)
    return model


def _write(model: nn.Module, target: _Target, owner: nn.Module) -> None:
    made, weights = target.folded(), target.weights
    attribute = weights.weight.rpartition(".")[2]
    weight = getattr(owner, attribute)
    weight.data.copy_(rounded(made.weight, weight.dtype))
    if made.bias is not None:
        name = "bias" if weights.bias is None else weights.bias.rpartition(".")[2]
        bias = getattr(owner, name)
        bias.data.copy_(rounded(made.bias, bias.dtype))
    if made.border is not None:
        around = model.get_submodule(weights.owner)
        assert isinstance(around, Shifted)
        around.border.copy_(rounded(made.border, around.border.dtype))


def _fill(there: ScaleShift, affine: Affine) -> None:
    there.scale.copy_(rounded(affine.scale, there.scale.dtype))
    there.shift.copy_(rounded(affine.shift, there.shift.dtype))


def _scale_shift(remnant: nn.Module) -> ScaleShift:
    return next(m for m in remnant.modules() if isinstance(m, ScaleShift))


def _put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of a module, in all its places; return the model."""
    old = model.get_submodule(name)
    if old is model:
        return new
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[key] = new
    return model


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values)


class _Whole:
    """The original's outputs, and how far a folded model's are from them."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.inputs = list(_inputs_like(job))
        original = _built(job, [])
        self.outputs = [self._run(original, *given) for given in self.inputs]
        self.sound = [i for i, out in enumerate(self.outputs) if out is not None]
        self.exact: list[list[Tensor] | None] | None = None
        if dtype_of(job.model) is not torch.float64:
            exact = self._exactly([])
            self.exact = exact if exact[0] is not None else None

    def _exactly(self, parts: list[_Part]) -> list[list[Tensor] | None]:
        """The outputs in float64."""
        model = _built(self.job, parts, torch.float64)
        with _in_double():
            return [self._run(model, *_double(given)) for given in self.inputs]

    def _run(self, model: nn.Module, args: Any, kwargs: Any) -> list[Tensor] | None:
        try:
            out = seeded(copy.deepcopy(model), args, kwargs)
        except Exception:  # what does not run on other inputs, or in float64, proves nothing
            return None
        return [t for t in tensors_in(out) if t.is_floating_point()]

    def errors(self, parts: list[_Part]) -> tuple[float, float | None, float, float]:
        """From the original; in float64; against float64, and the original's own against it."""
        folded = _built(self.job, parts)
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

    def passes(self, parts: list[_Part]) -> bool:
        """Whether the folded model is the original, but for rounding."""
        error, precise, against, own = self.errors(parts)
        if precise is not None and not precise <= _EXACT:
            return False
        bound = _bound(dtype_of(self.job.model))
        return error <= bound or against <= max(bound, _SLACK * own)


class _Doubling(TorchFunctionMode):
    """Casts to narrower floats, which a forward may contain, are casts to float64."""

    _narrow: ClassVar = {torch.float32, torch.float16, torch.bfloat16}
    _casts: ClassVar = {Tensor.float, Tensor.half, Tensor.bfloat16}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            narrow = isinstance(value, torch.dtype) and value in self._narrow
            return torch.float64 if narrow else value

        func = Tensor.double if func in self._casts else func
        kwargs = {key: wide(value) for key, value in (kwargs or {}).items()}
        return func(*(wide(value) for value in args), **kwargs)


@contextlib.contextmanager
def _in_double() -> Iterator[None]:
    """What a forward makes, and what it casts, is float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(default)


def _double(
    given: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = given

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return mapped(args, wide), mapped(kwargs, wide)


def _inputs_like(job: _Job) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example, and two with other real numbers of its mean and spread."""
    yield job.args, job.kwargs
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
        yield mapped(job.args, other), mapped(job.kwargs, other)


def _sifted(job: _Job, parts: list[_Part]) -> list[_Part]:
    """The parts that, together, leave the model what it is; halves are tried where all fail."""
    whole = _Whole(job)
    kept: list[_Part] = []

    def add(group: list[_Part]) -> None:
        if not group or whole.passes([*kept, *group]):
            kept.extend(group)
        elif len(group) == 1:
            group[0].fault = "with it, the model's outputs are others"
        else:
            add(group[: len(group) // 2])
            add(group[len(group) // 2 :])

    add(parts)
    job.whole = whole
    return kept


def _result(job: _Job, parts: list[_Part], sound: list[_Part], left: dict[str, str]) -> Folded:
    assert job.whole is not None
    error, exact, _, _ = job.whole.errors(sound)
    order = {name: i for i, (name, _) in enumerate(job.model.named_modules())}
    for part in parts:
        if part.fault:
            left |= dict.fromkeys(part.norms, part.fault)
    pairs = [
        Pair(name, into, form, part.error, part.unfolded)
        for part in sound
        for name, (into, form) in part.norms.items()
    ]
    return Folded(
        _built(job, sound),
        tuple(sorted(pairs, key=lambda pair: order.get(pair.norm, -1))),
        tuple(Left(n, r) for n, r in sorted(left.items(), key=lambda row: order.get(row[0], -1))),
        error,
        exact,
        _plan_of(job, sound),
    )
