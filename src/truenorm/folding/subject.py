"""What is to be folded: a copy of the model, its example, and the norms seen at work."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from truenorm.calling.borrowing import eager, unwrapped
from truenorm.calling.flow import Flow, ModuleCall, Node, flow_of
from truenorm.calling.nested import mapped, tensors_in
from truenorm.data.datasets import Scaling
from truenorm.errors import InputError
from truenorm.folding.affine import Affine, of_statistics
from truenorm.folding.modules import parameter_dtype
from truenorm.folding.refold import remnant
from truenorm.folding.wiring import hooks_of
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.foreign import epsilon, frozen_statistics

INPUT = "(input scaling)"
UNCALLED = "is not called in the forward of the example"
_SCALING = {"sub", "rsub", "div", "truediv", "true_divide", "mul", "add", "to", "float", "type"}
_SCALING |= {"view", "reshape", "getitem", "unsqueeze", "type_as", "expand", "detach", "as_tensor"}
_ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid"),
    *("tanh", "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "clamp"),
}


@dataclass
class Norm:
    """A norm that is an affine map in this forward, and what its subclass does after it."""

    name: str
    affine: Affine
    after: list[Any]  # steps as remnant() takes them
    activation: str | None
    scales_input: bool = False

    @property
    def bare(self) -> bool:
        """Whether it does nothing else."""
        return not self.after and self.activation is None


@dataclass
class Subject:
    """A model with its example, and what was seen of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scaling: Scaling | None
    flow: Flow
    norms: dict[str, Norm]
    left: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, example: Any, scaling: Scaling | None) -> Subject:
        """Copy ``model`` and run the copy.

        Raises:
            InputError: it cannot be copied, or does not run on the example.
        """
        model = unwrapped(model)
        args, kwargs = as_arguments(example)
        if isinstance(model, torch.jit.ScriptModule):
            raise InputError(
                f"{type(model).__name__}: a scripted model hides what it does; fold the module it "
                "was made from."
            )
        try:
            model = copy.deepcopy(model)
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            raise InputError(
                f"{type(model).__name__} cannot be copied ({error}); fold a freshly built model "
                "with the same state dict."
            ) from error
        return cls.seen(model, args, kwargs, scaling)

    @classmethod
    def seen(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scaling: Scaling | None = None,
    ) -> Subject:
        """Run ``model`` itself, which must be the caller's to run.

        Raises:
            InputError: it does not run on these arguments.
        """
        subject = cls(model, args, kwargs, scaling, Flow(), {}, {})
        copies = mapped(subject.scaled(args), Tensor.clone), mapped(kwargs, Tensor.clone)
        try:
            flow = flow_of(model, lambda: _run(model, *copies), whole=True)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} does not run on example_inputs ({type(error).__name__}: "
                f"{error}); give what its forward takes."
            ) from error
        subject.flow = flow
        subject._look()
        return subject

    def scaled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The model's own arguments for those given."""
        if self.scaling is None:
            return args
        dtype = parameter_dtype(self.model)
        x = args[0].to(dtype)
        if self.scaling.shift is not None:
            x = x - self.scaling.shift.to(dtype)
        return (x * self.scaling.scale.to(dtype), *args[1:])

    def _look(self) -> None:
        """Find the norms; those that are not affine in this forward are left."""
        waiting: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if normalizes(module):
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
                self.norms[name] = Norm(name, affine, [], None, scales_input=True)

    def _watched(self, name: str, module: nn.Module) -> Callable[[], None]:
        """Hook ``module`` to see whether it computes what its statistics say."""

        def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            found = _as_norm(name, module, self.flow, (args, kwargs), out)
            if isinstance(found, Norm):
                self.norms[name] = found
            else:
                self.left[name] = found

        return module.register_forward_hook(look, with_kwargs=True).remove


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
def seeded(model: nn.Module, args: Any, kwargs: Any, method: str = "forward") -> Any:
    """One call from the same random numbers each time, on copies that it may write into."""
    return _run(model, mapped(args, Tensor.clone), mapped(kwargs, Tensor.clone), method)


def _run(model: nn.Module, args: Any, kwargs: Any, method: str = "forward") -> Any:
    with torch.random.fork_rng(), eager(model):
        torch.manual_seed(0)
        called = model if method == "forward" else getattr(model, method)
        return called(*args, **kwargs)


def normalizes(module: nn.Module) -> bool:
    """Whether it is a batch norm, or has what makes one."""
    if isinstance(module, _BatchNorm):
        return True
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.ndim == 1


def _not_affine(module: nn.Module, calls: list[ModuleCall]) -> str | None:
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
    if bool((var < 0).any()):
        return "has a negative running variance"
    return None


def _elsewhere(module: nn.Module, calls: list[ModuleCall]) -> str | None:
    if not calls:
        return UNCALLED
    if len(calls) > 1:
        return f"is called {len(calls)} times in a forward"
    if hooks_of(module):
        return "has hooks"
    return None


def _as_norm(
    name: str, module: nn.Module, flow: Flow, given: tuple[Any, dict[str, Any]], out: Any
) -> Norm | str:
    """The norm as an affine map and what follows it, or why it is not that."""
    norm_module: Any = module
    weight, bias = getattr(norm_module, "weight", None), getattr(norm_module, "bias", None)
    moments = norm_module.running_mean, norm_module.running_var
    affine = of_statistics(*moments, weight, bias, _eps(module))
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
    norm = Norm(name, affine, steps, activation if residual is None else activation or "")
    if x.ndim < 2 or x.shape[1] != len(affine.scale):
        return "does not have its channels in the second axis"
    if not _computes(norm, module, x, residual, out):
        return "does not compute the affine map that its running statistics make"
    return norm


def _eps(module: nn.Module) -> float:
    """What it adds to the variance; torch's where it cannot be told, and the output decides."""
    try:
        return epsilon(module)
    except Exception:  # of a forward of others that takes no example of one channel
        return 1e-5


def _computes(
    norm: Norm, module: nn.Module, x: Tensor, residual: Tensor | None, out: Tensor
) -> bool:
    """Whether ``out`` is what the affine map and the steps after it make of ``x``."""
    rest = remnant(module, "gone", norm.after, norm.activation)
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
    frozen = frozen_statistics(module)  # by sums and products of its own
    if (len(inner) != 1 and not frozen) or call.output in inner:
        return []
    steps: list[Any] = []
    at = call.output
    while at is not None and at not in inner:
        node = flow.nodes[at]
        if frozen and node.module == name and node.op not in _ACTIVATIONS:
            break
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
        if work and all(node.op in _SCALING for node in work) and not normalizes(module):
            yield name, module


def _scaler_as_affine(module: nn.Module, given: Node) -> Affine | None:
    """The map that an input scaling makes, seen at 0, 1 and 2."""
    module = copy.deepcopy(module).double()
    try:
        with torch.no_grad(), in_double():
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
def in_double() -> Iterator[None]:
    """What a forward makes, and what it casts, is float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(default)
