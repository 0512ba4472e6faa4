"""Batch norms that become norms of another kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import truenorm as tn
from foreign import BatchNormAct

X = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))


def norm():
    layer = nn.BatchNorm2d(6, eps=1e-3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 6))
        layer.bias.copy_(torch.linspace(-1, 1, 6))
    return layer


def standardized(x, axes):
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / (x.var(axes, correction=0, keepdim=True) + 1e-3).sqrt()


def affine(x, layer, *, bias=True):
    shape = (1, -1, 1, 1)
    return x * layer.weight.view(shape) + (layer.bias.view(shape) if bias else 0)


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("layer", lambda x, n: affine(standardized(x, (1, 2, 3)), n)),
        ("instance", lambda x, n: affine(standardized(x, (2, 3)), n)),
        (
            "rms",
            lambda x, n: affine(
                x / (x.square().mean((1, 2, 3), keepdim=True) + 1e-3).sqrt(), n, bias=False
            ),
        ),
        ("none", lambda x, n: x),
        ("batch", lambda x, n: affine(standardized(x, (0, 2, 3)), n)),
    ],
)
def test_each_kind_computes_what_its_name_says(to, expected):
    model, original = nn.Sequential(norm()), norm()
    done = tn.convert(model, to=to)
    assert not done.shortfall
    assert_close(model(X), expected(X, original), rtol=1e-4, atol=1e-5)
    model.eval()
    if to != "batch":
        assert_close(model(X), expected(X, original), rtol=1e-4, atol=1e-5)
        assert not any("running" in key for key in model.state_dict())


def test_renorm_takes_its_schedule():
    model = nn.Sequential(norm())
    tn.convert(model, to="renorm", renorm=tn.Renorm(start=7, rmax_at=8, dmax_at=9))
    assert model[0].renorm.start == 7
    with pytest.raises(tn.InputError, match="unknown setting 'groups' of to='layer'"):
        tn.convert(model, to="layer", groups=2)


@pytest.mark.parametrize("to", ["layer", "instance", "rms", "none"])
def test_an_activation_inside_stays(to):
    torch.manual_seed(0)
    model = nn.Sequential(BatchNormAct(6, act=nn.ReLU()))
    plain = nn.Sequential(nn.BatchNorm2d(6))
    assert not tn.convert(model, to=to).shortfall
    tn.convert(plain, to=to)
    assert_close(model(X), plain(X).relu())


def test_vectors_have_no_instance_norm():
    model = nn.Sequential(nn.BatchNorm1d(6))
    with pytest.warns(tn.ConversionWarning, match="vectors"):
        tn.convert(model, to="instance")
    assert type(model[0]) is nn.BatchNorm1d


def test_what_has_no_running_statistics_of_a_batch_stays():
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4))
    for to in ("layer", "instance", "rms", "none", "batch"):
        assert not tn.convert(model, to=to).changed
