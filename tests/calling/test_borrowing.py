from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

import patients
import truenorm as tn
from patients import batches, trained
from truenorm.calling.borrowing import borrowed, evaluating, to_eval, unwrapped


class Restless(nn.Module):
    """Whatever a forward may do to its module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("absent", None)
        self.cache, self.log, self.table = torch.zeros(3), ["begun"], {"a": 1}

    def forward(self, x):
        self.calls += 1
        self.cache.add_(1)
        self.log.append(len(x))
        self.table["b"] = x
        self.last = x
        self.absent = x.mean(0)
        self.register_buffer("late", x.mean())
        self.extra = nn.Linear(1, 1)
        self.linear.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            self.linear.weight.mul_(1.5)
        return self.norm(self.linear(x)) + torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002


def bits(tensor):
    return None if tensor is None else (id(tensor), tensor.dtype, tensor.detach().numpy().tobytes())


def everything(model):
    """All of a model and of the random states, to the bit; objects by identity."""
    seen = []
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            if isinstance(value, torch.Tensor):
                seen.append((name, key, bits(value)))
            elif key in ("_parameters", "_buffers"):
                seen += [(name, key, k, bits(v)) for k, v in value.items()]
            elif isinstance(value, (dict, list, set)):
                held = value.items() if isinstance(value, dict) else value
                seen.append((name, key, id(value), [str(v) for v in held]))
            else:
                seen.append((name, key, str(value)))
    for name, parameter in model.named_parameters():
        seen.append((name, parameter.requires_grad, bits(parameter.grad)))
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    return seen, states


def restless():
    torch.manual_seed(0)
    model = Restless()
    x = torch.randn(8, 6)
    model.linear(x).sum().backward()
    model.norm.eval()
    model.linear.bias.requires_grad_(False)
    return model, x


def disturb(model, x):
    model(x)
    model.eval()
    model.norm.running_var[0] = float("nan")
    model.norm.running_mean.data = torch.ones(9)
    model.norm.num_batches_tracked = torch.tensor(7)
    model.norm.weight = nn.Parameter(torch.zeros(4))
    model.linear.weight.grad.zero_()
    model.linear.bias.grad = torch.ones(4)
    model.linear.bias.requires_grad_(True)
    model.register_forward_pre_hook(lambda *_: None)
    del model.table["a"]
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_borrowed_is_given_back_to_the_bit(fails):
    model, x = restless()
    before = everything(model)
    try:
        with borrowed(model):
            disturb(model, x)
            assert everything(model) != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert everything(model) == before


def test_what_was_not_finite_or_a_negative_zero_stays_so():
    model = nn.BatchNorm1d(3)
    model.running_mean.copy_(torch.tensor([float("nan"), -0.0, float("inf")]))
    before = everything(model)
    with borrowed(model):
        model.running_mean.zero_()
    assert everything(model) == before


def test_what_is_kept_stays_unless_the_body_fails():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    with borrowed(model) as loan:
        for norm in model:
            norm.running_mean.fill_(3)
        loan.keep = {model[0]}
    assert [float(n.running_mean[0]) for n in model] == [3, 0]
    with contextlib.suppress(ValueError), borrowed(model) as loan:
        loan.keep = {model[0]}
        model[0].running_mean.fill_(5)
        raise ValueError
    assert float(model[0].running_mean[0]) == 3


def test_a_lazy_layer_is_lazy_again():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with borrowed(model):
        assert model(torch.randn(5, 3)).shape == (5, 4)
    assert [type(m) for m in model] == [nn.LazyLinear, nn.LazyBatchNorm1d]
    assert model[1].has_uninitialized_params()
    assert model(torch.randn(5, 7)).shape == (5, 4)
    assert model[0].weight.shape == (4, 7)


def test_tied_tensors_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with borrowed(model), torch.no_grad():
        model[0].weight.zero_()
    assert model[1].weight is model[0].weight
    assert model[0].weight.any()


def test_a_waiting_backward_is_not_spoiled():
    model, x = trained("mlp").train(), batches("mlp")[0][0]
    loss = model(x).sum()
    with borrowed(model):
        model(x)
    loss.backward()


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_gives_every_mode_back(fails):
    model = trained("resnet").train()
    patients.norms(model)[0].eval()
    modes = [m.training for m in model.modules()]
    try:
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            assert 1 // (not fails)
    except ZeroDivisionError:
        assert fails
    assert [m.training for m in model.modules()] == modes
    to_eval(model)
    assert not any(m.training for m in model.modules())


def test_a_model_is_found_under_all_its_wrappers():
    model = trained("mlp")
    assert unwrapped(model) is model
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("doing", [tn.examine, tn.recalibrate])
def test_a_restless_model_is_left_as_it_was(doing, fails):
    model, _ = restless()
    model.norm.eval()
    data = [torch.randn(8, 6) for _ in range(4)]
    if fails:
        data[2] = torch.randn(8, 5)
    before = everything(model)
    if fails:
        with pytest.raises(RuntimeError):
            doing(model, data)
    elif doing is tn.examine:
        tn.examine(model, data)
    else:
        model.norm.requires_grad_(False)
        model.train()
        model.norm.eval()  # frozen
        before = everything(model)
        tn.recalibrate(model, data)
    if doing is tn.recalibrate:  # forwards alone do not write parameters, and they are not copied
        drop = ("linear", "_parameters", "weight")
        before, after = ([r for r in e[0] if r[:3] != drop] for e in (before, everything(model)))
        assert after == before
    else:
        assert everything(model) == before


def test_a_ledger_keeps_the_hooks_that_it_takes_off_and_puts_on_meanwhile():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    with tn.watch(model) as ledger:
        with borrowed(model):
            ledger._unhook()
        assert not model[1]._forward_hooks
        with borrowed(model):
            ledger._hook()
        assert len(model[1]._forward_hooks) == len(model[1]._forward_hooks_always_called) == 1
    assert not model[1]._forward_hooks
