"""Norms of other packages are known by what they hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foreign as others
import truenorm as tn
from truenorm.layers.foreign import epsilon, frozen_statistics, fused


class Whitened(nn.Module):
    """Statistics, but learned: not frozen."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))


@pytest.mark.parametrize("kind", others.FROZEN)
def test_a_frozen_norm_is_known_by_its_buffers(kind):
    assert frozen_statistics(kind(3))


def test_an_activation_with_parameters_does_not_thaw_a_frozen_norm():
    assert frozen_statistics(others.FrozenNormAct(3, nn.PReLU(3)))


def unequal():
    norm = others.FrozenNorm(3)
    norm.running_mean = torch.zeros(4)
    return norm


def square():
    norm = others.FrozenNorm(3)
    for name in dict(norm.named_buffers()):
        setattr(norm, name, torch.zeros(3, 3))
    return norm


def partial():
    norm = others.FrozenNorm(3)
    norm.bias = None
    return norm


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, affine=False),
        nn.GroupNorm(1, 3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.Linear(3, 3),
        nn.ReLU(),
        tn.BatchNorm2d(3, frozen=True),
        others.BatchNormAct(3),
        Whitened(),
        unequal(),
        square(),
        partial(),
        nn.Sequential(others.FrozenNorm(3)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_frozen_norm_of_others_is_not_taken_for_one(module):
    assert not frozen_statistics(module)


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (others.BatchNormAct(3, act=nn.ReLU()), ("drop", "act")),
        (others.SyncBatchNormAct(3, nn.SiLU()), ("drop", "act")),
        (others.GroupNormAct(4, 2, nn.ReLU()), ("drop", "act")),
        (others.FrozenNormAct(3, nn.PReLU(3)), ("drop", "act")),
        (others.ActivationGroupNorm(4, 2), ("activation",)),
        (others.FrozenNorm(3), ()),
        (nn.BatchNorm2d(3), ()),
        (tn.BatchNorm2d(3, act="relu"), ()),
        (nn.GroupNorm(1, 3), ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_norm_applies_afterwards_is_named_in_its_order(norm, names):
    assert fused(norm) == names


def test_a_norm_with_a_child_whose_part_is_not_known_names_none():
    norm = others.BatchNormAct(3, act=nn.ReLU())
    norm.gate = nn.Linear(3, 3)
    assert fused(norm) == ()


def test_children_of_what_is_no_norm_are_not_its_own_part():
    block = nn.Module()
    block.act = nn.ReLU()
    assert fused(block) == ()


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, tn.BatchNorm2d, others.FrozenNorm])
def test_the_epsilon_of_a_norm_is_what_it_was_given(kind, eps):
    assert epsilon(kind(3, eps=eps)) == eps


def test_an_epsilon_that_is_a_number_in_the_forward_is_measured():
    norm = others.NumberFrozenNorm(3)
    norm.running_var.fill_(7)
    assert epsilon(norm) == 1e-5
    assert norm.running_var.tolist() == [7, 7, 7]  # and nothing of it was touched


def test_measuring_an_epsilon_calls_no_hook():
    norm = others.NumberFrozenNorm(3)
    norm.register_forward_hook(lambda *_: pytest.fail("called"))
    assert epsilon(norm) == 1e-5
