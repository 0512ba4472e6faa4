"""A forward that depends on size, argument or value: folded right, left, or told of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import truenorm as tn
from foldable import images, lively
from truenorm.folding.fold import Folded, fold


def forms(folded: Folded) -> dict[str, str]:
    return {pair.norm: pair.form for pair in folded.pairs}


def reasons(folded: Folded) -> dict[str, str]:
    return dict(folded.left)


def agree(model: nn.Module, folded: Folded, *given: Any, **named: Any) -> None:
    """The folded model's answer is the original's."""
    with torch.no_grad():
        expected, got = model(*given, **named), folded.model(*given, **named)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# -- by size --------------------------------------------------------------------------------------


class SameConv(nn.Conv2d):
    """Pads as much as keeps ceil(size / stride) outputs, so that nothing is lost at the border."""

    def forward(self, x: Tensor) -> Tensor:
        amounts: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            need = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            amounts += [need // 2, need - need // 2]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride)


class Sized(nn.Module):
    """A norm and a convolution, with something between them that the image's size decides."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm, self.conv = way, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
        self.more = nn.Conv2d(3, 3, 1)  # of another shape than conv's: not taken for its twin

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "pad if odd":
            x = self.norm(x)
            return self.conv(F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x).relu()
        if self.way == "pad by amounts":
            short = -x.shape[-1] % 4
            return self.conv(F.pad(self.norm(x), (0, short, 0, short))).relu()
        if self.way == "pad behind":
            y = self.conv(x)
            return self.norm(F.pad(y, (0, 1, 0, 1)) if y.shape[-1] % 2 else y).tanh()
        if self.way == "more for large":
            y = self.conv(x)
            return self.norm(self.more(y) if x.shape[-1] > 12 else y).relu()
        raise AssertionError(self.way)


SIZED = {
    "same, 3x3 by 3": (lambda: nn.Sequential(nn.BatchNorm2d(3), SameConv(3, 8, 3, 3)), 9),
    "same, 2x2 by 2": (lambda: nn.Sequential(nn.BatchNorm2d(3), SameConv(3, 8, 2, 2)), 8),
    **{
        way: (lambda way=way: Sized(way), size)
        for way, size in {
            "pad if odd": 8, "pad by amounts": 8, "pad behind": 8, "more for large": 8,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_what_the_size_decides_is_right_at_every_size(name):
    make, size = SIZED[name]
    model = lively(make())
    folded = fold(model, images(2, 3, size, size))
    for other in (*range(5, 14), 16, 17, 24):
        agree(model, folded, images(2, 3, other, other + 1))


# -- by argument ----------------------------------------------------------------------------------


class Domains(nn.Module):
    """One convolution, a norm for each domain."""

    def __init__(self, holder: type[nn.Module] | None = nn.ModuleList) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
        if holder is nn.ModuleList:
            self.norms: Any = nn.ModuleList(norms)
        elif holder is nn.ModuleDict:
            self.norms = nn.ModuleDict({"0": norms[0], "1": norms[1]})
        else:
            self.norm0, self.norm1 = norms
        self.named = holder is nn.ModuleDict

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        if hasattr(self, "norms"):
            norm = self.norms[str(domain) if self.named else domain]
        else:
            norm = getattr(self, f"norm{domain}")
        return norm(self.conv(x))


@pytest.mark.parametrize("holder", [nn.ModuleList, nn.ModuleDict, None])
def test_a_norm_for_each_domain_is_left(holder):
    model = lively(Domains(holder))
    folded = fold(model, images())
    assert "which the forward of the example does not call" in str(reasons(folded))
    for domain in (0, 1):
        agree(model, folded, images(), domain)


class Experts(nn.Module):
    """A convolution for each expert, one norm behind all."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)])
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        return self.norm(self.convs[expert](x))


def test_a_norm_behind_a_chosen_convolution_is_left():
    model = lively(Experts())
    folded = fold(model, images())
    assert "convs.1" in reasons(folded)["norm"]
    for expert in (0, 1):
        agree(model, folded, images(), expert)


class Exits(nn.Module):
    """Blocks that each hold their own pair, of which an argument takes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)
        )

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        for block in self.blocks[:depth]:
            x = block(x)
        return x


def test_blocks_that_are_not_run_hinder_no_fold_in_those_that_are():
    model = lively(Exits())
    folded = fold(model, images())
    assert forms(folded) == {"blocks.0.1": "into producer", "blocks.1.1": "into producer"}
    for depth in (1, 2, 3):
        agree(model, folded, images(), depth)


class Optional(nn.Module):
    """A pair whose norm or output an argument, an attribute or a value treats otherwise."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.off = way, False
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(
        self, x: Tensor, more: Tensor | None = None, *, plain: bool = False, mc: bool = False
    ) -> Tensor:
        y = self.conv(x)
        if self.way == "dropout":
            y = F.dropout(y, 0.5, training=mc)
        if plain or self.off or (self.way == "value" and x.mean() > 5):
            return y
        if self.way == "skip" and more is not None:
            return self.norm(y) + y * more
        if self.way == "mask" and more is not None:
            y = y * more
        return self.norm(y)


def test_a_norm_that_a_flag_skips_is_left_and_the_flag_told():
    model = lively(Optional("flag"))
    folded = fold(model, images())
    assert "plain=True" in reasons(folded)["norm"]
    for plain in (False, True):
        agree(model, folded, images(), plain=plain)


@pytest.mark.parametrize("way", ["skip", "mask"])
def test_an_argument_that_no_example_gives_is_told_and_with_an_example_proved(way):
    model = lively(Optional(way))
    folded = fold(model, images(), forward_only=True)
    assert any("argument more" in told for told in folded.unproved)
    more = (images(4, 3, 9, 9) > 0).float()
    folded = fold(model, images(), examples=[(images(), more)], forward_only=True)
    assert "norm" in reasons(folded)
    agree(model, folded, images())
    agree(model, folded, images(), more)


def test_a_choice_by_value_is_told_and_with_an_example_proved():
    model = lively(Optional("value"))
    told = fold(model, images(), forward_only=True).unproved
    assert any("reads values of tensors" in line for line in told)
    folded = fold(model, images(), examples=[images() + 10], forward_only=True)
    assert "norm" in reasons(folded)
    for x in (images(), images() + 10):
        agree(model, folded, x)


def test_a_dropout_that_may_work_later_keeps_the_norm_out_of_the_weights():
    model = lively(Optional("dropout"))
    folded = fold(model, images(), forward_only=True)
    assert forms(folded) == {"norm": "scale and shift"}
    for mc in (False, True):
        torch.manual_seed(0)
        expected = model(images(), mc=mc)
        torch.manual_seed(0)
        torch.testing.assert_close(folded.model(images(), mc=mc), expected)


def test_a_dropout_of_nothing_lets_a_norm_pass():
    model = lively(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.0), nn.Linear(6, 8)))
    assert forms(fold(model, images(4, 6))) == {"0": "into consumer"}


# -- several examples -----------------------------------------------------------------------------


class Paths(nn.Module):
    """Two pairs, of which an argument takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.b = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor, which: str = "a") -> Tensor:
        return torch.relu(self.a(x) if which == "a" else self.b(x))


def test_what_only_another_example_calls_is_folded_with_it():
    model = lively(Paths())
    assert forms(fold(model, images())) == {"a.1": "into producer"}
    folded = fold(model, images(), examples=[(images(), "b")])
    assert forms(folded) == {"a.1": "into producer", "b.1": "into producer"}
    for which in ("a", "b"):
        agree(model, folded, images(), which)


def test_norms_for_domains_stay_with_an_example_of_each():
    model = lively(Domains())
    folded = fold(model, images(), examples=[(images(), 1)])
    assert set(reasons(folded)) == {"norms.0", "norms.1"}
    for domain in (0, 1):
        agree(model, folded, images(), domain)


def test_an_example_that_does_not_run_is_refused_by_its_place():
    with pytest.raises(tn.InputError, match=r"examples\[1\]"):
        fold(lively(Paths()), images(), examples=[images(), images(4, 5, 9, 9)])
