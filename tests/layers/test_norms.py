from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrize
from torch.testing import assert_close

import truenorm as tn

EPS = 1e-5


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def affine(layer, seed=7):
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i))
    return layer


def by_hand(x, mask, blocks, root=False):
    """Each block of values normalized by those of its values that are valid; others zero."""
    out = np.zeros(x.shape)
    for block in blocks:
        here = mask[block]
        values = x[block][here]
        if len(values):
            mean = 0 if root else values.mean()
            part = np.zeros(here.shape)
            part[here] = (values - mean) / np.sqrt(((values - mean) ** 2).mean() + EPS)
            out[block] = part
    return out


@given(
    n=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 6]),
    positions=st.sampled_from([(), (5,), (3, 2)]),
    kind=st.sampled_from(["group", "instance", "rms"]),
    seed=st.integers(0, 999),
)
def test_masked_norms_follow_their_definition(n, groups, positions, kind, seed):
    x = normal(n, 6, *positions, seed=seed) * 3 + 1
    mask = normal(n, *positions, seed=seed + 1) > -0.5
    if kind == "instance":
        if not positions:
            return
        groups = 6
        classes = (tn.InstanceNorm1d, tn.InstanceNorm2d)
        layer = classes[len(positions) - 1](6, affine=True).double()
    elif kind == "group":
        layer = tn.GroupNorm(groups, 6).double()
    else:
        groups = 1
        layer = tn.RMSNorm(6).double()
    affine(layer)
    full = (
        mask.unsqueeze(1).expand(x.shape).numpy()
        if positions
        else np.broadcast_to(mask.numpy()[:, None], x.shape)
    )
    size = 6 // groups
    blocks = [(i, slice(g * size, (g + 1) * size)) for i in range(n) for g in range(groups)]
    expected = by_hand(x.numpy(), full, blocks, root=kind == "rms")
    along = (-1, *(1,) * len(positions))
    expected = expected * layer.weight.detach().numpy().reshape(along)
    if kind != "rms":
        expected = expected + layer.bias.detach().numpy().reshape(along)
    expected = np.where(full, expected, 0)
    assert_close(layer(x, mask).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 4), (3,)])
def test_a_layer_norms_mask_may_hide_vectors_or_values(shape):
    x = normal(2, 3, 4)
    layer = affine(tn.LayerNorm(shape[-1:] if len(shape) == 1 else shape).double())
    if len(shape) == 1:
        x = normal(2, 4, 3)
        mask = normal(2, 4, seed=3) > 0
        expected = torch.where(mask[..., None], nn.LayerNorm.forward(layer, x), 0)
        assert_close(layer(x, mask), expected)
        return
    mask = normal(2, 3, 4, seed=3) > -0.5
    expected = by_hand(x.numpy(), mask.numpy(), [(0,), (1,)])
    expected = expected * layer.weight.detach().numpy() + layer.bias.detach().numpy()
    expected = np.where(mask.numpy(), expected, 0)
    assert_close(layer(x, mask).detach().numpy(), expected)


@pytest.mark.parametrize(
    "layer",
    [tn.GroupNorm(2, 4), tn.InstanceNorm1d(4, affine=True), tn.RMSNorm(4), tn.LayerNorm(5)],
    ids=lambda m: type(m).__name__,
)
def test_masked_gradients_are_exact_and_padding_is_not_seen(layer):
    layer = affine(layer.double())
    x = normal(2, 4, 5)
    if isinstance(layer, tn.LayerNorm):
        mask = normal(2, 4, seed=3) > -0.5
        hidden = ~mask[..., None].expand(x.shape)
    else:
        mask = normal(2, 5, seed=3) > -0.5
        hidden = ~mask[:, None].expand(x.shape)
    assert gradcheck(lambda x: layer(x, mask), (x.clone().requires_grad_(),))
    dirty = torch.where(hidden, float("nan"), x)
    assert torch.equal(layer(dirty, mask), layer(x, mask))
    assert not layer(dirty, mask)[hidden].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_a_mask_they_are_torchs(layout):
    x = normal(3, 4, 5, 6, dtype=torch.float32).to(memory_format=layout)
    for ours, theirs in [
        (tn.GroupNorm(2, 4), nn.GroupNorm(2, 4)),
        (tn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4, affine=True)),
        (tn.InstanceNorm2d(4), nn.InstanceNorm2d(4)),
        (
            tn.InstanceNorm2d(4, track_running_stats=True),
            nn.InstanceNorm2d(4, track_running_stats=True),
        ),
        (tn.LayerNorm(6), nn.LayerNorm(6)),
    ]:
        affine(theirs)
        ours.load_state_dict(theirs.state_dict())
        assert_close(ours(x), theirs(x))
        if not (isinstance(ours, tn.LayerNorm) or getattr(ours, "track_running_stats", False)):
            assert ours(x).stride() == x.stride()


@pytest.mark.parametrize("mean", [0, 10, 300, 1000, 1e5, 1e6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_no_mean_costs_precision(layout, masked, mean):
    for shape in ((2, 8, 64, 64), (3, 8, 5), (2, 8, 3, 5, 6)):
        x = normal(*shape, dtype=torch.float32) + mean
        if layout == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        instance = (tn.InstanceNorm1d, tn.InstanceNorm2d, tn.InstanceNorm3d)[x.ndim - 3]
        for layer, groups in [
            (instance(8, affine=True), 8),
            (tn.GroupNorm(8, 8), 8),
            (tn.GroupNorm(2, 8), 2),
            (tn.LayerNorm(shape[1:]), 1),
        ]:
            affine(layer)
            grad = normal(*shape, seed=1, dtype=torch.float32)
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = layer(given, torch.ones(x.shape, dtype=torch.bool) if masked else None)
            y.backward(grad)
            exact = x.double().requires_grad_()
            blocks = exact.reshape(len(x), groups, -1)
            normed = (blocks - blocks.mean(-1, True)) / (
                blocks.var(-1, correction=0, keepdim=True) + EPS
            ).sqrt()
            along = layer.weight.shape if layer.weight.ndim > 1 else (-1, *(1,) * (x.ndim - 2))
            right = normed.reshape(shape) * layer.weight.view(along) + layer.bias.view(along)
            right.backward(grad.double())
            assert_close(y.double(), right, rtol=2e-4, atol=2e-4)
            assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_torchs_kernels_lose_a_large_mean():
    x = (normal(2, 8, 64, 64, dtype=torch.float32) + 1000).to(memory_format=torch.channels_last)
    right = nn.GroupNorm(8, 8).double()(x.double())
    assert (nn.GroupNorm(8, 8)(x).double() - right).abs().max() > 100
    far = normal(4, 64, dtype=torch.float32) + 1e6
    assert (
        nn.LayerNorm(64)(far).double() - nn.LayerNorm(64).double()(far.double())
    ).abs().max() > 0.01


@pytest.mark.parametrize("kind", [tn.InstanceNorm1d, tn.InstanceNorm2d, tn.InstanceNorm3d])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_one_position_has_no_variance_for_instance_norm(kind, layout):
    axes = kind(3)._get_no_batch_dim() - 1
    x = torch.ones(2, 3, *(1,) * axes)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        kind(3)(x)


def test_group_norm_of_one_value_is_refused_as_torchs():
    for layer in (tn.GroupNorm(3, 3), nn.GroupNorm(3, 3)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_group_norm_keeps_layout_and_dtype(dtype):
    x = (normal(2, 4, 5, 6) + 200).to(dtype).to(memory_format=torch.channels_last)
    y = tn.GroupNorm(2, 4).to(dtype)(x)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    close = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    assert_close(y.double(), nn.GroupNorm(2, 4).double()(x.double()), **close)


@pytest.mark.parametrize(
    "layer",
    [tn.GroupNorm(2, 4), tn.InstanceNorm2d(4), tn.LayerNorm((4, 5, 6))],
    ids=lambda m: type(m).__name__,
)
def test_the_others_compile_whole_and_vmap(layer):
    x = normal(3, 2, 4, 5, 6, dtype=torch.float32) + 3
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(
        x[0].to(memory_format=torch.channels_last)
    )
    assert_close(y, layer(x[0]))
    assert_close(torch.func.vmap(layer)(x), torch.stack([layer(one) for one in x]))


def test_masks_that_do_not_fit_are_refused():
    x = normal(2, 4, 5)
    with pytest.raises(tn.InputError, match="mask must be a bool"):
        tn.GroupNorm(2, 4)(x, torch.ones(2, 5))
    with pytest.raises(tn.InputError, match="track_running_stats=False"):
        tn.InstanceNorm1d(4, track_running_stats=True)(x, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(tn.InputError, match="mask must be bool with 2 or 3 axes"):
        tn.LayerNorm(5)(x, torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (tn.GroupNorm(2, 4), (2, 6, 5)),
        (tn.GroupNorm(2, 4, affine=False), (2, 6, 5)),
        (tn.GroupNorm(2, 4, affine=False), (2, 2, 5)),
        (tn.InstanceNorm1d(4), (2, 6, 5)),
        (tn.InstanceNorm1d(4, affine=True), (2, 6, 5)),
        (tn.LayerNorm(4, elementwise_affine=False), (2, 3, 5)),
        (tn.LayerNorm((3, 4), elementwise_affine=False), (2, 4, 3)),
        (tn.LayerNorm((3, 4), elementwise_affine=False), (4,)),
        (tn.LayerNorm(4), (2, 3, 5)),
    ],
    ids=str,
)
def test_masked_input_of_another_size_is_refused_with_and_without_weights(layer, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(tn.InputError, match=r"expected .*, got input of shape"):
        layer(torch.zeros(shape), mask)


@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 5, 4), (4,)])
@pytest.mark.parametrize("channels", [4, 1])
def test_an_rms_norm_takes_no_other_number_of_channels(shape, channels):
    """Nor one channel for many, which would broadcast."""
    if (2, channels, 5) == shape:
        shape = (2, 3, 5)
    with pytest.raises(tn.InputError, match=f"RMSNorm expected {channels} channels in axis 1"):
        tn.RMSNorm(channels)(torch.ones(shape))


def test_an_rms_norm_is_made_where_and_as_it_is_told():
    layer = tn.RMSNorm(4, device="meta", dtype=torch.float64)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float64)


LAZY = [
    (tn.LazyInstanceNorm1d, nn.LazyInstanceNorm1d, tn.InstanceNorm1d, (5,)),
    (tn.LazyInstanceNorm2d, nn.LazyInstanceNorm2d, tn.InstanceNorm2d, (5, 3)),
    (tn.LazyInstanceNorm3d, nn.LazyInstanceNorm3d, tn.InstanceNorm3d, (5, 3, 2)),
]


@pytest.mark.parametrize("arguments", [{}, {"affine": False, "track_running_stats": False}])
@pytest.mark.parametrize(("lazy", "torchs", "plain", "positions"), LAZY)
def test_lazy_instance_norms_become_plain_ones(lazy, torchs, plain, positions, arguments):
    x = normal(2, 4, *positions, dtype=torch.float32)
    ours, theirs = lazy(**arguments), torchs(**arguments)
    assert_close(ours(x), theirs(x) if not arguments else nn.functional.instance_norm(x))
    assert type(ours) is plain
    assert ours.num_features == 4
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert_close(value, theirs.state_dict()[key])
    single = lazy(**arguments)
    assert single(x[0]).shape == x[0].shape
    assert single.num_features == 4
    masked = lazy(track_running_stats=False)
    mask = normal(2, *positions, seed=1) > -0.5
    assert_close(masked(x, mask=mask), plain(4)(x, mask))


@pytest.mark.parametrize(("lazy", "torchs", "plain", "positions"), LAZY)
def test_torchs_lazy_instance_norms_are_converted_there_and_back(lazy, torchs, plain, positions):
    net = nn.Sequential(torchs())
    tn.convert(net, to="truenorm")
    assert type(net[0]) is lazy
    tn.convert(net, to="torch")
    assert type(net[0]) is torchs
    tn.convert(net, to="truenorm")
    net(normal(2, 4, *positions, dtype=torch.float32))
    assert type(net[0]) is plain


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(3, 8, 3),
        nn.Linear(6, 4),
        nn.Conv2d(4, 8, 3, groups=2),
    ],
    ids=lambda m: f"{type(m).__name__}",
)
def test_standardized_weights_have_mean_0_and_variance_1_for_each_output(module):
    module = module.double()
    plain = module.weight.detach().clone()
    tn.weight_standardization(module)
    rows = module.weight.movedim(1 if isinstance(module, nn.ConvTranspose2d) else 0, 0).flatten(1)
    assert_close(rows.mean(1), torch.zeros(len(rows), dtype=torch.float64))
    before = plain.movedim(1 if isinstance(module, nn.ConvTranspose2d) else 0, 0).flatten(1)
    variance = before.var(1, correction=0)
    assert_close(rows.var(1, correction=0), variance / (variance + EPS))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert torch.equal(module.weight, plain)


def test_weights_that_cannot_be_standardized_are_refused():
    with pytest.raises(tn.InputError, match="at least two axes, got 'weight' of BatchNorm1d"):
        tn.weight_standardization(nn.BatchNorm1d(3))
    with pytest.raises(tn.InputError, match="groups=1"):
        tn.weight_standardization(nn.ConvTranspose2d(4, 4, 3, groups=2))
