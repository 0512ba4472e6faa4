"""PyTorch's own cases of batch norm, and what its users combine it with, on the kernels.

The cases are in torch's wheel (``op_db``, ``module_db``); what its test suite asks of layouts and
mixed dtypes is put into words of ours.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import truenorm
from conformance.process import process_left_alone
from truenorm.kernels import ops

pytestmark = pytest.mark.skipif(
    not ops.kernels().live, reason=f"no kernels: {ops.kernels().reason}"
)

OPERATORS = (
    "nn.functional.batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
)
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(scope="module")
def operators():
    """PyTorch's entry for each operator, by its name."""
    with process_left_alone():
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.name: op for op in op_db if op.name in OPERATORS and not op.variant_test_name}


@pytest.fixture(scope="module")
def modules():
    """PyTorch's entry for each batch norm of torch.nn."""
    with process_left_alone():
        from torch.testing._internal.common_modules import module_db
    return [
        info for info in module_db if issubclass(info.module_cls, nn.modules.batchnorm._NormBase)
    ]


@pytest.fixture
def on_kernels():
    with truenorm.accelerate():
        yield


def tensors_in(found):
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t.numel()]


def gradients(found, leaves):
    outs = [out for out in tensors_in(found) if out.requires_grad]
    if not outs:
        return ()
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    total = sum((o * w).sum() for o, w in zip(outs[:1], weights[:1], strict=True))
    return torch.autograd.grad(total, leaves, allow_unused=True)


def asked(op, sample):
    """Output, gradients and what was written into the arguments."""
    sample = sample.transform(
        lambda t: (
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
        )
    )
    given = [sample.input, *sample.args, *sample.kwargs.values()]
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    found = op(sample.input, *sample.args, **sample.kwargs)
    written = [t for t in given if isinstance(t, torch.Tensor) and not t.requires_grad]
    return [*tensors_in(found), *gradients(found, leaves), *written]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_torchs_operators_give_what_torch_gives(name, dtype, operators):
    op = operators[name]
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        wanted = asked(op.op, sample)
        with truenorm.accelerate():
            found = asked(op.op, sample)
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, **TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_their_gradients_are_those_of_differences(name, operators, on_kernels):
    op = operators[name]
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        if sample.input.numel() > 200 or not sample.input.numel():
            continue

        def call(x, sample=sample):
            sample = sample.transform(lambda t: t.clone() if isinstance(t, torch.Tensor) else t)
            found = op.op(x, *sample.args, **sample.kwargs)
            return found[0] if isinstance(found, tuple) else found

        assert torch.autograd.gradcheck(call, (sample.input,))
        assert torch.autograd.gradgradcheck(call, (sample.input,))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_torchs_modules_give_what_torch_gives(dtype, training, modules):
    assert len(modules) >= 3
    for info in modules:
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
        for given in inputs:
            made = given.constructor_input
            layer = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
            (x,) = given.forward_input.args
            results = []
            for run in (ops.use("torch"), truenorm.accelerate()):
                own, leaf = copy.deepcopy(layer), x.detach().clone().requires_grad_()
                with run:
                    y = own(leaf)
                    y.square().sum().backward()
                of = [p.grad for p in own.parameters()]
                results.append([y, leaf.grad, *of, *own.buffers()])
            for got, expected in zip(*reversed(results), strict=True):
                torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "float32 parameters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1), (4, 8, 2, 10, 10), (4, 1, 2, 9, 9)],
    ids=str,
)
def test_channels_last_comes_out_as_it_went_in_and_is_the_same_norm(
    shape, dtype, mixed, on_kernels
):
    layer = nn.BatchNorm2d(shape[1]) if len(shape) == 4 else nn.BatchNorm3d(shape[1])
    nn.init.uniform_(layer.weight)
    layer = layer if mixed else layer.to(dtype)
    x, g = torch.randn(2, *shape).to(dtype)
    found = []
    for layout in (FORMATS[len(shape)], torch.contiguous_format):
        own, leaf = copy.deepcopy(layer), x.contiguous(memory_format=layout).requires_grad_()
        y = own(leaf)
        assert y.is_contiguous(memory_format=layout)
        y.backward(g.contiguous(memory_format=layout))
        found.append((y, leaf.grad, own.weight.grad, own.bias.grad, own.running_var))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


# -- what it is combined with --------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def both(work):
    """What ``work(model, x)`` gives on the kernels and on torch's."""
    found = []
    for run in (truenorm.accelerate(), ops.use("torch")):
        model, x = net(), torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        if work is not in_bfloat16:  # whose rounding is far above that of sums
            model, x = model.double(), x.double()
        with run:
            found.append([t.detach() for t in work(model, x)])
    return zip(*found, strict=True)


def plainly(model, x):
    y = model(x)
    y.square().sum().backward()
    return y, *(p.grad for p in model.parameters()), *model.buffers()


def checkpointed(model, x):
    y = checkpoint(model, x, use_reentrant=False)
    y.square().sum().backward()
    return y, *(p.grad for p in model.parameters())


def in_bfloat16(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return y, *(p.grad for p in model.parameters()), *model.buffers()


def hooked(model, x):
    seen = []
    norm = model[1]
    norm.register_forward_hook(lambda m, args, out: seen.append(out) or out * 2)
    norm.register_full_backward_hook(lambda m, of_in, of_out: seen.extend((*of_in, *of_out)))
    return *plainly(model, x), *seen


def per_example(model, x):
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, x[None]).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    return tuple(found.values())


def twice_differentiated(model, x):
    x.requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return first, *torch.autograd.grad(first.square().sum(), model.parameters())


def compiled(model, x):
    return plainly(torch.compile(model, backend="aot_eager"), x)


def counted(model, x):
    with FlopCounterMode(display=False) as counter:
        found = plainly(model, x)
    return *found, torch.tensor(counter.get_total_flops())


WAYS = (
    plainly,
    checkpointed,
    in_bfloat16,
    hooked,
    per_example,
    twice_differentiated,
    compiled,
    counted,
)


@pytest.mark.parametrize("work", WAYS)
def test_what_torch_combines_it_with_gives_the_same(work):
    tolerance = TOLERANCE[torch.bfloat16 if work is in_bfloat16 else torch.float64]
    for got, expected in both(work):
        limit = {**tolerance, "atol": tolerance["atol"] * max(1.0, float(expected.abs().max()))}
        torch.testing.assert_close(got, expected, **limit)


# -- accuracy ------------------------------------------------------------------------------------

KINDS = {
    "random": lambda x: x,
    "a constant channel": lambda x: torch.where(torch.arange(x.shape[1]).view(
        1, -1, *[1] * (x.ndim - 2)) == 1, 7.3, x),
    "mean 1e4": lambda x: x + 1e4,
    "mean 1e8": lambda x: x + 1e8,
    "an outlier": lambda x: x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e18)),
    "denormals": lambda x: x * 1e-40,
    "tiny": lambda x: x * 1e-18,
    "large": lambda x: x * 1e17,
}  # fmt: skip
GRID = ((64, 8), (16, 4, 9, 9), (5, 3, 40, 41), (3000, 6), (6, 5, 31))


def exactly(x, g, weight, bias):
    """The output and x's gradient, by numpy in its longest floats."""
    x, g, weight, bias = (
        t.detach().double().numpy().astype(np.longdouble) for t in (x, g, weight, bias)
    )
    axes, along = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    mean = x.mean(axes, keepdims=True)
    mean = mean + (x - mean).mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(np.square(x - mean).mean(axes, keepdims=True) + 1e-5)
    normed = (x - mean) * inverse
    inner = g - g.mean(axes, keepdims=True) - normed * (g * normed).mean(axes, keepdims=True)
    return normed * weight.reshape(along) + bias.reshape(along), (
        inner * inverse * weight.reshape(along)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_error_is_no_larger_than_torchs(kind, last, dtype):
    for shape in GRID:
        if last and len(shape) != 4:
            continue
        generator = torch.Generator().manual_seed(2)
        x, g = torch.randn(2, *shape, generator=generator)
        x = KINDS[kind](x).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = torch.randn(2, shape[1], generator=generator, dtype=wide)
        errors = []
        wanted = exactly(x, g.to(dtype), weight, bias)
        for run in (truenorm.accelerate(), ops.use("torch")):
            leaf = x.detach().requires_grad_()
            with run:
                y = nn.functional.batch_norm(leaf, None, None, weight, bias, True, 0.1, 1e-5)
                (dx,) = torch.autograd.grad(y, leaf, g.to(dtype))
            found = (t.detach().double().numpy() for t in (y, dx))
            errors.append([np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)])
        for ours, theirs, exact in zip(*errors, wanted, strict=True):
            rounding = torch.finfo(dtype).eps * np.abs(exact).max()
            if kind == "mean 1e4":  # what float64 cannot hold of it, a standard deviation being 1
                rounding += 1e4 * 2.0**-53
            assert ours <= theirs + 2 * rounding or not np.isfinite(theirs), (shape, ours, theirs)


def test_more_than_2_to_the_24_values_a_channel_are_all_counted(on_kernels):
    count = 2**24 + 2**20
    for shape in ((2, 1, count // 2), (count, 1)):
        x = torch.ones(shape)
        x.view(-1)[::2] = 3.0
        leaf, running = x.requires_grad_(), (torch.zeros(1), torch.ones(1))
        y = nn.functional.batch_norm(leaf, *running, training=True, momentum=1.0)
        assert running[0].item() == 2.0
        assert running[1].item() == pytest.approx(count / (count - 1), rel=1e-7)
        (dx,) = torch.autograd.grad(y, leaf, torch.full_like(y, 0.5))
        assert float(dx.abs().max()) < 1e-7


# -- memory --------------------------------------------------------------------------------------


def in_use():
    """Bytes that malloc has given out and not got back."""
    import ctypes

    class Told(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost")]  # fmt: skip

    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        pytest.skip("this libc does not tell what it has given out")
    ask.restype = Told
    told = ask()
    return told.uordblks + told.hblkhd


def test_ten_thousand_calls_leave_nothing_behind():
    layers = (
        nn.BatchNorm1d(64),
        truenorm.BatchNorm1d(64, act="silu"),
        truenorm.BatchNorm1d(64, ghost=4, renorm=truenorm.Renorm(start=0), momentum=0.2),
    )
    x, mask = torch.randn(8, 64), torch.tensor([True] * 7 + [False])

    def work(times):
        for layer, _ in itertools.product(layers, range(times)):
            leaf = x.clone().requires_grad_()
            out = layer(leaf) if isinstance(layer, nn.BatchNorm1d) else layer(leaf, mask)
            torch.autograd.grad(out.sum(), (leaf, layer.weight))
            with torch.no_grad():
                layer(x)

    with truenorm.accelerate():
        work(200)
        before = in_use()
        work(10_000 // 3)
        # The least that a call could lose is a cell of torch's stack, 32 bytes of malloc's.
        assert in_use() - before < 10_000 * 32 / 2
