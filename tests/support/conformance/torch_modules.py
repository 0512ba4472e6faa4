"""torch's ``module_db``: its examples of each norm, with our class in the place of torch's.

The examples are in torch's wheel (torch/testing/_internal/common_modules.py). What test_modules.py
of torch's repository asks of every module is asked here in words of our own, and more: that the
layer is torch's in its numbers, its state dict and what it refuses.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import truenorm
from conformance.cases import Case, need, need_close, refused
from conformance.process import process_left_alone

SUITE = "torch module_db"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
BATCH = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
INSTANCE = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
LISTED = (*BATCH, *INSTANCE, "GroupNorm", "LayerNorm", "RMSNorm")
_STEPS = ((1.0, 0.0), (-0.5, 1.0), (0.3, 2.0))  # scale and shift, one forward after another


class OverRows(truenorm.RMSNorm):
    """Ours has a weight per channel of (N, C, *S); torch's normalizes trailing axes."""

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = torch.Size(
            [normalized_shape] if isinstance(normalized_shape, int) else normalized_shape
        )
        made = {} if device is None and dtype is None else {"device": device, "dtype": dtype}
        eps = torch.finfo(dtype or torch.get_default_dtype()).eps if eps is None else eps
        super().__init__(shape.numel(), eps=eps, **made)
        self.normalized_shape = tuple(shape)
        if not elementwise_affine:
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, self.num_channels)).view(x.shape)


class OverRanks(truenorm.BatchNorm):
    """torch.nn.SyncBatchNorm's place: statistics pooled over the ranks that there are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, sync=True)


OTHER_NAMES = {"RMSNorm": OverRows, "SyncBatchNorm": OverRanks}


def ours_of(name: str) -> type[nn.Module]:
    """Our class in the place of ``torch.nn``'s of that name."""
    made: type[nn.Module] = OTHER_NAMES.get(name) or getattr(truenorm, name)
    return made


@dataclass(frozen=True)
class Example:
    """One of torch's examples: a class, its arguments, an input."""

    name: str  # of torch.nn's class
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    training: bool
    desc: str
    gradgrad: bool = True
    unbatched: bool = False
    lazy: bool = False

    def made(self, cls: Callable[..., nn.Module], **more: Any) -> nn.Module:
        """The layer, with parameters and statistics that are not the first ones."""
        layer = cls(*self.args, **self.kwargs, **more).to(self.x.dtype)
        if self.lazy:
            layer(self.x)
            reset(layer)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for held in (*layer.parameters(), *layer.buffers()):
                if held.is_floating_point():
                    held.copy_(0.5 + torch.rand(held.shape, generator=generator))
        return layer.train(self.training)

    @property
    def empty(self) -> bool:
        return self.x.numel() == 0

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"{self.desc or 'default'}, {mode}"


def reset(layer: nn.Module) -> None:
    """Statistics as at first."""
    if getattr(layer, "running_mean", None) is not None:
        layer.reset_running_stats()


def results(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)]


def cotangent_of(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)


# -- what is asked -------------------------------------------------------------------------------

Check = Callable[[Example, type[nn.Module]], None]


def gives_torchs_numbers(example: Example, cls: type[nn.Module]) -> None:
    ours, theirs = example.made(cls), example.made(getattr(nn, example.name))
    for scale, shift in _STEPS:
        x = example.x * scale + shift
        got, wanted = (results(layer, x, cotangent_of(x)) for layer in (ours, theirs))
        shaped = [a.view(b.shape) for a, b in zip(got, wanted, strict=True)]
        need_close(shaped, wanted, "output and gradients", **TIGHT)
        for name, value in theirs.state_dict().items():
            if name == "num_batches_tracked" and example.empty:
                continue
            flat = ours.state_dict()[name].view(value.shape)
            need_close(flat, value, f"{name} after it", **TIGHT)


def takes_device_and_dtype(example: Example, cls: type[nn.Module]) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = cls(*example.args, **example.kwargs, device="meta", dtype=dtype)
        for name, held in [*layer.named_parameters(), *layer.named_buffers()]:
            need(held.device.type == "meta", f"{name} is on {held.device.type}, not on meta")
            need(not held.is_floating_point() or held.dtype == dtype, f"{name} is {held.dtype}")


def follows_the_device_of_the_context(example: Example, cls: type[nn.Module]) -> None:
    with torch.device("meta"):
        layer = cls(*example.args, **example.kwargs)
    for name, held in [*layer.named_parameters(), *layer.named_buffers()]:
        need(held.device.type == "meta", f"{name} is on {held.device.type}, not on meta")


def says_what_it_is(example: Example, cls: type[nn.Module]) -> None:
    layer = example.made(cls)
    text = repr(layer)
    need(text.startswith(type(layer).__name__ + "("), f"repr is {text!r}")
    need(text == str(layer), "str and repr differ")
    shown = [str(a).strip("[]") for a in example.args[:1] if not example.lazy]
    need(all(a in text for a in shown), f"no {example.args} in {text!r}")


def keeps_through_a_pickle(example: Example, cls: type[nn.Module]) -> None:
    layer = example.made(cls)
    twins = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), _saved(layer)]
    wanted = results(layer, example.x, cotangent_of(example.x))
    for twin in twins:
        need_close(results(twin, example.x, cotangent_of(example.x)), wanted, "its copy", **TIGHT)
        need(list(twin.state_dict()) == list(layer.state_dict()), "the copy has other keys")
        need_close(twin.state_dict(), layer.state_dict(), "the copy's state", **TIGHT)


def _saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


def leaves_its_input_alone(example: Example, cls: type[nn.Module]) -> None:
    x = example.x.clone()
    layer, version = example.made(cls), x._version
    layer(x)
    need(x._version == version and torch.equal(x, example.x), "the input was written to")


def takes_any_strides(example: Example, cls: type[nn.Module]) -> None:
    wanted = results(example.made(cls), example.x, cotangent_of(example.x))
    apart = torch.stack([example.x, example.x + 1], -1)[..., 0]
    turned = example.x.movedim(0, -1).contiguous().movedim(-1, 0)
    for x in (apart, turned):
        cotangent = torch.stack([cotangent_of(x)] * 2, -1)[..., 0]
        need_close(results(example.made(cls), x, cotangent), wanted, f"{x.stride()}", **TIGHT)


def takes_any_memory_format(example: Example, cls: type[nn.Module]) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    ours, theirs = example.made(cls), example.made(getattr(nn, example.name))
    x = example.x.contiguous(memory_format=formats[example.x.ndim])
    out, wanted = ours(x), theirs(x)
    need_close(out, wanted, "channels last", **TIGHT)
    need(out.stride() == wanted.stride(), f"strides {out.stride()}, torch's {wanted.stride()}")


def has_first_derivatives(example: Example, cls: type[nn.Module]) -> None:
    need(torch.autograd.gradcheck(*_as_function(example, cls)), "gradcheck")


def has_second_derivatives(example: Example, cls: type[nn.Module]) -> None:
    need(torch.autograd.gradgradcheck(*_as_function(example, cls)), "gradgradcheck")


def _as_function(example: Example, cls: type[nn.Module]) -> tuple[Any, tuple[Tensor, ...]]:
    """The layer as a function without memory, of few examples: finite differences are slow."""
    layer = example.made(cls)
    names = [name for name, _ in layer.named_parameters()]
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    few = example.x if example.unbatched else example.x[: min(2, len(example.x))]
    x = few[..., : min(few.shape[-1], 5)] if few.ndim > 2 and example.name != "LayerNorm" else few

    def function(x: Tensor, *values: Tensor) -> Tensor:
        held = {name: value.clone() for name, value in buffers.items()}
        made: Tensor = functional_call(layer, (dict(zip(names, values, strict=True)), held), (x,))
        return made

    given = (x.detach().clone(), *(p.detach().clone() for p in layer.parameters()))
    return function, tuple(t.requires_grad_() for t in given)


def differs_between_modes_as_torchs(example: Example, cls: type[nn.Module]) -> None:
    same, wanted = (
        torch.allclose(layer.train()(example.x), layer.eval()(example.x), **TIGHT)
        for layer in (example.made(cls), example.made(getattr(nn, example.name)))
    )
    need(same == wanted, f"modes give {'equal' if same else 'different'} outputs")


def exchanges_state_dicts(example: Example, cls: type[nn.Module]) -> None:
    ours, theirs = example.made(cls), example.made(getattr(nn, example.name))
    got, wanted = ours.state_dict(), theirs.state_dict()
    need(list(got) == list(wanted), f"keys {list(got)}, torch's {list(wanted)}")
    shapes = {name: value.shape for name, value in wanted.items()}
    need({n: v.shape for n, v in got.items()} == shapes, "other shapes")
    reset(ours)
    ours.load_state_dict(wanted)
    need_close(ours.state_dict(), wanted, "loaded", rtol=0, atol=0)
    theirs.load_state_dict(got)


def moves_between_dtypes(example: Example, cls: type[nn.Module]) -> None:
    for swap in (False, True):
        layer = example.made(cls)
        before = dict(layer.named_parameters())
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            layer.to(torch.float32)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        for name, held in [*layer.named_parameters(), *layer.named_buffers()]:
            need(not held.is_floating_point() or held.dtype == torch.float32, f"{name} stayed")
        kept = all(p is before[n] for n, p in layer.named_parameters())
        need(kept, "its parameters are other objects")
        layer(example.x.float())


def moves_from_meta(example: Example, cls: type[nn.Module]) -> None:
    """Built without memory, given memory, loaded; and loaded by assignment, then moved."""
    wanted = example.made(cls)
    state = wanted.state_dict()
    for assign in (False, True):
        layer = cls(*example.args, **example.kwargs, device="meta", dtype=example.x.dtype)
        if not assign:
            layer.to_empty(device="cpu")
        layer.load_state_dict(copy.deepcopy(state), assign=assign)
        layer.to("cpu").train(example.training)
        left = [n for n, t in _held(layer) if t.device.type != "cpu"]
        need(not left, f"still on meta: {left}")
        twin = copy.deepcopy(wanted)
        need_close(layer(example.x), twin(example.x), "its output", **TIGHT)


def _held(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(), *layer.named_buffers()]


def runs_on_meta(example: Example, cls: type[nn.Module]) -> None:
    layer = example.made(cls).to("meta")
    out = layer(example.x.to("meta"))
    need(out.shape == example.x.shape and out.device.type == "meta", f"got {out.shape}")


def is_stateless_on_demand(example: Example, cls: type[nn.Module]) -> None:
    """Called with a state from outside, complete by torch's names, its own stays."""
    layer = example.made(cls)
    theirs = example.made(getattr(nn, example.name))
    given = {n: t.detach().clone() for n, t in _held(theirs)}
    before = copy.deepcopy(layer.state_dict())
    given = {n: t.view(before[n].shape) for n, t in given.items()}
    out = functional_call(layer, given, (example.x,), strict=True)
    need_close(out, theirs(example.x), "its output", **TIGHT)
    need_close(layer.state_dict(), before, "its own state", rtol=0, atol=0)


def calls_each_hook_once(example: Example, cls: type[nn.Module]) -> None:
    layer, calls = example.made(cls), []
    layer.register_forward_pre_hook(lambda *a: calls.append("before"))
    layer.register_forward_hook(lambda *a: calls.append("after"))
    layer.register_full_backward_pre_hook(lambda *a: calls.append("back"))
    layer.register_full_backward_hook(lambda *a: calls.append("gradients"))
    x = example.x.clone().requires_grad_()
    layer(x).sum().backward()
    need(calls == ["before", "after", "back", "gradients"], f"called {calls}")


def stays_when_frozen(example: Example, cls: type[nn.Module]) -> None:
    layer = example.made(cls).requires_grad_(False)
    x = example.x.clone().requires_grad_()
    layer(x).sum().backward()
    need(x.grad is not None and all(p.grad is None for p in layer.parameters()), "has gradients")


def traces_for_torchscript(example: Example, cls: type[nn.Module]) -> None:
    layer = example.made(cls)
    wanted = copy.deepcopy(layer)(example.x)
    with warnings.catch_warnings():  # of values that the trace keeps: each call is traced anew
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        made = torch.jit.trace(copy.deepcopy(layer), (example.x,), check_trace=False)
    need_close(made(example.x), wanted, "the trace", **TIGHT)


CHECKS: dict[str, Check] = {
    "torch's numbers": gives_torchs_numbers,
    "device and dtype": takes_device_and_dtype,
    "device context": follows_the_device_of_the_context,
    "repr": says_what_it_is,
    "pickle, copy, save": keeps_through_a_pickle,
    "input left alone": leaves_its_input_alone,
    "strides": takes_any_strides,
    "memory format": takes_any_memory_format,
    "gradcheck": has_first_derivatives,
    "gradgradcheck": has_second_derivatives,
    "modes": differs_between_modes_as_torchs,
    "state dict": exchanges_state_dicts,
    "to dtype": moves_between_dtypes,
    "meta, to_empty, assign": moves_from_meta,
    "forward on meta": runs_on_meta,
    "functional_call": is_stateless_on_demand,
    "hooks": calls_each_hook_once,
    "requires_grad off": stays_when_frozen,
    "jit.trace": traces_for_torchscript,
}
_ONLY_IMAGES = ("memory format",)
DERIVATIVES = ("gradcheck", "gradgradcheck")
_CONSTRUCTED = ("device and dtype", "device context", "repr")  # ask nothing of the mode


def _fits(check: str, example: Example) -> bool:
    """Whether the check means anything for the example."""
    if check in _ONLY_IMAGES:
        rows = example.name in ("LayerNorm", "RMSNorm")
        return example.x.ndim in (4, 5) and not example.unbatched and not rows
    if check in DERIVATIVES:
        return not example.empty and not example.lazy and example.gradgrad
    if check in _CONSTRUCTED:
        return example.training
    # A lazy layer has no state before its first input; from then on it is the other class.
    return not (example.lazy and check in ("meta, to_empty, assign", "forward on meta"))


# -- torch's examples ----------------------------------------------------------------------------


def examples(dtype: torch.dtype = torch.float64) -> list[Example]:
    """All examples of norms, for the classes that torch lists and those that it does not."""
    with process_left_alone():
        from torch.testing._internal.common_modules import module_db

        infos = {info.module_cls.__name__: info for info in module_db}
        return [
            *(it for name in LISTED for it in _in_both_modes(infos[name], dtype)),
            *(it for name in BATCH for it in _batch_norms_unlisted(infos[name], dtype)),
            *(it for name in INSTANCE for it in _lazy_instance_norms(infos[name], dtype)),
        ]


def _batch_norms_unlisted(info: Any, dtype: torch.dtype) -> Iterator[Example]:
    for it in _in_both_modes(info, dtype):
        yield replace(it, name=f"Lazy{it.name}", args=it.args[1:], lazy=True)
        yield replace(it, name="SyncBatchNorm")


def _lazy_instance_norms(info: Any, dtype: torch.dtype) -> Iterator[Example]:
    for it in _in_both_modes(info, dtype, partial(info.module_inputs_func, lazy=True)):
        if not it.unbatched:  # of which torch's lazy layers take the second axis for the channels
            yield replace(it, name=f"Lazy{it.name}", lazy=True)


def _in_both_modes(
    info: Any, dtype: torch.dtype, make: Callable[..., Any] | None = None
) -> Iterator[Example]:
    for training in (True, False):
        yield from _of(info, dtype, training, make)


def _of(
    info: Any, dtype: torch.dtype, training: bool, make: Callable[..., Any] | None = None
) -> Iterator[Example]:
    options = {"device": "cpu", "dtype": dtype, "requires_grad": False, "training": training}
    for case in (make or info.module_inputs_func)(info, **options):
        built = case.constructor_input
        (x,) = case.forward_input.args
        yield Example(
            info.module_cls.__name__, built.args, dict(built.kwargs), x, training, case.desc,
            gradgrad=info.supports_gradgrad, unbatched="no_batch_dim" in case.desc,
        )  # fmt: skip


# -- what is refused -----------------------------------------------------------------------------


def _refuses(cls: type[nn.Module], error: Any) -> None:
    """What torch's layer refuses when it is made or called, ours refuses at either."""
    made, called = (
        getattr(error.module_error_input, f"{k}_input") for k in ("constructor", "forward")
    )

    def work() -> None:
        layer = cls(*made.args, **made.kwargs)
        layer.double()(*called.args, **called.kwargs)

    refused(work, error.error_type)


def error_cases() -> list[Case]:
    """Torch's examples of arguments that are refused, by the type of the error."""
    with process_left_alone():
        from torch.testing._internal.common_modules import module_db

        infos = [info for info in module_db if info.module_error_inputs_func is not None]
        return [it for info in infos for it in _refusals(info)]


def _refusals(info: Any) -> Iterator[Case]:
    name = info.module_cls.__name__
    if name not in LISTED:
        return
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": False}
    for error in info.module_error_inputs_func(info, training=True, **options):
        built = error.module_error_input.constructor_input
        example = ", ".join([*map(str, built.args), *map("=".join, _told(built.kwargs))])
        run, theirs = (partial(_refuses, c, error) for c in (ours_of(name), info.module_cls))
        yield Case(SUITE, name, "refused", example, run, theirs)


def _told(kwargs: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in kwargs.items()]


def _asked(check: Check, example: Example, find: Callable[[str], type[nn.Module]]) -> None:
    check(example, find(example.name))


def _is_there(name: str) -> None:
    need(hasattr(truenorm, name), f"truenorm has no {name}")


def lacking() -> set[str]:
    """Classes that torch.nn has and TrueNorm has not."""
    names = {*LISTED, *(f"Lazy{name}" for name in (*BATCH, *INSTANCE))}
    return {name for name in names if not hasattr(truenorm, name)}


def cases(names: Collection[str] = (), *, without: Collection[str] = ()) -> Iterator[Case]:
    """Every check of every example that it fits; only of the classes ``names``, if there are."""
    missing = lacking()
    for name in sorted(missing & set(names) if names else missing):
        yield Case(SUITE, name, "is there", "", partial(_is_there, name))
    for example in examples():
        if example.name in missing or (names and example.name not in names):
            continue
        for name, check in CHECKS.items():
            if name not in without and _fits(name, example):
                run = partial(_asked, check, example, ours_of)
                theirs = partial(_asked, check, example, partial(getattr, nn))
                yield Case(SUITE, example.name, name, str(example), run, theirs)
    yield from (it for it in error_cases() if not names or it.subject in names)
