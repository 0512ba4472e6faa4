"""The compiled kernels, by way of torch's own functions: right, the same on any thread, and gone
when they are given back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
import truenorm
from truenorm.errors import InputError
from truenorm.kernels import build, ops

LIVE = ops.kernels().live
pytestmark = pytest.mark.skipif(not LIVE, reason=f"no kernels: {ops.kernels().reason}")

SHAPES = {
    "planes": (4, 3, 20, 17),
    "planes of more than one part": (3, 2, 300, 150),
    "many channels": (2, 70, 13, 11),
    "small maps": (9, 33, 7, 7),
    "small maps in blocks": (70, 600, 4, 4),
    "rows": (70, 33),
    "many rows": (5000, 40),
    "sequences": (5, 6, 31),
    "volumes": (2, 3, 4, 5, 6),
    "one example": (1, 4, 9, 9),
    "one position": (8, 4, 1, 1),
    "two values": (2, 3),
    "one channel": (5, 1, 12, 12),
}
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def laid_out(x, layout):
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


def drawn(shape, dtype, layout="contiguous", mean=3.0):
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.5, 4, shape[1], dtype=x.dtype).view(-1, *[1] * (len(shape) - 2)) + mean
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    return laid_out(x.to(dtype), layout), g.to(dtype), weight.to(dtype), bias.to(dtype)


def run(x, grad, weight, bias, *, training=True, momentum=0.3):
    """Output, the three gradients and the running statistics of torch's function."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    running = torch.full_like(weight, 2, dtype=wide), torch.full_like(weight, 3, dtype=wide)
    if wide != weight.dtype:
        weight, bias = (t.detach().to(wide).requires_grad_() for t in (weight, bias))
    y = F.batch_norm(x, *running, weight, bias, training, momentum, 1e-5)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad), *running


def right(x, grad, weight, bias, *, training=True, momentum=0.3):
    """The same, in float64 by numpy."""
    x, grad, weight, bias = (t.detach().double().numpy() for t in (x, grad, weight, bias))
    axes, along = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    n = x.size // x.shape[1]
    mean, var = x.mean(axes), x.var(axes)
    running = 0.7 * 2 + 0.3 * mean, 0.7 * 3 + 0.3 * var * n / max(n - 1, 1)
    if not training:
        mean, var, running = (
            np.full_like(mean, 2),
            np.full_like(var, 3),
            (mean * 0 + 2, var * 0 + 3),
        )
    normed = (x - mean.reshape(along)) / np.sqrt(var + 1e-5).reshape(along)
    of_weight, of_bias = (grad * normed).sum(axes), grad.sum(axes)
    inner = grad
    if training:
        inner = grad - of_bias.reshape(along) / n - normed * of_weight.reshape(along) / n
    scale = (weight / np.sqrt(var + 1e-5)).reshape(along)
    y = normed * weight.reshape(along) + bias.reshape(along)
    return y, inner * scale, of_weight, of_bias, *running


def assert_right(got, wanted, tolerance):
    for what, a, b in zip(("y", "dx", "dweight", "dbias", "mean", "var"), got, wanted, strict=True):
        limit = tolerance * max(1, np.abs(b).max())
        assert np.abs(a.detach().double().numpy() - b).max() <= limit, what


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm_and_its_gradients_are_those_of_the_formula(shape, dtype, layout, *, training):
    inputs = drawn(shape, dtype, layout)
    with truenorm.accelerate():
        got = run(*inputs, training=training)
    theirs = run(*inputs, training=training)
    assert_right(got, right(*inputs, training=training), DTYPES[dtype])
    for mine, torchs in zip(got, theirs, strict=True):
        assert mine.dtype == torchs.dtype
        assert mine.stride() == torchs.stride()


@given(
    st.lists(st.integers(1, 7), min_size=0, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(-1e6, 1e6, width=32),
    st.permutations(range(5)),
)
def test_inputs_of_any_shape_and_strides_are_normalized_right(sizes, n, c, mean, order):
    shape = (n, c, *sizes)
    if n * int(np.prod(sizes)) < 2:
        return
    x, grad, weight, bias = drawn(shape, torch.float32, mean=mean)
    axes = [axis for axis in order if axis < len(shape)]
    x = x.permute(axes).contiguous().permute([axes.index(i) for i in range(len(shape))])
    with truenorm.accelerate():
        got = run(x, grad, weight, bias)
    assert_right(got, right(x, grad, weight, bias), 5e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("mean", [1e4, 1e8])
def test_a_large_mean_costs_no_precision(mean, layout):
    inputs = drawn((32, 5, 16, 16), torch.float32, layout, mean)
    wanted = right(*inputs)
    with truenorm.accelerate():
        got = run(*inputs)
    for mine, exact in zip(got[:2], wanted[:2], strict=True):
        error = np.abs(mine.detach().double().numpy() - exact).max()
        assert error < 2e-6 * max(1, np.abs(exact).max())


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 3, 16, 16), "contiguous"),
        ((8, 3, 16, 16), "channels last"),
        ((64, 3, 2, 2), "contiguous"),
        ((64, 3, 2, 2), "channels last"),
        ((2000, 3), "contiguous"),
    ],
    ids=str,
)
def test_extremes_are_normalized_as_in_float64(shape, layout):
    x, grad, weight, bias = drawn(shape, torch.float32, layout, 0.0)
    x[:, 0] = 5.3  # constant
    x[0, 1] = 3e30  # far outside, and its square past float32
    x[:, 2] *= 1e-41  # denormal
    with truenorm.accelerate():
        got = run(x, grad, weight, bias)
    wanted = right(x, grad, weight, bias)
    for c in range(3):
        assert np.abs(got[0].detach().double().numpy() - wanted[0])[:, c].max() < 2e-5, c
    assert torch.equal(got[0][:, 0], bias[0].expand_as(got[0][:, 0]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_spoil_their_channel_alone_as_by_torch(poison):
    x, grad, weight, bias = drawn((8, 3, 9, 9), torch.float32)
    x[2, 1, 3, 3] = poison
    with truenorm.accelerate():
        y, *_, mean, var = run(x, grad, weight, bias)
    theirs, *_, their_mean, their_var = run(x, grad, weight, bias)
    assert torch.equal(y.isnan(), theirs.isnan())
    assert torch.equal(mean.isfinite(), their_mean.isfinite())
    assert torch.equal(var.isfinite(), their_var.isfinite())


THREADS = """
import sys, json, hashlib, torch, torch.nn.functional as F, truenorm
torch.set_num_threads(int(sys.argv[1]))
truenorm.accelerate()
found = []
for shape in json.loads(sys.argv[2]):
    torch.manual_seed(0)
    x, g = (torch.randn(shape) for _ in range(2))
    for last in (False, True)[: 2 if len(shape) == 4 else 1]:
        if last:
            x = x.to(memory_format=torch.channels_last)
        x.grad = None
        x.requires_grad_()
        w = torch.ones(shape[1], requires_grad=True)
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y = F.batch_norm(x, mean, var, w, w, True)
        parts = (y, *torch.autograd.grad(y, (x, w), g), mean, var)
        found += [hashlib.sha1(p.detach().contiguous().numpy()).hexdigest() for p in parts]
        x = x.detach()
print(json.dumps(found))
"""


def test_results_do_not_depend_on_the_number_of_threads():
    shapes = [(4, 2, 300, 150), (16, 24, 28, 28), (64, 256, 7, 7), (20000, 24), (5, 7, 40, 40)]
    found = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", THREADS, str(count), json.dumps(shapes)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for count in (1, 2, 3, 4)
    }
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(3, 2, 3, 4), (5, 3), (2, 2, 13, 11)], ids=str)
def test_gradients_and_their_gradients_are_those_of_differences(shape):
    x, _, weight, bias = (t.requires_grad_() for t in drawn(shape, torch.float64))

    def call(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, True)

    with truenorm.accelerate():
        assert torch.autograd.gradcheck(call, (x, weight, bias))
        assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_torchs_kernels_are_back_after_the_last_user():
    x = torch.randn(6, 4, 9, 9)
    layer = nn.BatchNorm2d(4)
    before = layer(x)
    outer = truenorm.accelerate()
    ours = layer(x)
    with truenorm.accelerate() as inner:
        assert inner.live
        assert not inner.reason
    assert not inner.live
    assert torch.equal(layer(x), ours)
    outer.undo()
    outer.undo()  # once is enough, and twice no error
    assert torch.equal(layer(x), before)


def test_threads_share_the_switch():
    x, layer, wrong = torch.randn(6, 4, 9, 9), nn.BatchNorm2d(4), []

    def use():
        for _ in range(50):
            with truenorm.accelerate():
                wrong.extend([] if torch.isfinite(layer(x)).all() else [1])

    together = [threading.Thread(target=use) for _ in range(4)]
    [t.start() for t in together]
    [t.join() for t in together]
    assert not wrong
    assert ops._USERS._count == 0


def test_nobody_is_warned_that_kernels_are_replaced():
    code = "import truenorm, torch; truenorm.accelerate(); torch.nn.BatchNorm1d(2)(torch.eye(2))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize(
    "around",
    [
        "torch.func.grad(lambda x: layer(x).sum() + torch.func.functional_call("
        "layer, {'weight': x[0, :, 0, 0]}, y).sum())(y)",
        "FakeTensorMode().__enter__(); truenorm.accelerate()",
        "torch.inference_mode().__enter__(); layer(y)",
    ],
    ids=["torch.func", "fake tensors", "inference mode"],
)
def test_the_kernels_load_wherever_they_are_first_used(around):
    code = (
        "import torch, truenorm\n"
        "from torch._subclasses import FakeTensorMode\n"
        "from truenorm.kernels import ops\n"
        "layer, y = truenorm.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4)\n"
        f"{around}\n"
        "assert ops.kernels().live\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("choice", "live"), [("torch", False), ("auto", True), ("baseline", True)], ids=str
)
def test_the_environment_chooses_the_kernels(choice, live, monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, choice)
    found = ops.kernels.__wrapped__()
    try:
        assert found.live is live
        assert (found.instructions == choice) is (choice == "baseline")
        assert bool(found.reason) is not live
    finally:
        monkeypatch.setenv(ops.VARIABLE, "auto")
        ops.kernels.__wrapped__()


def test_kernels_that_are_not_there_are_refused_by_name(monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "x86-64-v9")
    with pytest.raises(InputError, match=r"auto, torch, .*'x86-64-v9'"):
        ops.kernels.__wrapped__()


@pytest.mark.parametrize("instructions", ["x86-64-v3", "baseline"])
def test_every_instruction_set_computes_the_same_norm(instructions, monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, instructions)
    try:
        found = ops.kernels.__wrapped__()
    except InputError:
        pytest.skip(f"this processor does not run {instructions}")
    try:
        assert found.instructions == instructions
        for shape in SHAPES.values():
            for dtype, tolerance in DTYPES.items():
                inputs = drawn(shape, dtype)
                with truenorm.accelerate():
                    assert_right(run(*inputs), right(*inputs), tolerance)
    finally:
        monkeypatch.setenv(ops.VARIABLE, "auto")
        ops.kernels.__wrapped__()


def test_a_layer_used_twice_before_its_backward_learns_from_both():
    layer, theirs = truenorm.BatchNorm2d(3), nn.BatchNorm2d(3)
    for one in (layer, theirs):
        torch.manual_seed(1)
        (one(torch.randn(4, 3, 5, 5)) + one(torch.randn(4, 3, 5, 5))).square().sum().backward()
    assert torch.allclose(layer.weight.grad, theirs.weight.grad, rtol=1e-4)
    assert torch.allclose(layer.running_var, theirs.running_var)


def test_without_a_compiler_the_reason_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main() == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_the_reference_agrees_with_the_formula_here():
    x, grad, *_ = drawn((6, 3, 4, 4), torch.float64)
    one, zero = torch.ones(3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
    y, dx, of_weight, of_bias, *_ = right(x, grad, one, zero)
    theirs = reference.batch_norm_with_gradients(x.numpy(), grad.numpy())[2:]
    for mine, other in zip((y, dx, of_weight, of_bias), theirs, strict=True):
        assert np.allclose(mine, other)
