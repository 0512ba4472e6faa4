"""What torch does to modules, done to our layers: compiled, traced, vmapped, pruned, hooked.

The kinds are those of torch's test/dynamo, test/functorch, test/export, test_fx.py,
nn/test_parametrization.py, nn/test_pruning.py, nn/test_lazy_modules.py, test_stateless.py,
test_module_hooks.py, optim/test_swa_utils.py, test_jit.py, quantization/ and fsdp's meta start, in
words of our own. Each is asked of a batch norm with each option, and of the other norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune

import truenorm
from conformance.cases import Case, need, need_close

SUITE = "torch systems"
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-4, "atol": 1e-4}

Make = Callable[..., nn.Module]


def _renorm() -> truenorm.Renorm:
    return truenorm.Renorm(rmax=1.5, dmax=0.5, start=0, rmax_at=2, dmax_at=2)


# A batch norm with each option; each also takes more arguments.
KINDS: dict[str, Make] = {
    "default": truenorm.BatchNorm2d,
    "ghost": partial(truenorm.BatchNorm2d, ghost=2),
    "renorm": partial(truenorm.BatchNorm2d, renorm=_renorm()),
    "min_count": partial(truenorm.BatchNorm2d, min_count=4),
    "act": partial(truenorm.BatchNorm2d, act="relu"),
    "frozen": partial(truenorm.BatchNorm2d, frozen=True),
    "commit": partial(truenorm.BatchNorm2d, commit="step"),
    "sync": partial(truenorm.BatchNorm2d, sync=True),
    "no affine map": partial(truenorm.BatchNorm2d, affine=False),
    "no statistics": partial(truenorm.BatchNorm2d, track_running_stats=False),
    "cumulative": partial(truenorm.BatchNorm2d, momentum=None),
}
OTHERS: dict[str, Make] = {
    "GroupNorm": partial(truenorm.GroupNorm, 2),
    "InstanceNorm2d": partial(truenorm.InstanceNorm2d, affine=True),
    "RMSNorm": truenorm.RMSNorm,
    "LayerNorm": lambda channels, **more: truenorm.LayerNorm([channels, 3, 3], **more),
}

# torch's layer of the same kind, where it has one.
TORCHS: dict[str, Make] = {
    "default": nn.BatchNorm2d,
    "no affine map": partial(nn.BatchNorm2d, affine=False),
    "no statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "cumulative": partial(nn.BatchNorm2d, momentum=None),
    "GroupNorm": partial(nn.GroupNorm, 2),
    "InstanceNorm2d": partial(nn.InstanceNorm2d, affine=True),
    "LayerNorm": lambda channels, **more: nn.LayerNorm([channels, 3, 3], **more),
}


def image(*, n: int = 6, side: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 4, side, side, generator=generator, dtype=dtype) * 2 + 1


def layer_of(make: Make, *, training: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """A layer of four channels with parameters and statistics of its own."""
    layer = make(4).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for held in (*layer.parameters(), *layer.buffers()):
            if held.is_floating_point():
                held.copy_(0.5 + torch.rand(held.shape, generator=generator))
    return layer.train(training)


def same_state(ours: nn.Module, wanted: nn.Module, **tolerance: float) -> None:
    need_close(dict(ours.state_dict()), dict(wanted.state_dict()), "state", **tolerance)


# -- the compiler --------------------------------------------------------------------------------


def compiles(make: Make, *, training: bool, masked: bool = False, big: bool = False) -> None:
    """``torch.compile(fullgraph=True)``: no graph break, the same numbers, the same statistics."""
    torch._dynamo.reset()
    dtype = torch.float32 if big else torch.float64
    tolerance = SINGLE if big else TIGHT
    x = image(n=4, side=100, dtype=dtype) if big else image()
    mask = {"mask": torch.rand(x.shape[0], *x.shape[2:]) > 0.3} if masked else {}
    eager, layer = (layer_of(make, training=training, dtype=dtype) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 0.5):
        ours, theirs = ((x * factor).requires_grad_() for _ in range(2))
        out, wanted = compiled(ours, **mask), eager(theirs, **mask)
        need_close(out, wanted, "output", **tolerance)
        out.square().sum().backward()
        wanted.square().sum().backward()
        need_close(ours.grad, theirs.grad, "gradient", **tolerance)
    if isinstance(layer, truenorm.BatchNorm):
        layer.commit()
        eager.commit()
    same_state(layer, eager, **tolerance)


def makes_fx(make: Make, *, mode: str) -> None:
    layer, x = layer_of(make), image()
    twin = copy.deepcopy(layer)
    state = {name: held.detach().clone() for name, held in twin.state_dict().items()}

    def function(state: Any, x: Tensor) -> Any:
        return functional_call(twin, state, (x,))

    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(dict(state), x)
    given = {name: held.clone() for name, held in layer.state_dict().items()}
    need_close(graph(given, x), layer(x), "the graph's output", **TIGHT)


def exports(make: Make, *, training: bool) -> None:
    layer, x = layer_of(make, training=training), image()
    wanted = copy.deepcopy(layer)(x)
    program = torch.export.export(copy.deepcopy(layer), (x,))
    need_close(program.module()(x), wanted, "the program's output", **TIGHT)


def traces_by_fx(make: Make) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer_of(make)).double()
    graph = torch.fx.symbolic_trace(model)
    need_close(copy.deepcopy(graph)(image()), copy.deepcopy(model)(image()), "output", **TIGHT)


def scripts(make: Make) -> None:
    layer = layer_of(make, training=False)
    need_close(torch.jit.script(layer)(image()), layer(image()), "the script", **TIGHT)


def runs_under_fake_tensors(make: Make) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = make(4)(torch.randn(6, 4, 3, 3))
    need(out.shape == (6, 4, 3, 3), f"shape {tuple(out.shape)}")


def runs_on_meta(make: Make, *, masked: bool) -> None:
    x = image().to("meta")
    mask = {"mask": torch.ones(6, 3, 3, dtype=torch.bool, device="meta")} if masked else {}
    out = layer_of(make).to("meta")(x, **mask)
    need(out.shape == x.shape and out.device.type == "meta", f"got {tuple(out.shape)}")


def casts_by_itself(make: Make) -> None:
    """Under autocast the dtype of the output is that of torch's layer."""
    x = image(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [
            (layer_of(make, dtype=torch.float32)(x.to(dtype)), dtype)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    need(all(out.dtype == dtype for out, dtype in outs), f"{[(o.dtype, d) for o, d in outs]}")


# -- functorch -----------------------------------------------------------------------------------


def ensembles(make: Make, *, training: bool) -> None:
    """Three layers under ``vmap``, each with a state of its own."""
    layers = [layer_of(make, training=training) for _ in range(3)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for p in layer.parameters():
                p.add_(number)
    xs = torch.stack([image() * (1 + i) for i in range(3)])
    wanted = torch.stack([copy.deepcopy(m)(x) for m, x in zip(layers, xs, strict=True)])
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    base = copy.deepcopy(layers[0])

    def call(parameters: Any, buffers: Any, x: Tensor) -> Any:
        return functional_call(base, (parameters, buffers), (x,))

    out = vmap(call)(parameters, buffers, xs)
    need_close(out, wanted, "output of the ensemble", **TIGHT)


def has_function_gradients(make: Make) -> None:
    layer, x = layer_of(make), image()
    twin = copy.deepcopy(layer)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    buffers = {n: b.clone() for n, b in layer.named_buffers()}

    def loss(parameters: Any, x: Tensor) -> Any:
        held = {n: b.clone() for n, b in buffers.items()}
        return functional_call(layer, (parameters, held), (x,)).square().sum()

    given = x.clone().requires_grad_()
    got = grad(loss, argnums=1)(parameters, x)
    twin(given).square().sum().backward()
    need_close(got, given.grad, "gradient of the input", **TIGHT)


def gives_each_examples_gradient(make: Make) -> None:
    """With the running statistics an example's gradient depends on no other."""
    layer, x = layer_of(make, training=False), image()
    got = vmap(grad(lambda one: layer(one[None]).square().sum()))(x)
    given = x.clone().requires_grad_()
    layer(given).square().sum().backward()
    need_close(got, given.grad, "gradients", **TIGHT)


def has_jacobians(make: Make) -> None:
    layer, x = layer_of(make, training=False), image(n=1, side=3)
    got = jacrev(layer)(x)
    wanted = torch.autograd.functional.jacobian(layer, x)
    need_close(got, wanted, "jacobian", **TIGHT)


def loses_its_statistics_for_functorch(make: Make) -> None:
    from torch.func import replace_all_batch_norm_modules_

    model = nn.Sequential(layer_of(make)).double()
    replace_all_batch_norm_modules_(model)
    try:
        vmap(model, randomness="error")(torch.stack([image(), image()]))
    except truenorm.InputError as error:  # an option that needs them may say so
        need("running statistics" in str(error), str(error))


# -- parameters that are moved -------------------------------------------------------------------


class _Twice(nn.Module):
    """y = 2 x."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def _trained(layer: nn.Module, x: Tensor) -> None:
    """One step of training, and one forward in each mode."""
    layer.train()
    layer(x.clone().requires_grad_()).square().sum().backward()
    found = [p for p in layer.parameters() if p.requires_grad]
    if found:
        optimizer = torch.optim.SGD(found, 0.01)
        if getattr(layer, "options", None) is not None and layer.options.commit == "step":
            truenorm.attach(optimizer, layer)
        optimizer.step()
    layer(x)
    layer.eval()(x)


def takes_a_parametrization(make: Make) -> None:
    layer, plain = layer_of(make), layer_of(make)
    parametrize.register_parametrization(layer, "weight", _Twice())
    need_close(layer(image()), plain(image()), "output", **TIGHT)
    _trained(layer, image())
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    wanted = twin.eval()(image())  # before: both share the class that goes with it
    parametrize.remove_parametrizations(layer, "weight")
    need_close(layer.eval()(image()), wanted, "once removed", **TIGHT)


def takes_weight_norm(make: Make) -> None:
    layer, plain = layer_of(make), layer_of(make)
    parametrizations.weight_norm(layer, "weight")
    need_close(layer(image()), plain(image()), "output", **TIGHT)
    _trained(layer, image())


def is_pruned(make: Make) -> None:
    layer = layer_of(make)
    least = int(layer.weight.abs().flatten().argmin())
    prune.l1_unstructured(layer, "weight", 1)
    _trained(layer, image())
    need(layer.weight.flatten()[least] == 0, "the least weight is not zero")
    prune.remove(layer, "weight")
    need(layer.weight.flatten()[least] == 0, "the least weight came back")
    _trained(layer, image())


def is_pruned_by_a_mask(make: Make) -> None:
    layer = layer_of(make)
    for name in dict(layer.named_parameters()):
        prune.custom_from_mask(layer, name, torch.zeros_like(getattr(layer, name)))
    _trained(layer, image())


def takes_a_plain_tensor_for_a_parameter(make: Make) -> None:
    """As some optimizers of hyperparameters do: the parameter is deleted, a tensor set."""
    layer, x = layer_of(make), image()
    plain = copy.deepcopy(layer)
    for name, value in dict(layer.named_parameters()).items():
        delattr(layer, name)
        setattr(layer, name, value.detach() * 1)
    need_close(layer(x), plain(x), "output", **TIGHT)


# -- hooks, checkpoints, averages ----------------------------------------------------------------


def hooks_may_change_what_passes(make: Make) -> None:
    layer, plain = layer_of(make), layer_of(make)
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    layer.register_forward_hook(lambda m, args, out: out + 1)
    need_close(layer(image()), plain(image() * 3) + 1, "output", **TIGHT)


def global_hooks_see_it(make: Make) -> None:
    layer, seen = layer_of(make), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        layer(image())
    finally:
        handle.remove()
    need(seen == [layer], f"seen {len(seen)} modules")


def keyword_input_is_taken(make: Make) -> None:
    layer, plain = layer_of(make), layer_of(make)
    name = "x" if isinstance(layer, truenorm.RMSNorm) else "input"
    need_close(layer(**{name: image()}), plain(image()), "output", **TIGHT)


def checkpoints_count_once(make: Make, *, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer, plain = layer_of(make), layer_of(make)
    x = image().requires_grad_()
    out = checkpoint(layer, x, use_reentrant=reentrant)
    out.square().sum().backward()
    y = image().requires_grad_()
    plain(y).square().sum().backward()
    need_close(x.grad, y.grad, "gradient", **TIGHT)
    same_state(layer, plain, **TIGHT)


def update_bn_gives_the_mean_over_batches(make: Make) -> None:
    """``swa_utils.update_bn``: cumulative averages over the data, and momentum as before."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    averaged, theirs = (AveragedModel(m) for m in (layer_of(make), _torch_twin(make)))
    data = [image() * f for f in (1.0, 2.0, 0.5)]
    for model in (averaged, theirs):
        update_bn(data, model)
    ours, wanted = averaged.module, theirs.module
    for name in ("running_mean", "running_var"):
        need_close(getattr(ours, name), getattr(wanted, name), name, **TIGHT)
    need(ours.momentum == wanted.momentum, f"momentum {ours.momentum}")


def _torch_twin(make: Make) -> nn.Module:
    """torch's layer with the momentum and statistics of ``make``'s."""
    ours = layer_of(make)
    theirs = nn.BatchNorm2d(4, momentum=ours.momentum, affine=ours.weight is not None).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs.train()


def is_loaded_by_assignment(make: Make) -> None:
    with torch.device("meta"):
        layer = make(4, dtype=torch.float64)
    given = layer_of(make)
    layer.load_state_dict(copy.deepcopy(given.state_dict()), assign=True)
    layer.to("cpu").train()
    need_close(layer(image()), given(image()), "output", **TIGHT)


def has_the_error_of_a_missing_attribute(make: Make) -> None:
    layer = layer_of(make)
    del layer.training
    try:
        layer(image())
    except AttributeError:
        return
    except Exception as error:
        need(False, f"{type(error).__name__} where torch has AttributeError")


# -- torch's own converters ----------------------------------------------------------------------


def is_fused_by_torch_or_refused(make: Make) -> None:
    """``fuse_conv_bn_eval`` gives the same function, or an error: never another function."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    conv, layer = nn.Conv2d(4, 4, 1).double().eval(), layer_of(make, training=False)
    try:
        fused = fuse_conv_bn_eval(conv, layer)
    except Exception as error:
        need(bool(str(error)), f"{type(error).__name__} without a word")
        return
    need_close(fused(image()), layer(conv(image())), "the fused layer", **TIGHT)


def is_made_sync_by_torch_or_refused(make: Make) -> None:
    """``convert_sync_batchnorm`` keeps what the layer computes in evaluation, or raises."""
    layer = layer_of(make, training=False)
    wanted = copy.deepcopy(layer)(image())
    try:
        made = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer)).eval()
    except ValueError as error:
        need(bool(str(error)), "an error without a word")
        return
    need_close(made(image()), wanted, "the converted layer", **TIGHT)


def is_quantized_by_eager_torch(make: Make) -> None:
    """``fuse_modules`` of convolution and norm: the same function."""
    from torch.ao.quantization import fuse_modules

    model = nn.Sequential(nn.Conv2d(4, 4, 1).double(), layer_of(make)).eval()
    fused = fuse_modules(model, ["0", "1"])
    need(isinstance(fused[1], nn.Identity), f"passed by: {type(fused[1]).__name__}")
    need_close(fused(image()), model(image()), "the fused model", **TIGHT)


# -- all of it -----------------------------------------------------------------------------------

Check = Callable[[Make], None]
SLOW: dict[str, Check] = {
    "compile, training": partial(compiles, training=True),
    "compile, evaluation": partial(compiles, training=False),
    "compile, mask": partial(compiles, training=True, masked=True),
    "compile, 40,000 values a channel": partial(compiles, training=True, big=True),
    "export, training": partial(exports, training=True),
    "export, evaluation": partial(exports, training=False),
    "make_fx, symbolic": partial(makes_fx, mode="symbolic"),
}
QUICK: dict[str, Check] = {
    "make_fx, real": partial(makes_fx, mode="real"),
    "make_fx, fake": partial(makes_fx, mode="fake"),
    "fx.symbolic_trace": traces_by_fx,
    "jit.script": scripts,
    "fake tensors": runs_under_fake_tensors,
    "meta": partial(runs_on_meta, masked=False),
    "meta, mask": partial(runs_on_meta, masked=True),
    "autocast": casts_by_itself,
    "vmap ensemble, training": partial(ensembles, training=True),
    "vmap ensemble, evaluation": partial(ensembles, training=False),
    "func.grad": has_function_gradients,
    "per-example gradients": gives_each_examples_gradient,
    "jacrev": has_jacobians,
    "replace_all_batch_norm_modules_": loses_its_statistics_for_functorch,
    "parametrization": takes_a_parametrization,
    "weight_norm": takes_weight_norm,
    "prune, l1": is_pruned,
    "prune, mask": is_pruned_by_a_mask,
    "tensor as parameter": takes_a_plain_tensor_for_a_parameter,
    "hooks that change": hooks_may_change_what_passes,
    "global hook": global_hooks_see_it,
    "keyword input": keyword_input_is_taken,
    "checkpoint": partial(checkpoints_count_once, reentrant=False),
    "checkpoint, reentrant": partial(checkpoints_count_once, reentrant=True),
    "swa update_bn": update_bn_gives_the_mean_over_batches,
    "load by assignment": is_loaded_by_assignment,
    "training deleted": has_the_error_of_a_missing_attribute,
    "fuse_conv_bn_eval": is_fused_by_torch_or_refused,
    "convert_sync_batchnorm": is_made_sync_by_torch_or_refused,
    "fuse_modules": is_quantized_by_eager_torch,
}
_OF_BATCH_NORMS = (
    "replace_all_batch_norm_modules_",
    "swa update_bn",
    "fuse_conv_bn_eval",
    "convert_sync_batchnorm",
    "fuse_modules",
    "training deleted",
)
_OF_WEIGHTS = ("parametrization", "weight_norm", "prune, l1", "prune, mask")
_OF_PLACES = ("compile, mask", "compile, 40,000 values a channel", "meta, mask")
_TRACKING = ("swa update_bn", "fuse_conv_bn_eval", "fuse_modules")
_OF_ONE_EXAMPLE = ("per-example gradients", "jacrev")


def _fits(check: str, kind: str) -> bool:
    """Whether the check means anything for the layer."""
    if kind in OTHERS:
        unfit = _OF_PLACES if kind == "LayerNorm" else ()  # its shape is that of all places
        return check not in (*_OF_BATCH_NORMS, *unfit)
    if kind == "no statistics":  # it has none to be replaced, and one example depends on others
        return check not in (*_TRACKING, *_OF_ONE_EXAMPLE)
    if kind == "frozen":  # its statistics never move, and it has no parameters
        return check not in ("swa update_bn", *_OF_WEIGHTS)
    return kind != "no affine map" or check not in _OF_WEIGHTS


def cases(*, slow: bool = True) -> Iterator[Case]:
    """Each check of each layer that it fits; ``slow``: those of the compiler, too."""
    checks = (SLOW | QUICK) if slow else QUICK
    for kind, make in (KINDS | OTHERS).items():
        subject = kind if kind in OTHERS else f"BatchNorm2d ({kind})"
        theirs = TORCHS.get(kind)
        for name, check in checks.items():
            if _fits(name, kind):
                twin = None if theirs is None or name.endswith(", mask") else partial(check, theirs)
                yield Case(SUITE, subject, name, "", partial(check, make), twin)
