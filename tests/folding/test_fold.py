"""Folding against the model that was not folded, in float64: what can vanish does, exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import foreign as others
import truenorm as tn
from foldable import Heads, images, lively, resnet
from truenorm.folding.fold import Folded, fold
from truenorm.folding.modules import ScaleShift, Shifted
from truenorm.folding.refold import refold


def forms(folded: Folded) -> dict[str, str]:
    return {pair.norm: pair.form for pair in folded.pairs}


def reasons(folded: Folded) -> dict[str, str]:
    return dict(folded.left)


def same(model: nn.Module, folded: Folded, x: Any, bound: float = 1e-12) -> None:
    """The folded model's answer is the original's, both in float64, on other inputs, too."""
    # Weights of the copy were rounded to float32: fold the wide model to compare without that.
    wide = fold(copy.deepcopy(model).double(), x.double())
    assert forms(wide) == forms(folded)
    for taken in (x.double(), 3 * torch.randn_like(x).double() + 1, x.double()[:1]):
        with torch.no_grad():
            expected, got = copy.deepcopy(model).double()(taken), wide.model(taken)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= bound * expected.abs().max()
    assert folded.error <= 1e-5
    assert folded.exact is not None
    assert folded.exact < bound


# -- what folds -----------------------------------------------------------------------------------

BEHIND = {
    "conv1d": (nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), images(4, 3, 9)),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), images()),
    "conv2d without bias": (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), images()),
    "conv3d": (nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), images(2, 3, 5, 5, 5)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), images(4, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), images(4, 4, 9, 9)),
    "dilation": (nn.Conv2d(3, 8, 3, dilation=2, stride=2), nn.BatchNorm2d(8), images()),
    "padding same": (nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), images()),
    "reflection": (
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), images(),
    ),
    "transposed 1d": (nn.ConvTranspose1d(3, 8, 3, stride=2), nn.BatchNorm1d(8), images(4, 3, 9)),
    "transposed 2d": (nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), images()),
    "transposed groups": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), images(4, 4, 9, 9),
    ),
    "transposed 3d": (nn.ConvTranspose3d(3, 4, 2), nn.BatchNorm3d(4), images(2, 3, 4, 4, 4)),
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), images(4, 6)),
    "linear without bias": (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), images(4, 6)),
    "not affine": (nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), images(4, 6)),
    "huge eps": (nn.Linear(6, 8), nn.BatchNorm1d(8, eps=100.0), images(4, 6)),
    "synchronized": (nn.Linear(6, 8), nn.SyncBatchNorm(8), images(4, 6)),
    "ours": (nn.Linear(6, 8), tn.BatchNorm1d(8), images(4, 6)),
    "ours frozen": (nn.Linear(6, 8), tn.BatchNorm1d(8, frozen=True), images(4, 6)),
    "ours with activation": (nn.Linear(6, 8), tn.BatchNorm1d(8, act="silu"), images(4, 6)),
    "tracking instance norm": (
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), images(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND)
def test_a_norm_behind_weights_vanishes_into_them(name):
    weights, norm, x = BEHIND[name]
    model = lively(nn.Sequential(copy.deepcopy(weights), copy.deepcopy(norm)))
    folded = fold(model, x)
    assert forms(folded) == {"1": "into producer"}
    assert not any(isinstance(m, type(norm)) for m in folded.model.modules())
    same(model, folded, x)


BEFORE = {
    "linear": (nn.BatchNorm1d(6), nn.Linear(6, 8), images(4, 6)),
    "conv without padding": (nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), images()),
    "conv without bias": (nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, bias=False), images()),
    "zeros": (nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), images()),
    "zeros, uneven": (
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, (3, 5), padding=(0, 2), stride=2), images(),
    ),
    "zeros in groups": (
        nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=2, groups=2, dilation=2), images(4, 4, 9, 9),
    ),
    "same": (nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding="same"), images()),
    "reflect": (
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), images(),
    ),
    "replicate": (
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate"), images(),
    ),
    "circular": (
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), images(),
    ),
    "1d": (nn.BatchNorm1d(3), nn.Conv1d(3, 8, 3, padding=1), images(4, 3, 9)),
    "3d": (nn.BatchNorm3d(3), nn.Conv3d(3, 8, 3, padding=1), images(2, 3, 5, 5, 5)),
    "transposed": (
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        images(4, 4, 9, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_a_norm_before_weights_vanishes_into_them_borders_included(name):
    norm, weights, x = BEFORE[name]
    model = lively(nn.Sequential(copy.deepcopy(norm), copy.deepcopy(weights), nn.ReLU()))
    folded = fold(model, x)
    assert forms(folded) == {"0": "into consumer"}
    same(model, folded, x)


def test_a_norm_before_a_padded_convolution_serves_other_sizes_of_images():
    model = lively(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)))
    folded = fold(model, images())
    other = images(2, 3, 17, 5)
    torch.testing.assert_close(folded.model(other), model(other))


def test_one_convolution_takes_up_the_norms_on_both_sides_of_it():
    model = lively(nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8),
    ))  # fmt: skip
    folded = fold(model, images())
    assert forms(folded) == {"0": "into consumer", "2": "into producer", "3": "into producer"}
    assert isinstance(folded.model[1], Shifted)
    same(model, folded, images())


def test_a_lone_norm_becomes_a_scale_and_shift():
    model = lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()))
    folded = fold(model, images())
    assert forms(folded) == {"1": "scale and shift"}
    assert isinstance(folded.model[1], ScaleShift)
    same(model, folded, images())


def test_norms_behind_one_another_become_one():
    model = lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()))
    folded = fold(model, images())
    assert forms(folded) == {"1": "into norm", "2": "scale and shift"}
    same(model, folded, images())


def test_a_model_that_is_a_norm_alone_is_folded():
    model = lively(nn.BatchNorm1d(6))
    folded = fold(model, images(4, 6))
    assert forms(folded) == {"": "scale and shift"}
    same(model, folded, images(4, 6))


def test_a_norm_vanishes_into_all_that_take_its_output():
    model = lively(Heads())
    folded = fold(model, images(4, 6))
    assert folded.pairs[0].into == "query, key, value"
    same(model, folded, images(4, 6))


class Flowing(nn.Module):
    """Weights and a norm with something between them."""

    def __init__(self, first: nn.Module, between: Any, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.between(self.first(x))))


PASSING = {
    "positions as examples": (
        nn.Linear(6, 8), lambda x: x.flatten(0, 1), nn.BatchNorm1d(8), images(4, 5, 6),
    ),
    "channels moved to the second axis": (
        nn.Linear(6, 8), lambda x: x.transpose(1, 2), nn.BatchNorm1d(8), images(4, 5, 6),
    ),
    "as many positions as channels, moved": (
        nn.Linear(6, 5), lambda x: x.transpose(1, 2), nn.BatchNorm1d(5), images(4, 5, 6),
    ),
    "channels shuffled": (
        nn.Conv2d(3, 8, 1),
        lambda x: x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
        nn.BatchNorm2d(8), images(),
    ),
    "pooled": (nn.Conv2d(3, 8, 1), lambda x: F.avg_pool2d(x, 3), nn.BatchNorm2d(8), images()),
    "pooled and flattened": (
        nn.BatchNorm2d(3), lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1), nn.Linear(12, 4),
        images(),
    ),
    "a mean": (nn.BatchNorm2d(3), lambda x: x.mean((2, 3)), nn.Linear(3, 4), images()),
    "a reflection": (
        nn.Conv2d(3, 8, 1), lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), nn.BatchNorm2d(8),
        images(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_a_norm_vanishes_through_what_only_moves_or_averages(name):
    first, between, second, x = PASSING[name]
    model = lively(Flowing(copy.deepcopy(first), between, copy.deepcopy(second)))
    folded = fold(model, x)
    assert len(folded.pairs) == 1
    assert folded.pairs[0].form in {"into producer", "into consumer"}
    same(model, folded, x)


class NormAct(nn.BatchNorm2d):
    """Norm, dropout and activation in one, as timm has them."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        out = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return self.act(self.drop(out))


class NormRelu(nn.BatchNorm2d):
    """Norm and a functional activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.2)


@pytest.mark.parametrize(
    "norm", [NormAct(8, nn.SiLU()), NormAct(8, nn.PReLU(8)), NormAct(8, nn.Identity()), NormRelu(8)]
)
def test_the_activation_of_a_subclass_is_kept(norm):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(norm)))
    folded = fold(model, images())
    assert forms(folded) == {"1": "into producer"}
    same(model, folded, images())


class FrozenNorm(nn.Module):
    """A norm that is four buffers, as in detectors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def test_a_norm_of_buffers_alone_is_known_by_what_it_computes():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenNorm(8)))
    assert forms(fold(model, images())) == {"1": "into producer"}


@pytest.mark.parametrize("act", [nn.SiLU(), nn.PReLU(8), nn.Identity()])
def test_a_frozen_norm_with_an_activation_inside_keeps_it(act):
    frozen = others.FrozenNormAct(8, copy.deepcopy(act))
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), frozen))
    folded = fold(model, images())
    assert forms(folded) == {"1": "into producer"}
    assert isinstance(folded.model[1], type(act))
    same(model, folded, images())


@pytest.mark.parametrize("norm", [others.CountedFrozenNorm, others.NumberFrozenNorm])
def test_frozen_norms_of_other_packages_fold_with_their_own_eps(norm):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)))
    model[1].running_var.fill_(1e-6)  # where eps counts
    folded = fold(model, images())
    assert forms(folded) == {"1": "into producer"}
    same(model, folded, images())


class Wrong(FrozenNorm):
    """Has the buffers of a norm, and does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1)


def test_what_only_looks_like_a_norm_is_left():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), Wrong(8)))
    assert "does not compute" in reasons(fold(model, images()))["1"]


class Residual(nn.Module):
    """TrueNorm's layer with a residual sum and an activation in one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = tn.BatchNorm2d(3, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), residual=x)


def test_the_residual_sum_of_our_layer_is_kept():
    model = lively(Residual())
    folded = fold(model, images())
    assert forms(folded) == {"norm": "into producer"}
    same(model, folded, images())


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 1e-30])
@pytest.mark.parametrize("before", [True, False])
def test_a_negative_zero_or_tiny_gamma_folds(gamma, before):
    parts = [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)]
    model = lively(nn.Sequential(*(parts if before else parts[::-1])))
    for m in model:
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data[:2] = gamma
    same(model, fold(model, images()), images())


def test_weights_that_would_be_subnormal_are_zero():
    model = lively(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    model[1].weight.data.fill_(1e-38)
    weight = fold(model, images(4, 6)).model[0].weight
    assert (weight.abs()[weight != 0] >= torch.finfo(torch.float32).tiny).all()
    assert (weight == 0).any()


# -- what is left, and why ------------------------------------------------------------------------


class Branching(nn.Module):
    """A convolution and a norm, used in a way that forbids folding."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:  # noqa: PLR0911
        y = self.conv(x)
        if self.way == "twice":
            return self.norm(y) + y
        if self.way == "returned":
            return self.norm(y), y
        if self.way == "kept":
            self.seen = y
        if self.way == "reused":
            return self.norm(y) + self.other(self.conv(x + 1))
        if self.way == "norm reused":
            return self.norm(y) + self.norm(x)
        if self.way == "changed":
            z = self.norm(y)
            y.add_(1)
            return z + y
        if self.way == "read" and y.mean().item() > 1e9:
            return y
        if self.way == "script":
            return self.norm(y) + scripted(y)
        return self.norm(y)


def scripted(x: Tensor) -> Tensor:
    """Uses ``x`` where torch's Python functions do not pass."""
    return torch.ops.aten.mul.Tensor(x, x)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("twice", "the output of conv is also used by add"),
        ("returned", "the output of conv is returned by the model"),
        ("kept", "the output of conv is kept after the forward"),
        ("reused", "conv.weight is used 2 times"),
        ("norm reused", "is called 2 times"),
        ("changed", "the output of conv is also used by add"),
        ("script", "the output of conv is also used by mul"),
    ],
)
def test_what_is_used_otherwise_is_left(way, reason):
    model = lively(Branching(way))
    folded = fold(model, images())
    assert reason in reasons(folded)["norm"]
    out, expected = folded.model(images()), model(images())
    for a, b in zip(*([t] if isinstance(t, Tensor) else t for t in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["conv", "norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_what_a_hook_sees_is_left(where, kind):
    model = lively(Branching("plain"))
    seen: list[Any] = []
    getattr(getattr(model, where), kind)(lambda *given: seen.append(len(given)))
    assert "hook" in reasons(fold(model, images()))["norm"]


def test_a_hook_around_the_weights_is_respected():
    model = lively(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)))
    model[0].register_forward_hook(lambda *_: None)
    assert "seen by a hook of 0" in reasons(fold(model, images()))["1"]


def test_shared_weights_are_left():
    model = lively(nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
    ))  # fmt: skip
    model[3].weight = model[0].weight
    left = reasons(fold(model, images()))
    assert left == {
        "1": "0.weight is shared with 3.weight",
        "4": "0.weight is shared with 3.weight",
    }


def test_weights_that_were_views_of_one_memory_fold_in_a_copy_of_their_own():
    model = lively(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)))
    both = torch.randn(2, 6, 6)
    model[0].weight, model[3].weight = nn.Parameter(both[0]), nn.Parameter(both[1])
    same(model, fold(model, images(4, 6)), images(4, 6))
    assert torch.equal(both[0], model[0].weight)


@pytest.mark.parametrize(
    "parametrized", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_a_parametrized_weight_is_left(parametrized):
    model = lively(nn.Sequential(parametrized(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)))
    folded = fold(model, images())
    assert "computed anew" in reasons(folded)["1"]
    torch.testing.assert_close(folded.model(images()), model(images()))


def test_norms_in_train_mode_or_without_statistics_are_left():
    model = lively(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
    ))  # fmt: skip
    model[1].train()
    left = reasons(fold(model, images()))
    assert "train mode" in left["1"]
    assert "running statistics" in left["3"]


def test_a_linear_layer_over_positions_is_not_taken_for_one_over_channels():
    model = lively(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    folded = fold(model, images(4, 5, 5))  # L == C: the usual fold errs, silently
    assert "channels" in reasons(folded)["1"]
    torch.testing.assert_close(folded.model(images(4, 5, 5)), model(images(4, 5, 5)))


@pytest.mark.parametrize("between", [torch.relu, lambda x: x + 1, lambda x: F.pad(x, (1, 1))])
def test_a_function_between_keeps_the_norm_out_of_the_weights(between):
    model = lively(Flowing(nn.Conv2d(3, 8, 1), between, nn.BatchNorm2d(8)))
    folded = fold(model, images())
    assert forms(folded).get("second", "left") in {"scale and shift", "left"}
    same(model, folded, images())


class Choosing(nn.Module):
    """Its forward depends on the numbers, as tracing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norm_low, self.norm_high = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.norm_high(self.high(x))
        return self.norm_low(self.low(x))


def test_a_branch_that_the_example_does_not_take_is_left_and_still_right():
    model = lively(Choosing())
    folded = fold(model, images().abs())
    assert forms(folded) == {"norm_high": "into producer"}
    assert "not called" in reasons(folded)["norm_low"]
    for x in (images().abs(), -images().abs()):
        torch.testing.assert_close(folded.model(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_mask_keeps_our_layer():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 8, 1), tn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x), mask=torch.ones(len(x), x.shape[2], dtype=torch.bool))

    assert "mask" in reasons(fold(lively(Masked()), images(4, 3, 9)))["norm"]


# -- the model as a whole -------------------------------------------------------------------------


def test_the_original_is_untouched():
    model = resnet()
    before = copy.deepcopy(model)
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    fold(model, images(4, 3, 12, 12))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [m.training for m in model.modules()] == modes
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_models_fold_within_their_precision(dtype):
    model = resnet().to(dtype)
    x = images(4, 3, 12, 12).to(dtype)
    folded = fold(model, x)
    assert folded.pairs
    assert folded.model(x).dtype == dtype
    exact = copy.deepcopy(model).double()(x.double())
    own, new = ((m(x).double() - exact).abs().max() for m in (model, folded.model))
    assert new <= max(4 * own, torch.finfo(dtype).eps * exact.abs().max() * 4)


def test_every_module_of_a_folded_model_is_in_the_mode_of_what_it_replaced():
    model = lively(nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), NormAct(8, nn.SiLU()),
        NormRelu(8), tn.BatchNorm2d(8, act="relu"),
    ))  # fmt: skip
    scaling = tn.Scaling(torch.zeros(1), torch.ones(1))
    for folded in (fold(model, images()), fold(model, images(), scaling=scaling)):
        assert folded.pairs
        assert not any(module.training for module in folded.model.modules())


def test_channels_last_weights_stay_so():
    model = resnet().to(memory_format=torch.channels_last)
    folded = fold(model, images(4, 3, 12, 12).to(memory_format=torch.channels_last))
    convs = [
        m for m in folded.model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[2] > 1
    ]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)


def test_a_folded_structure_is_given_to_a_fresh_model():
    model = lively(nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, bias=False), NormAct(8, nn.SiLU()),
        nn.BatchNorm2d(8), tn.BatchNorm2d(8, act="relu"),
    ))  # fmt: skip
    folded = fold(model, images())
    fresh = lively(copy.deepcopy(model), seed=3)
    again = refold(fresh, folded.plan)
    again.load_state_dict(folded.model.state_dict())
    assert torch.equal(again(images()), folded.model(images()))


def test_an_input_scaling_vanishes_into_the_first_layer():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)))
    scaling = tn.Scaling(torch.tensor([[[100.0]], [[120.0]], [[90.0]]]), torch.full((1,), 1 / 60))
    raw = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    folded = fold(model, raw, scaling=scaling)
    assert forms(folded) == {"(input scaling)": "into consumer", "1": "into producer"}
    torch.testing.assert_close(folded.model(raw), model(scaling(raw)), atol=1e-4, rtol=1e-4)
    assert folded.error < 1e-5


def test_an_input_scaling_that_no_layer_can_take_stays_in_the_model():
    model = lively(nn.Sequential(nn.ReLU(), nn.Linear(6, 8), nn.BatchNorm1d(8)))
    scaling = tn.Scaling(torch.arange(6.0), torch.full((6,), 0.5))
    folded = fold(model, images(4, 6), scaling=scaling)
    assert "(input scaling)" in reasons(folded)
    torch.testing.assert_close(folded.model(images(4, 6)), model(scaling(images(4, 6))))


class Standardize(nn.Module):
    """(x / 255 - mean) / std, as a module at a model's front."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() / 255 - self.mean) / self.std


def test_a_module_that_scales_the_input_vanishes_into_the_first_layer():
    model = lively(nn.Sequential(Standardize(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    raw = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    folded = fold(model, raw)
    assert forms(folded) == {"0": "into consumer", "2": "into producer"}
    torch.testing.assert_close(folded.model(raw), model(raw), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_proved_is_undone(monkeypatch):
    from truenorm.folding import affine

    model = lively(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8)))
    right = affine.Weighted.followed_by
    monkeypatch.setattr(
        affine.Weighted,
        "followed_by",
        lambda self, a: right(self, a._replace(shift=a.shift + 0.01)),
    )
    folded = fold(model, images(4, 6))
    assert "proof failed" in reasons(folded)["1"]
    assert forms(folded) == {"3": "scale and shift"}
    torch.testing.assert_close(folded.model(images(4, 6)), model(images(4, 6)))


def test_what_is_wrong_from_end_to_end_is_undone_alone(monkeypatch):
    from truenorm.folding import building as writing

    model = lively(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    )
    write = writing._write

    def spoil(model, target, owner):
        write(model, target, owner)
        if target.weights.owner == "2":
            owner.weight.data.mul_(1.01)

    monkeypatch.setattr(writing, "_write", spoil)
    folded = fold(model, images(4, 6))
    assert forms(folded) == {"1": "into producer"}
    assert "outputs are others" in reasons(folded)["3"]


@pytest.mark.parametrize(
    ("example", "told"),
    [("text", "example_inputs must be"), (images(4, 7), "does not run on example_inputs")],
)
def test_a_wrong_example_is_refused(example, told):
    model = lively(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    with pytest.raises(tn.InputError, match=told):
        fold(model, example)


def test_a_wrapped_model_is_folded_inside():
    model = lively(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert forms(fold(wrapped, images(4, 6))) == {"1": "into producer"}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["conv", "norm", "relu", "pool", "own"]), min_size=1, max_size=6),
    st.integers(0, 2**16),
)
def test_any_chain_of_layers_is_the_same_after_folding(kinds, seed):
    torch.manual_seed(seed)
    made = {
        "conv": lambda: nn.Conv2d(4, 4, 3, padding=seed % 3, groups=1 + seed % 2),
        "norm": lambda: nn.BatchNorm2d(4),
        "relu": nn.ReLU,
        "pool": lambda: nn.AvgPool2d(2, 1),
        "own": lambda: tn.BatchNorm2d(4, act=(None, "silu")[seed % 2]),
    }
    model = lively(nn.Sequential(*(made[kind]() for kind in kinds)), seed)
    x = images(2, 4, 16, 16)
    folded = fold(model, x)
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    assert len(folded.pairs) == len(norms)
    same(model, folded, x, 1e-10)
