from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import reference
from truenorm import TrainConfig
from truenorm.training.optimizer import Optimizer, decaying, learning_rate


def follow(config, rule, steps=5, regularize=lambda value: 0.0):
    """The weights after some steps, ours and the reference's, from the same gradients."""
    rng = np.random.default_rng(0)
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(rng.normal(size=(2, 3))))
        model.bias.copy_(torch.from_numpy(rng.normal(size=2)))
    expected = model.weight.detach().numpy().copy()
    optimizer = Optimizer(model, config)
    for _ in range(steps):
        grad = rng.normal(size=(2, 3))
        model.weight.grad = torch.from_numpy(grad.copy())
        optimizer.step(0.01)
        expected = rule.step("w", expected, grad + regularize(expected), 0.01)
    return model.weight.detach().numpy(), expected


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("adam", reference.Adam(decay=0.1)),
        ("adamw", reference.Adam(decay=0.1, decoupled=True)),
        ("sgd", reference.Sgd(decay=0.1)),
    ],
)
def test_updates_follow_the_float64_reference(name, rule):
    ours, expected = follow(TrainConfig(optimizer=name, weight_decay=0.1), rule)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_l1_penalty_adds_its_sign_to_the_gradient():
    config = TrainConfig(optimizer="sgd", l1=0.3)
    ours, expected = follow(config, reference.Sgd(), regularize=lambda w: 0.3 * np.sign(w))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_decay_leaves_normalization_parameters_and_biases_alone():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 2, 2]), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip
    assert decaying(model) == {model[0].weight, model[4].weight}
    config = TrainConfig(optimizer="adamw", weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(model, config).step(0.1)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, False, False, False, False, True, False]


def test_decay_all_decays_all():
    model = nn.BatchNorm1d(3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(model, TrainConfig(optimizer="adamw", weight_decay=0.5, decay_all=True)).step(0.1)
    torch.testing.assert_close(model.weight.detach(), torch.full((3,), 0.95))


def test_clipping_scales_the_whole_gradient_to_its_norm():
    model = nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    model.weight.grad, model.bias.grad = torch.tensor([[30.0, 0.0]]), torch.tensor([40.0])
    Optimizer(model, TrainConfig(optimizer="sgd", clip_norm=1.0)).step(1.0)
    moves = torch.cat([(b - a).flatten() for a, b in zip(model.parameters(), before, strict=True)])
    # The first Nesterov step moves by (1 + 0.9) times the gradient.
    torch.testing.assert_close(moves, 1.9 * torch.tensor([0.6, 0.0, 0.8]), rtol=1e-4, atol=1e-6)


def test_a_parameter_without_gradient_keeps_its_own_count_of_steps():
    model = nn.ModuleList([nn.Linear(1, 1, bias=False).double() for _ in range(2)])
    optimizer = Optimizer(model, TrainConfig())
    rules = [reference.Adam(), reference.Adam()]
    expected = [m.weight.item() for m in model]
    for used in ([0, 1], [0], [1], [0, 1]):
        for i, layer in enumerate(model):
            layer.weight.grad = torch.ones(1, 1).double() * (i + 1) if i in used else None
            if i in used:
                expected[i] = rules[i].step("w", expected[i], i + 1.0, 0.1)
        optimizer.step(0.1)
    np.testing.assert_allclose([m.weight.item() for m in model], expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_stored_state_continues_to_the_bit(name, tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            model.weight.grad = torch.randn(3, 4, generator=draw)
            optimizer.step(0.1)

    config = TrainConfig(optimizer=name, weight_decay=0.1)
    model, again = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = Optimizer(model, config)
    run(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state()}, tmp_path / "s.pt")
    run(model, optimizer, range(3, 6))
    stored = torch.load(tmp_path / "s.pt", weights_only=True)
    again.load_state_dict(stored["model"])
    second = Optimizer(again, config)
    second.load(stored["optimizer"])
    run(again, second, range(3, 6))
    assert torch.equal(model.weight, again.weight)


@pytest.mark.parametrize("step", [0, 3, 10, 11, 55, 99])
def test_one_cycle_rises_and_falls_in_straight_lines(step):
    config = TrainConfig(schedule="onecycle", lr=0.02, warmup=0.1)
    expected = reference.one_cycle(step, 100, 0.02, 0.1)
    assert learning_rate(config, step, 100) == pytest.approx(expected)


def test_the_other_schedules_start_at_the_rate():
    cosine, constant = TrainConfig(schedule="cosine", lr=0.3), TrainConfig(lr=0.3)
    assert learning_rate(cosine, 0, 10) == 0.3
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.15)
    assert learning_rate(cosine, 9, 10) == pytest.approx(0.15 * (1 + math.cos(0.9 * math.pi)))
    assert {learning_rate(constant, s, 10) for s in range(10)} == {0.3}
    assert learning_rate(TrainConfig(schedule="onecycle", warmup=0.0), 0, 10) == 1e-3
