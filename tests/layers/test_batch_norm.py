from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

import foreign as others
import reference
import truenorm as tn
from truenorm.layers.batch_norm import OWN
from truenorm.layers.foreign import epsilon
from truenorm.layers.functional import ACTIVATIONS
from truenorm.layers.running import RunningStatistics

PAIRS = {
    1: (nn.BatchNorm1d, tn.BatchNorm1d),
    2: (nn.BatchNorm2d, tn.BatchNorm2d),
    3: (nn.BatchNorm3d, tn.BatchNorm3d),
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomized(layer, seed=7):
    """``layer`` with weights, and a first pair of statistics, that are not the initial ones."""
    for i, tensor in enumerate((layer.weight, layer.bias, layer.running_mean, layer.running_var)):
        if tensor is not None:
            with torch.no_grad():
                tensor.copy_(normal(len(tensor), seed=seed + i).abs() + 0.5)
    return layer


def twins(axes, channels, **arguments):
    torchs, ours = PAIRS[axes]
    a, b = torchs(channels, **arguments), ours(channels, **arguments)
    randomized(a)
    b.load_state_dict(a.state_dict())
    return a, b


def same_training(a, b, x, steps=3, **tolerance):
    for step in range(steps):
        xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = a(xa), b(xb)
        assert_close(yb, ya, **tolerance)
        assert (
            yb.is_contiguous(memory_format=torch.channels_last)
            == ya.is_contiguous(memory_format=torch.channels_last)
            if x.ndim == 4
            else True
        )
        grad = torch.randn(ya.shape, generator=torch.Generator().manual_seed(step)).to(ya.dtype)
        ya.backward(grad)
        yb.backward(grad)
        assert_close(xb.grad, xa.grad, **tolerance)
    for (name, pa), (_, pb) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert_close(pb.grad, pa.grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in a.state_dict().items():
        assert_close(b.state_dict()[key], value, check_dtype=False, **tolerance)
    a.eval(), b.eval()
    assert_close(b(x), a(x), **tolerance)


# -- with no option -------------------------------------------------------------------------


@given(
    axes=st.integers(1, 3),
    n=st.integers(2, 6),
    affine=st.sampled_from([{}, {"affine": False}, {"bias": False}]),
    momentum=st.sampled_from([None, 0.0, 0.1, 1.0]),
    track=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_without_options_it_is_torchs_layer(  # noqa: PLR0917
    axes, n, affine, momentum, track, dtype
):
    a, b = twins(axes, 3, momentum=momentum, track_running_stats=track, dtype=dtype, **affine)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    same_training(a, b, normal(n, 3, *(4, 3, 2)[:axes], dtype=dtype) * 2 + 1, **tolerance)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_torchs_layer_in_every_layout(layout, dtype):
    a, b = twins(2, 4)
    x = normal(6, 4, 5, 7, dtype=torch.float32).to(dtype)
    if dtype == torch.float64:
        a, b = a.double(), b.double()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x[..., ::2]
    else:
        x = x.transpose(2, 3)
    coarse = {"rtol": 2e-2, "atol": 2e-2}
    same_training(a, b, x, **(coarse if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision_is_torchs_to_half_precision(dtype):
    a, b = twins(2, 4)
    a, b = a.to(dtype), b.to(dtype)
    half = 5e-2 if dtype == torch.bfloat16 else 1e-2  # torch rounds its statistics to it
    same_training(a, b, normal(6, 4, 5, 5).to(dtype), rtol=half, atol=half)


def test_rows_without_positions_are_torchs_too():
    a, b = twins(1, 5)
    same_training(a, b, normal(8, 5, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_the_general_way_is_torchs_layer_too():
    for axes in (1, 2, 3):
        a, b = twins(axes, 3, dtype=torch.float64)
        b._direct = False
        b._by_kernel = lambda x, sizes, b=b: b._by_moments(x, None)
        same_training(a, b, normal(5, 3, *(4, 3, 2)[:axes]))


def test_autocast_is_torchs():
    a, b = (nn.Sequential(nn.Conv2d(3, 4, 3), norm) for norm in twins(2, 4))
    b[0].load_state_dict(a[0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        ya, yb = a(normal(4, 3, 8, 8).float()), b(normal(4, 3, 8, 8).float())
    assert ya.dtype == yb.dtype == torch.bfloat16
    assert_close(yb, ya)
    assert_close(b[1].running_var, a[1].running_var)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ghost": 2},
        {"act": "silu"},
        {"renorm": tn.Renorm(start=0, rmax_at=0, dmax_at=0)},
        {"ghost": 3, "act": "gelu", "min_count": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_first_and_second_order_are_exact(options, masked):
    layer = randomized(tn.BatchNorm1d(2, dtype=torch.float64, **options))
    mask = normal(5, 4, seed=3) > -0.7 if masked else None

    def f(x, weight, bias):
        again = copy.deepcopy(layer)
        return torch.func.functional_call(again, {"weight": weight, "bias": bias}, (x, mask))

    if options.get("renorm"):  # r and d are constants of the forward; freeze what they depend on
        with torch.no_grad():
            layer.running_mean.fill_(0.0)
            layer.running_var.fill_(1e-6)  # r is at its limit everywhere, d too
    arguments = (normal(5, 2, 4) + 3, layer.weight.detach().clone(), layer.bias.detach().clone())
    arguments = tuple(a.requires_grad_() for a in arguments)
    assert gradcheck(f, arguments)
    assert gradgradcheck(f, arguments)


@pytest.mark.parametrize("options", [{}, {"ghost": 3}, {"commit": "step"}], ids=str)
@pytest.mark.parametrize(
    ("held", "given"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_input_of_another_width_trains_and_is_evaluated_in_its_own(held, given, options):
    """torch refuses both."""
    layer, right = (tn.BatchNorm1d(3, dtype=dtype, **options) for dtype in (held, torch.float64))
    x = (normal(7, 3, 4) * 2 + 1).to(given).requires_grad_()
    for training in (True, False):
        for one in (layer, right):
            one.train(training)
        y, expected = layer(x), right(x.double())
        layer.commit(), right.commit()
        assert y.dtype == given
        assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert layer.running_var.dtype == held
        assert_close(layer.running_var.double(), right.running_var, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == given
    assert layer.weight.grad.dtype == held


# -- all options against the reference ---------------------------------------------------------


@given(
    n=st.integers(1, 9),
    channels=st.integers(1, 3),
    positions=st.sampled_from([(), (1,), (4,), (2, 3)]),
    ghost=st.sampled_from([None, 1, 2, 3, 8]),
    renorm=st.sampled_from([None, (1.0, 0.0), (1.5, 0.3), (3.0, 5.0)]),
    min_count=st.sampled_from([2, 3, 5]),
    masked=st.sampled_from(["no", "positions", "values"]),
    momentum=st.sampled_from([None, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 999),
)
def test_options_in_any_combination_follow_the_reference(  # noqa: PLR0917
    n, channels, positions, ghost, renorm, min_count, masked, momentum, seed
):
    options = {"momentum": momentum, "ghost": ghost, "min_count": min_count}
    r = (
        None
        if renorm is None
        else tn.Renorm(rmax=renorm[0], dmax=renorm[1], start=0, rmax_at=0, dmax_at=0)
    )
    if r is not None:  # the schedule ends one batch after its start
        slow = reference.BatchNorm(channels, renorm=(1.0, 0.0), **options)
    else:
        slow = reference.BatchNorm(channels, **options)
    layer = tn.BatchNorm(channels, dtype=torch.float64, renorm=r, **options)
    randomized(layer)
    slow.mean, slow.var = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    for step in range(3):
        x = normal(n, channels, *positions, seed=seed + step) * 2 + 1
        mask = None
        if masked == "positions":
            mask = normal(n, 1, *positions, seed=seed + step + 50) > -0.3
        elif masked == "values":
            mask = normal(n, channels, *positions, seed=seed + step + 50) > -0.3
        expected = slow.forward(x.numpy(), None if mask is None else mask.numpy())
        weight = layer.weight.detach().view(-1, *(1,) * len(positions)).numpy()
        bias = layer.bias.detach().view(-1, *(1,) * len(positions)).numpy()
        expected = expected * weight + bias
        if mask is not None:
            expected = np.where(mask.numpy(), expected, 0)
        assert_close(layer(x, mask).detach().numpy(), expected, rtol=1e-9, atol=1e-9)
        assert_close(layer.running_mean.numpy(), slow.mean, rtol=1e-9, atol=1e-9)
        assert_close(layer.running_var.numpy(), slow.var, rtol=1e-9, atol=1e-9)
        assert int(layer.num_batches_tracked) == slow.batches
        if renorm is not None and slow.batches >= 1:
            slow.renorm = renorm


# -- mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_mask_is_exact_against_the_packed_values(dtype):
    x, mask = normal(6, 3, 8).to(dtype), torch.rand(6, 8, generator=torch.Generator()) > 0.4
    layer, packed = randomized(tn.BatchNorm1d(3)), randomized(nn.BatchNorm1d(3))
    if dtype == torch.float64:
        layer, packed = layer.double(), packed.double()
    x = x.requires_grad_()
    y = layer(x, mask)
    flat = x.detach().movedim(1, 2)[mask].requires_grad_()
    z = packed(flat)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float16 else {}
    assert_close(y.movedim(1, 2)[mask], z, **tolerance)
    assert not y.movedim(1, 2)[~mask].any()
    grad = normal(*z.shape, seed=9).to(z.dtype)
    y.movedim(1, 2)[mask].backward(grad)
    z.backward(grad)
    assert_close(x.grad.movedim(1, 2)[mask], flat.grad, **tolerance)
    assert not x.grad.movedim(1, 2)[~mask].any()
    assert_close(layer.weight.grad, packed.weight.grad, **tolerance)
    assert_close(layer.running_var, packed.running_var, **tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_is_masked_is_never_seen(training, junk):
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    clean = normal(2, 4, 5, dtype=torch.float32)
    dirty = torch.where(mask[:, None], clean, junk)
    results = []
    for x in (clean, dirty):
        layer = randomized(tn.BatchNorm1d(4)).train(training)
        seen = x.clone().requires_grad_()
        y = layer(seen, mask)
        y.square().sum().backward()
        results.append((y, seen.grad, layer.weight.grad, layer.running_var))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_all_invalid_batch_leaves_the_statistics_alone_and_gives_zeros():
    layer = randomized(tn.BatchNorm2d(3))
    before = copy.deepcopy(layer.state_dict())
    x = normal(4, 3, 2, 2, dtype=torch.float32).requires_grad_()
    y = layer(x, torch.zeros(4, 2, 2, dtype=torch.bool))
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(
    "shape", [(4,), (4, 5, 6), (1, 5, 6), (4, 1, 6), (4, 1, 5, 6), (4, 3, 1, 1)]
)
def test_masks_of_examples_positions_and_values_broadcast(shape):
    x = normal(4, 3, 5, 6)
    mask = normal(*shape, seed=2) > -0.5
    whole = mask.view(-1, 1, 1, 1) if mask.ndim == 1 else mask
    whole = (whole[:, None] if whole.ndim == 3 else whole).expand(x.shape)
    a, b = tn.BatchNorm2d(3).double(), tn.BatchNorm2d(3).double()
    assert_close(a(x, mask), b(x, whole))
    assert_close(a.running_var, b.running_var)


@pytest.mark.parametrize("mask", [torch.ones(4, 5, 6), torch.ones(3, 5, dtype=torch.bool)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(tn.InputError, match="mask"):
        tn.BatchNorm2d(3)(normal(4, 3, 5, 6).float(), mask)


def test_one_layer_may_be_called_in_different_ways_before_the_backward():
    layer, theirs = tn.BatchNorm1d(3, min_count=2), nn.BatchNorm1d(3)
    x = normal(4, 3, 5).float()
    every = torch.ones(4, 5, dtype=torch.bool)
    a = layer(x) + layer(x, every) + layer(x)
    b = theirs(x) + theirs(x) + theirs(x)
    a.square().sum().backward()
    b.square().sum().backward()
    assert_close(layer.weight.grad, theirs.weight.grad)
    bad = x.clone()
    bad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="skipped_batches"):
        layer(bad).sum().backward()  # no error of autograd's either
    assert_close(layer.running_var, theirs.running_var)


# -- ghost ------------------------------------------------------------------------------------


def test_ghost_batches_are_batches_of_their_own():
    x = normal(11, 3, 4)
    ghost = randomized(tn.BatchNorm1d(3, ghost=4, dtype=torch.float64))
    parts = [randomized(nn.BatchNorm1d(3, dtype=torch.float64))(part) for part in x.split(4)]
    assert_close(ghost(x), torch.cat(parts))


def test_ghosts_keep_the_horizon_of_the_running_average():
    """With equal statistics in each group, any number of groups moves the average equally."""
    x = normal(4, 3, 5).repeat(4, 1, 1)
    layers = [tn.BatchNorm1d(3, ghost=k, dtype=torch.float64) for k in (4, 8, 16)]
    for layer in layers:
        layer(x)
    # 8 and 16 repeat the values of 4: the same mean; the variance differs by Bessel's factor.
    for layer in layers[1:]:
        assert_close(layer.running_mean, layers[0].running_mean)


def test_ghosts_keep_torchs_keys_and_do_not_matter_in_evaluation():
    ghost, plain = randomized(tn.BatchNorm2d(3, ghost=2)), randomized(nn.BatchNorm2d(3))
    assert ghost.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(ghost.state_dict())
    x = normal(5, 3, 4, 4, dtype=torch.float32)
    assert_close(ghost.eval()(x), plain.eval()(x))
    assert torch.equal(ghost(x)[:1], ghost(x[:1]))


# -- renorm -----------------------------------------------------------------------------------


def test_renorm_without_limits_trains_on_what_inference_computes():
    free = tn.Renorm(rmax=1e9, dmax=1e9, start=0, rmax_at=0, dmax_at=0)
    layer = randomized(tn.BatchNorm1d(3, renorm=free, dtype=torch.float64))
    layer.num_batches_tracked.fill_(1)
    x = normal(6, 3)
    expected = copy.deepcopy(layer).eval()(x)
    assert_close(layer(x), expected)


def test_renorm_follows_the_papers_schedule():
    renorm = tn.Renorm()
    for batches, r, d in [
        (0, 1, 0), (5_000, 1, 0), (15_000, 1 + 2 * 10 / 35, 2.5), (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5), (90_000, 3, 5),
    ]:  # fmt: skip
        rmax, dmax = renorm.limits(torch.tensor(batches))
        assert float(rmax) == pytest.approx(r)
        assert float(dmax) == pytest.approx(d)


# -- frozen -----------------------------------------------------------------------------------


def frozen_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), randomized(tn.BatchNorm1d(3)), nn.Linear(3, 2))


def test_frozen_means_frozen_whatever_the_training_does():
    net = frozen_net()
    net[1].frozen = True
    before = copy.deepcopy(net[1].state_dict())
    net.train().requires_grad_(True).to(torch.float64).to(torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        net(normal(8, 4, seed=step).float()).square().sum().backward()
        optimizer.step()
    torch.optim.swa_utils.update_bn([normal(8, 4).float()], net)
    assert before.keys() == net[1].state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in net[1].state_dict().items())
    tn.assert_frozen(net)


def test_frozen_outputs_are_those_of_evaluation():
    net = frozen_net()
    x = normal(8, 4).float()
    expected = copy.deepcopy(net).eval()(x)
    net[1].frozen = True
    assert torch.equal(net.train()(x), expected)
    net[1].frozen = False
    assert [n for n, _ in net[1].named_parameters()] == ["weight", "bias"]
    assert all(p.requires_grad for p in net[1].parameters())


def test_torchs_freezing_is_undone_by_train_and_is_found():
    layer = nn.BatchNorm1d(3).eval().requires_grad_(False)
    with pytest.raises(AssertionError, match="train\\(\\) would thaw it"):
        tn.assert_frozen(nn.Sequential(layer))
    before = layer.running_mean.clone()
    layer.train()(normal(8, 3).float() + 5)
    assert not torch.equal(before, layer.running_mean)
    with pytest.raises(AssertionError, match=r"0: .*frozen=False"):
        tn.assert_frozen(nn.Sequential(tn.BatchNorm1d(3)))
    with pytest.raises(AssertionError, match="no batch norm"):
        tn.assert_frozen(nn.Linear(2, 2))


# -- activation and residual --------------------------------------------------------------------


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("training", [True, False])
def test_activation_and_residual_are_the_sum_of_their_parts(act, training):
    plain = randomized(tn.BatchNorm2d(3, dtype=torch.float64)).train(training)
    fused = randomized(tn.BatchNorm2d(3, dtype=torch.float64, act=act)).train(training)
    separate = {
        "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(), "elu": nn.ELU(), "relu6": nn.ReLU6(),
        "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "mish": nn.Mish(),
        "selu": nn.SELU(), "hardswish": nn.Hardswish(), "hardsigmoid": nn.Hardsigmoid(),
        "sigmoid": nn.Sigmoid(), "softplus": nn.Softplus(), "tanh": nn.Tanh(),
    }[act]  # fmt: skip
    inputs = [normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)]
    copies = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    a = separate(plain(copies[0][0]) + copies[0][1])
    b = fused(copies[1][0], residual=copies[1][1])
    assert_close(b, a)
    for y in (a, b):
        y.square().sum().backward()
    for one, other in zip(*copies, strict=True):
        assert_close(other.grad, one.grad)
        assert_close(other, one)  # nothing was overwritten


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 1, 1, 1), (2, 4, 3, 4, 4), ()], ids=str)
@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)])
def test_a_residual_of_another_shape_is_refused(shape, training, mask):
    layer = tn.BatchNorm2d(3).train(training)
    with pytest.raises(tn.InputError, match=r"input's shape \(4, 3, 4, 4\), got"):
        layer(torch.randn(4, 3, 4, 4), mask, residual=torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
def test_a_wider_residual_does_not_change_the_dtype(training):
    layer = tn.BatchNorm2d(3).bfloat16().train(training)
    x = torch.randn(4, 3, 4, 4).bfloat16()
    assert layer(x, residual=torch.randn(4, 3, 4, 4)).dtype == torch.bfloat16


def test_masked_values_are_zero_after_activation_and_residual_too():
    layer = tn.BatchNorm1d(3, act="sigmoid")
    mask = torch.tensor([[True, False], [True, True]])
    y = layer(normal(2, 3, 2).float(), mask, residual=torch.ones(2, 3, 2))
    assert not y.movedim(1, 2)[~mask].any()


@pytest.mark.parametrize("act", [None, *sorted(ACTIVATIONS)])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_what_is_masked_in_the_residual_is_never_seen_either(act, junk):
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    clean = normal(2, 4, 5, seed=1, dtype=torch.float32)
    results = []
    for residual in (clean, torch.where(mask[:, None], clean, junk)):
        layer = randomized(tn.BatchNorm1d(4, act=act))
        x, added = normal(2, 4, 5).float().requires_grad_(), residual.requires_grad_()
        y = layer(x, mask, added)
        y.square().sum().backward()
        results.append((y, x.grad, added.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# -- min_count ----------------------------------------------------------------------------------


def test_a_batch_of_one_trains_where_torch_raises():
    x = normal(1, 3).float().requires_grad_()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(x)
    with pytest.raises(tn.InputError, match="min_count=2"):
        tn.BatchNorm1d(3)(x)
    layer = randomized(tn.BatchNorm1d(3, min_count=2))
    expected = copy.deepcopy(layer).eval()(x)
    y = layer(x)
    assert_close(y, expected)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_batches_below_min_count_give_unbiased_running_statistics(n):
    """Normal values of mean 2, variance 9: averages over 200 chains of 400 batches."""
    layer = tn.BatchNorm1d(200, min_count=8, momentum=0.2, dtype=torch.float64)
    for step in range(400):
        layer(normal(n, 200, seed=step) * 3 + 2)
    assert float(layer.running_mean.mean()) == pytest.approx(2, abs=0.1)
    assert float(layer.running_var.mean()) == pytest.approx(9, rel=0.03)


# -- what is not finite, and half precision -------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"ghost": 2}, {"commit": "step"}, {"act": "relu"}], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_leaves_the_statistics_alone(options, value, momentum):
    layer, theirs = tn.BatchNorm1d(3, momentum=momentum, **options), nn.BatchNorm1d(3)
    good, bad = normal(4, 3).float(), normal(4, 3).float()
    bad[1, 2] = value
    before = copy.deepcopy(layer.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            layer(bad)
            layer.commit()
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert layer.skipped_batches == 3
    assert [w.category for w in caught] == [UserWarning]
    assert "skipped_batches" in str(caught[0].message)
    clean = tn.BatchNorm1d(3, momentum=momentum, **options)
    for one in (layer, clean):
        one(good)
        one.commit()
    assert all(torch.equal(clean.state_dict()[k], v) for k, v in layer.state_dict().items())
    theirs(bad)
    for _ in range(100):
        theirs(good)
    assert not torch.isfinite(theirs.running_var).all()  # the fault


def test_statistics_broken_before_are_not_blamed_on_a_good_batch():
    layer = tn.BatchNorm1d(2)
    layer.running_var[0] = float("nan")
    layer(normal(4, 2).float())
    assert layer.skipped_batches == 0
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_stay_float32_in_half_precision(dtype):
    """An update of 1e-3 of the mean is lost in half precision; here it is not."""
    ways = [
        tn.BatchNorm1d(3).to(dtype),
        tn.BatchNorm1d(3, dtype=dtype),
        tn.BatchNorm1d(3).double().to(dtype),
        nn.Sequential(tn.BatchNorm1d(3)).to(dtype)[0],
    ]
    loaded = tn.BatchNorm1d(3).to(dtype)
    loaded.load_state_dict(nn.BatchNorm1d(3).to(dtype).state_dict(), assign=True)
    x = (normal(64, 3) + 100).to(dtype)
    for layer in (*ways, loaded):
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        assert layer.weight.dtype == dtype
        layer.momentum = 1e-4
        for _ in range(50):
            layer(x)
        grown = 1 - (1 - 1e-4) ** 50
        expected = x.double().mean(0) * grown
        assert_close(layer.running_mean.double(), expected, rtol=1e-2, atol=0)
    theirs = nn.BatchNorm1d(3, momentum=1e-4).to(dtype)
    theirs.running_mean.fill_(50)
    for _ in range(50):
        theirs(x)
    assert (theirs.running_mean == 50).all()  # the fault: each step of 0.005 is rounded away


def test_a_round_trip_through_half_keeps_every_bit_of_the_statistics():
    layer = randomized(tn.BatchNorm2d(5))
    before = layer.running_var.clone()
    assert torch.equal(layer.half().float().running_var, before)


# -- torch's protocols -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ghost": 2}, {"act": "relu", "min_count": 4}], ids=str)
def test_compiled_it_is_the_same_layer(options):
    eager, compiled = tn.BatchNorm1d(3, **options), tn.BatchNorm1d(3, **options)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = normal(6, 3).float()
    for _ in range(2):
        assert_close(run(x), eager(x))
    bad = x.clone()
    bad[0, 0] = float("nan")
    run(bad)
    for key, value in eager.state_dict().items():
        assert_close(compiled.state_dict()[key], value)
    assert compiled.skipped_batches == 1
    with pytest.warns(UserWarning, match="skipped_batches"):
        compiled.eval()


def test_it_is_exported_for_evaluation_as_one_batch_norm():
    layer = randomized(tn.BatchNorm2d(3)).eval()
    x = normal(4, 3, 5, 5).float()
    program = torch.export.export(layer, (x,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets == ["aten.batch_norm.default"]
    assert_close(program.module()(x), layer(x))


def test_it_is_exported_for_training_with_its_statistics():
    layer = tn.BatchNorm2d(3)
    x = normal(4, 3, 5, 5).float()
    module = torch.export.export(layer, (x,)).module()
    module(x)
    layer(x)
    assert_close(module.get_buffer("running_var"), layer.running_var)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jacfwd
def test_torch_func_sees_the_gradients():
    layer = randomized(tn.BatchNorm1d(3, track_running_stats=False)).double()
    x = normal(6, 3)
    held = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).pow(3).sum()

    grads = torch.func.grad(loss)(held)
    loss(held).backward()
    for name, parameter in layer.named_parameters():
        assert_close(grads[name], parameter.grad)
    many = torch.func.vmap(layer)(x.view(2, 3, 3))
    assert_close(many, torch.stack([layer(one) for one in x.view(2, 3, 3)]))
    assert_close(
        torch.func.jacrev(layer)(x).flatten(2).sum(), torch.func.jacfwd(layer)(x).flatten(2).sum()
    )


@pytest.mark.parametrize("options", [{}, {"act": "relu", "min_count": 2}], ids=str)
def test_an_ensemble_under_vmap_trains_its_statistics(options):
    members = [nn.Sequential(nn.Linear(4, 3), tn.BatchNorm1d(3, **options)) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = normal(6, 4).float()

    def run(parameters, buffers):
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    out = torch.func.vmap(run)(parameters, buffers)
    for i, member in enumerate(members):
        assert_close(out[i], member(x))
        assert_close(buffers["1.running_var"][i], member[1].running_var)
        assert buffers["1.num_batches_tracked"][i] == 1


def test_symbolic_tracing_makes_one_module_call_of_it():
    net = nn.Sequential(nn.Linear(3, 3), tn.BatchNorm1d(3), nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    x = normal(5, 3).float()
    assert torch.equal(traced.eval()(x), net.eval()(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(copied):
    layer = randomized(
        tn.BatchNorm1d(3, ghost=2, sync=True, renorm=tn.Renorm(rmax=2), act="relu", min_count=3)
    )
    twin = copied(layer)
    assert twin.options == layer.options
    x = normal(6, 3).float()
    assert_close(twin(x), layer(x))
    assert_close(twin.running_var, layer.running_var)
    plain = copied(tn.BatchNorm1d(3))
    plain(x)
    assert plain.num_batches_tracked == 1


def test_parametrized_it_works_as_torchs():
    class Positive(nn.Module):
        def forward(self, weight):
            return weight.exp()

    a, b = twins(1, 3)
    for layer in (a, b):
        parametrize.register_parametrization(layer, "weight", Positive())
    x = normal(6, 3).float()
    assert_close(b(x), a(x))
    assert_close(b.running_var, a.running_var)
    with pytest.raises(tn.InputError, match="parametrizations"):
        b.frozen = True


def test_it_may_be_made_on_the_meta_device():
    layer = tn.BatchNorm2d(3, device="meta", ghost=2)
    assert layer(torch.empty(4, 3, 2, 2, device="meta")).shape == (4, 3, 2, 2)
    assert layer.train().eval() is layer
    layer.to_empty(device="cpu")
    layer.load_state_dict(tn.BatchNorm2d(3).state_dict())
    assert layer.skipped_batches == 0
    layer.train()(normal(4, 3, 2, 2).float())
    assert torch.isfinite(layer.running_var).all()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_lazy_layers_become_plain_ones_with_their_options(axes):
    kind = {1: tn.LazyBatchNorm1d, 2: tn.LazyBatchNorm2d, 3: tn.LazyBatchNorm3d}[axes]
    torchs = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}[axes]
    lazy, plain = kind(ghost=2, dtype=torch.bfloat16), PAIRS[axes][1](3, ghost=2)
    x = normal(6, 3, *(2,) * axes).float()
    lazy(x.bfloat16())
    assert type(lazy) is PAIRS[axes][1]
    assert lazy.running_mean.dtype == torch.float32
    assert lazy.options == plain.options
    assert repr(lazy) == repr(plain)
    without = kind(bias=False, affine=True)
    without(x)
    assert without.bias is None
    a, b = torchs(), kind()
    same_training(a, b, x, rtol=1e-5, atol=1e-5) if a(x) is not None and b(x) is not None else None
    with pytest.raises(tn.InputError, match="lazy"):
        kind(frozen=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"ghost": 2}], ids=str)
def test_a_lazy_layer_without_tensors_finds_its_channels_too(options, masked):
    lazy = tn.LazyBatchNorm2d(affine=False, track_running_stats=False, **options)
    plain = tn.BatchNorm2d(3, affine=False, track_running_stats=False, **options)
    x = normal(4, 3, 2, 2)
    mask = {"mask": normal(4, 2, 2, seed=1) > -0.5} if masked else {}
    assert torch.equal(lazy(x, **mask), plain(x, **mask))
    assert repr(lazy) == repr(plain)
    with pytest.raises(tn.InputError, match="expected 3 channels"):
        lazy(normal(4, 2, 2, 2))


def test_a_lazy_layer_that_was_given_a_wrong_shape_stays_lazy():
    lazy = tn.LazyBatchNorm2d()
    with pytest.raises(tn.InputError, match=r"expected 4D input \(got 1D input\)"):
        lazy(torch.zeros(3))
    assert lazy(torch.zeros(2, 5, 1, 1)).shape == (2, 5, 1, 1)


def test_options_can_be_changed_and_are_checked_each_time():
    layer = tn.BatchNorm1d(3)
    layer.ghost = 4
    assert layer.ghost == 4
    assert "ghost=4" in repr(layer)
    with pytest.raises(tn.InputError, match="ghost must be an integer"):
        layer.ghost = 0
    assert layer.ghost == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\] or be None, got 1\.5"),
        ({"eps": -1.0}, r"eps must be a number above 0, got -1\.0"),
        ({"eps": 0}, "eps must be a number above 0, got 0; the default is 1e-5"),
        ({"eps": float("nan")}, "eps must be a number above 0, got nan"),
        ({"eps": "1e-5"}, "eps must be a number above 0, got '1e-5'"),
        ({"eps": True}, "eps must be a number above 0, got True"),
        ({"ghost": 2.5}, "ghost must be an integer of at least 1 or None, got 2.5"),
        ({"min_count": 1}, "min_count must be an integer of at least 2 or None, got 1"),
        ({"sync": "yes"}, "sync must be True, False or a process group"),
        ({"act": "rleu"}, "unknown act 'rleu'; choose one of"),
        ({"commit": "later"}, "unknown commit 'later'"),
        ({"renorm": True}, r"renorm must be truenorm.Renorm\(...\)"),
        ({"renorm": tn.Renorm(), "track_running_stats": False}, "renorm needs running statistics"),
        ({"frozen": True, "track_running_stats": False}, "frozen needs running statistics"),
    ],
)
def test_bad_options_are_refused_with_their_value(arguments, message):
    with pytest.raises(tn.InputError, match=message):
        tn.BatchNorm1d(4, **arguments)


@pytest.mark.parametrize("kind", [tn.BatchNorm2d, tn.BatchNorm, tn.LazyBatchNorm1d])
@pytest.mark.parametrize("wrong", [0, -1e-5, None])
def test_eps_is_checked_whenever_it_is_set(kind, wrong):
    layer = kind(3) if kind is not tn.LazyBatchNorm1d else kind()
    layer.eps = np.float32(0.25)
    assert layer.eps == 0.25
    with pytest.raises(tn.InputError, match="eps must be a number above 0, got"):
        layer.eps = wrong
    assert layer.eps == 0.25
    assert "eps=0.25" in repr(layer)


def test_a_new_eps_is_what_the_layer_adds():
    x = normal(6, 3)
    layer = tn.BatchNorm1d(3).double()
    layer.eps = 2.0
    var, mean = torch.var_mean(x, 0, correction=0)
    for act in (None, "relu"):
        layer.act = act
        y = (x - mean) / (var + 2).sqrt()
        assert_close(layer(x), y if act is None else y.relu())


# -- activations and the converters of others -----------------------------------------------------

CONVERTERS = {
    "torch's sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    "torch's fuse": lambda model: fuse_conv_bn_eval(model[0].eval(), model[1].eval()),
    "detectron2's and timm's": lambda model: others.replace_by_frozen(model[1]),
}


@pytest.mark.parametrize("convert", CONVERTERS.values(), ids=CONVERTERS)
def test_no_converter_of_others_can_lose_the_activation(convert):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), tn.BatchNorm2d(4, act="relu"))
    with pytest.raises(
        tn.InputError, match=r"applies act='relu' after .* truenorm\.convert"
    ) as told:
        convert(model)
    assert "truenorm.fold" in str(told.value)
    model[1].act = None
    convert(model)


def test_a_layer_with_an_activation_does_all_but_tell_its_eps():
    layer = tn.BatchNorm2d(4, act="relu", eps=1e-3)
    assert isinstance(layer, nn.BatchNorm2d)  # loops that freeze or reset batch norms find it
    assert "eps=0.001" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert epsilon(twin) == 1e-3
        twin.act = None
        assert twin.eps == 1e-3
    assert "eps" not in dict(inspect.getmembers(layer))
    layer.eps = 1e-2
    assert epsilon(layer) == 1e-2


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_layer_with_an_activation_is_traced_and_exported():
    layer = tn.BatchNorm2d(4, act="relu").eval()
    x = normal(2, 4, 3, 3).float()
    assert_close(torch.jit.trace(layer, x)(x), layer(x))
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    "arguments", [{"rmax": 0.5}, {"dmax": -1}, {"start": 10, "rmax_at": 5}, {"start": -1}]
)
def test_a_schedule_that_cannot_be_is_refused(arguments):
    with pytest.raises(tn.InputError, match="must be at least"):
        tn.Renorm(**arguments)


def test_input_of_the_wrong_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        tn.BatchNorm2d(3)(torch.ones(2, 3, 4))
    with pytest.raises(tn.InputError, match=r"expected 3 channels in axis 1, got input of shape"):
        tn.BatchNorm2d(3)(torch.ones(2, 4, 4, 3))
    with pytest.raises(tn.InputError, match="input must be a tensor, got list"):
        tn.BatchNorm1d(3)([1.0])


def test_an_empty_batch_gives_an_empty_output_and_moves_nothing():
    layer = tn.BatchNorm2d(3)
    y = layer(torch.empty(0, 3, 4, 4, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_it_is_an_instance_of_torchs_class_and_of_its_statistics(axes):
    torchs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    for layer in (getattr(tn, f"BatchNorm{axes}d")(3), getattr(tn, f"LazyBatchNorm{axes}d")()):
        assert isinstance(layer, torchs)
        assert isinstance(layer, RunningStatistics)


def test_a_pickle_of_the_layer_holds_these_names():
    """Old pickles of whole models hold them, so they cannot be renamed."""
    layer = tn.BatchNorm2d(3).half()
    own = vars(layer).keys() - vars(nn.BatchNorm2d(3)).keys()
    later = {"_reset", "_warned", "_past"}
    before = {"_options", "_pending", "_told", "_direct", "_least", "_narrow", "_skipped"}
    assert own == before | {"_usual"} == set(OWN) - later
    assert all(not getattr(layer, name) for name in later)
    assert layer._buffers.keys() == nn.BatchNorm2d(3)._buffers.keys()
