from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import reference
import truenorm as tn
from truenorm.layers import functional, kernel

LAYERS = {2: tn.BatchNorm1d, 3: tn.BatchNorm1d, 4: tn.BatchNorm2d, 5: tn.BatchNorm3d}
TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "examples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}
WAYS = {
    "plain": {},
    "step": {"commit": "step"},
    "ghost": {"ghost": 1 << 30},
    "min_count": {"min_count": 2},
}


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def errors(x, options, masked=False, grad=None, run=None):
    """How far one training forward and backward of a float32 layer is from the reference.

    Of the variance relative to var + eps; of the mean in standard deviations, past the rounding of
    float32; of the output absolute; of the gradients relative to the largest that could be.
    """
    layer = LAYERS[x.ndim](x.shape[1], momentum=1.0, **options)
    grad = normal(*x.shape, seed=1) if grad is None else grad
    seen = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mask = torch.ones(len(x), dtype=torch.bool) if masked else None
    y = (run or (lambda layer: layer))(layer)(seen, mask)
    y.backward(grad.to(y.dtype))
    layer.commit()
    found = reference.batch_norm_with_gradients(x.detach().double().numpy(), grad.numpy())
    mean, var, normed, of_x, of_weight, of_bias = found
    count = x.numel() // x.shape[1]
    std = np.sqrt(var + 1e-5)
    axes = tuple(a for a in range(x.ndim) if a != 1)

    def off(tensor, right):
        return np.abs(tensor.detach().double().numpy() - right)

    most = np.abs(grad.numpy()).sum(axes) + 1e-30
    return {
        "var": (off(layer.running_var * ((count - 1) / count), var) / (var + 1e-5)).max(),
        "mean": ((off(layer.running_mean, mean) - 2**-23 * np.abs(mean)) / std).max(),
        "output": (off(y, normed) / (1 + np.abs(normed))).max(),
        "of x": (off(seen.grad, of_x).max(axes) * std / np.abs(grad.numpy()).max()).max(),
        "of weight": (off(layer.weight.grad, of_weight) / most).max(),
        "of bias": (off(layer.bias.grad, of_bias) / most).max(),
    }


def assert_right(x, options=None, within=1e-3, **how):
    for what, error in errors(x, options or {}, **how).items():
        assert error <= within, (what, error)


# -- what torch's kernels lose ----------------------------------------------------------------


@pytest.mark.parametrize(("way", "number"), [*((way, 1) for way in WAYS), ("plain", 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "mean", "std"),
    [
        ((32768, 4), 1e4, 0.1),
        ((70_001, 4), 1e4, 0.1),
        ((32, 4, 32, 32), 1e4, 0.1),
        ((64, 3, 300), 1e4, 0.1),
        ((6, 4, 5, 30, 30), 1e4, 0.1),
        ((4096, 8), 1e6, 1),
        ((4096, 8, 1), 1e6, 1),
        ((64, 8, 16, 16), 1e6, 1),
    ],
    ids=str,
)
def test_no_mean_costs_precision_in_any_layout(shape, mean, std, layout, way, number):  # noqa: PLR0917
    x = LAYOUTS[layout](normal(*shape) * std + mean)
    with threads(number):
        assert_right(x, WAYS[way])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_no_mean_costs_precision_under_a_mask(layout):
    for shape in ((4096, 8), (64, 8, 16, 16), (70_001, 2)):
        assert_right(LAYOUTS[layout](normal(*shape) + 1e6), masked=True)


def test_torchs_kernels_lose_what_ours_keeps():
    """The faults that the tests above would find."""
    rows = normal(4096, 8) + 1e6
    assert errors(rows, {}, run=as_torchs)["var"] > 100
    images = (normal(64, 8, 16, 16) + 1e6).contiguous(memory_format=torch.channels_last)
    assert errors(images, {}, run=as_torchs)["var"] > 100
    assert errors(images.contiguous(), {}, run=as_torchs)["output"] > 5e-3  # the mean is folded


def as_torchs(layer):
    return lambda x, _: torch.batch_norm(
        x, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, 1.0, 1e-5, False
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(4096, 1), (64, 1, 8, 8), (70_000, 1)], ids=str)
@pytest.mark.parametrize("value", [1e8, -4.6e11, 0.3])
def test_a_constant_has_no_variance(value, shape, way):
    x = torch.full(shape, value).requires_grad_()
    layer = LAYERS[x.ndim](1, momentum=1.0, **WAYS[way])
    y = layer(x)
    layer.commit()
    assert layer.running_var.item() <= 1e-6  # millions where torch's kernel adds
    assert_close(layer.running_mean, torch.tensor([value]), rtol=2**-22, atol=0)
    assert y.abs().max() <= 1e-3


@pytest.mark.parametrize(("rows", "number"), [(2**24, 1), (2**22 + 1, 2)])
def test_very_many_values_do_not_stall_the_sums(rows, number):
    """Torch's kernel adds 1 to a float32 sum of 2^24, which stays as it is."""
    with threads(number):
        assert_right(normal(rows, 1), grad=normal(rows, 1, seed=2) + 1, within=1e-4)


def test_torchs_kernel_stalls():
    assert errors(normal(2**24, 1), {}, run=as_torchs)["var"] > 0.02


@st.composite
def channels(draw):
    """Float32 values of any shape, layout, mean and scale, of several distributions."""
    axes, seed = draw(st.integers(0, 3)), draw(st.integers(0, 9999))
    width = draw(st.sampled_from([1, 1, 2, 5]))
    examples = max(2, int(2 ** draw(st.floats(1, 16.5))) // width**axes)
    shape = (examples, draw(st.sampled_from([1, 2, 5])), *[width] * axes)
    noise = normal(*shape, seed=seed, dtype=torch.float64)
    values = draw(
        st.sampled_from(
            [noise, noise.abs().log(), (noise > 1).double() * 1.3, noise * 0, noise.sign() + 1e-3]
        )
    )
    scale = 10 ** draw(st.floats(-4, 6))
    mean = draw(st.sampled_from([0, 1, -1])) * 10 ** draw(st.floats(-2, 7))
    x = ((values + mean) * scale).float()
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)


@settings(max_examples=150)
@given(
    x=channels(),
    way=st.sampled_from(sorted(WAYS)),
    masked=st.booleans(),
    number=st.integers(1, 2),
    ones=st.booleans(),
)
def test_values_that_nobody_chose_are_normalized_right(x, way, *, masked, number, ones):
    grad = torch.ones(x.shape) if ones else None
    with threads(number):
        assert_right(x, WAYS[way], masked=masked, grad=grad, within=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70_001, 3), (20_000, 3)], ids=str)
def test_rows_in_half_precision_are_summed_right(shape, dtype):
    x = (normal(*shape) + 200).to(dtype)
    layer = tn.BatchNorm1d(3, momentum=1.0)
    y = layer(x.requires_grad_())
    y.backward(normal(*shape, seed=1).to(dtype))
    mean, var, normed, of_x, _, _ = reference.batch_norm_with_gradients(
        x.detach().double().numpy(), normal(*shape, seed=1).to(dtype).double().numpy()
    )
    count = len(x)
    assert y.dtype == x.grad.dtype == dtype
    assert_close(layer.running_mean.double().numpy(), mean, rtol=1e-6, atol=0)
    assert_close(layer.running_var.double().numpy(), var * (count / (count - 1)), rtol=1e-3, atol=0)
    rounding = 2 * torch.finfo(dtype).eps
    assert_close(y.detach().double().numpy(), normed, rtol=rounding, atol=rounding)
    assert_close(x.grad.double().numpy(), of_x, rtol=rounding, atol=rounding)


# -- the ways around the kernels ------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    """Every batch of rows is one of too many rows."""
    monkeypatch.setattr(kernel, "ROWS", 1)
    monkeypatch.setattr(functional, "ROWS", 1)
    monkeypatch.setattr(kernel, "_PART", 4)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_parts_give_torchs_numbers(layout, affine):
    for shape in ((11, 3), (5, 3, 1), (3, 3, 2, 3), (2, 3, 2, 2, 2)):
        x = LAYOUTS[layout](normal(*shape) * 3 + 2)
        ours = LAYERS[x.ndim](3, **affine)
        theirs = TORCHS[x.ndim](3, **affine)
        given = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        outs = [layer(one) for layer, one in zip((ours, theirs), given, strict=True)]
        for out in outs:
            out.backward(normal(*shape, seed=5))
        assert outs[0].stride() == outs[1].stride()
        assert_close(outs[0], outs[1])
        assert_close(given[0].grad, given[1].grad)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(one.grad, other.grad)
        assert_close(dict(ours.named_buffers())["running_var"], theirs.running_var)


@pytest.mark.usefixtures("small_parts")
def test_parts_have_exact_gradients_of_first_and_second_order():
    def f(x, weight, bias):
        return kernel._in_parts(x, (weight, bias), 1e-5)[0]

    arguments = (normal(11, 2, dtype=torch.float64) + 3, *normal(2, 2, dtype=torch.float64))
    arguments = tuple(a.detach().requires_grad_() for a in arguments)
    assert gradcheck(f, arguments)
    assert gradgradcheck(f, arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own
@pytest.mark.usefixtures("small_parts")
def test_parts_have_a_forward_gradient():
    x, along = normal(11, 3) + 2, normal(11, 3, seed=1)
    tangents = []
    for layer in (tn.BatchNorm1d(3), nn.BatchNorm1d(3)):
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, along))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert_close(*tangents)


@pytest.mark.parametrize("by", [kernel._by_operations, kernel._by_kernel, kernel._in_parts])
def test_every_way_gives_the_same_numbers(by):
    x = normal(5, 3, 4, dtype=torch.float64).movedim(1, -1).contiguous().movedim(-1, 1) + 2
    out, mean, var = by(x, (None, None), 1e-5)
    right = reference.batch_norm_with_gradients(x.numpy(), np.zeros(x.shape))
    for got, wanted in zip((mean, var, out), right[:3], strict=True):
        assert_close(got.numpy(), wanted)


def test_what_the_kernel_got_wrong_leaves_no_trace():
    """Statistics, number of batches and gradient are those of one batch, not of two tries."""
    x = normal(4096, 2) + 1e6
    for momentum in (0.1, None):
        layer = tn.BatchNorm1d(2, momentum=momentum)
        for _ in range(2):
            layer(x)
        share = 0.19 if momentum else 1
        assert layer.num_batches_tracked == 2
        mean, var = x.double().mean(0), x.double().var(0)
        assert_close(layer.running_mean.double(), share * mean, rtol=1e-6, atol=0)
        assert_close(layer.running_var.double(), 1 - share + share * var, rtol=1e-3, atol=0)


def test_a_nan_in_one_channel_leaves_the_others_normalized():
    x = normal(4096, 3) + 1e6
    x[7, 1] = math.nan
    layer = tn.BatchNorm1d(3)
    with pytest.warns(UserWarning, match="skipped_batches"):
        y = layer(x)
    assert layer.num_batches_tracked == 0
    for c in (0, 2):
        right = (x[:, c].double() - x[:, c].double().mean()) / x[:, c].double().std(correction=0)
        assert_close(y[:, c].double(), right, rtol=0, atol=1e-3)


# -- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"act": "relu"}], ids=str)
@pytest.mark.parametrize("shape", [(30, 64), (8, 64, 6, 6)], ids=str)
def test_a_large_running_mean_costs_the_output_nothing(shape, options, layout):
    """Torch folds the mean into the bias: off by 0.007 at 1e5 standard deviations."""
    x = LAYOUTS[layout](normal(*shape) * 0.1 + 1e4)
    layer, theirs = LAYERS[x.ndim](64), TORCHS[x.ndim](64)
    with torch.no_grad():
        layer.running_mean.copy_(normal(64, seed=1) * 0.1 + 1e4)
        layer.running_var.copy_(0.01 + normal(64, seed=2).square() / 100)
        layer.weight.copy_(normal(64, seed=3))
    theirs.load_state_dict(layer.state_dict())
    for name, value in options.items():
        setattr(layer, name, value)
    layer.eval(), theirs.eval()

    along = (1, 64, *(1,) * (x.ndim - 2))
    mean, var, weight = (
        t.double().view(along) for t in (layer.running_mean, layer.running_var, layer.weight)
    )
    slope = weight / (var + 1e-5).sqrt()
    right = (x.double() - mean) * slope
    if layout in {"contiguous", "channels last"}:
        assert (theirs(x).double() - right).abs().max() > 1e-3
    given = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(given)
    assert_close(y.double(), right.relu() if "act" in options else right, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    reached = (y > 0) if "act" in options else torch.ones_like(y)
    assert_close(given.grad.double(), reached * slope, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("same_kernels")
def test_without_options_evaluation_is_torchs_to_the_bit():
    layer, theirs = tn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = normal(40, 3) * 2 + 1
    for one in (layer, theirs):
        one(x)
        one.eval()
    assert torch.equal(layer(x), theirs(x))
