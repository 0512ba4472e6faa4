from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import truenorm as tn

AT_ONCE = tn.Renorm(start=0, rmax_at=0, dmax_at=0)
RISING = tn.Renorm(rmax=1.5, dmax=0.5, start=0, rmax_at=4, dmax_at=4)
OPTIONS = [
    {},
    {"ghost": 4},
    {"renorm": AT_ONCE},
    {"min_count": 20},
    {"min_count": 100},
    {"min_count": 100, "renorm": AT_ONCE},
    {"ghost": 4, "renorm": AT_ONCE},
    {"ghost": 4, "min_count": 13},
    {"momentum": None},
    {"track_running_stats": False},
    {"act": "relu"},
]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(*shape):
    return normal(*shape, seed=9) > -0.7


def assert_same_training(run, eager, layer, x, *arguments):
    """Outputs, gradients and statistics of ``run``, which is ``layer``, over two forwards."""
    for step in range(2):
        given = [x.clone().requires_grad_() for _ in range(2)]
        outs = [f(one, *arguments) for f, one in zip((run, eager), given, strict=True)]
        assert_close(*outs)
        for out in outs:
            out.backward(normal(*x.shape, seed=step))
        assert_close(given[0].grad, given[1].grad)
    for one, other in zip(layer.parameters(), eager.parameters(), strict=True):
        assert_close(one.grad, other.grad)
    assert_close(layer.state_dict(), eager.state_dict())


# -- torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_whole_and_gives_the_same_numbers(options, masked):
    layer, eager = (tn.BatchNorm1d(3, **options) for _ in range(2))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask = (some(11, 4),) if masked else ()
    assert_same_training(run, eager, layer, normal(11, 3, 4) * 2 + 1, *mask)


@pytest.mark.parametrize(
    "options", [{}, {"ghost": 4}, {"min_count": 100}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_backward_corrects_by_what_the_forward_read(options, masked, dynamic):
    """Before the forward moved it: mean, variance, and the number by which the limits rise."""
    layer, eager = (tn.BatchNorm2d(4, renorm=RISING, **options).double() for _ in range(2))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = normal(12, 4, 3, 3).double() * 2 + 1
    mask = (some(12, 3, 3),) if masked else ()
    for factor in (1, 2, 0.5):
        assert_same_training(run, eager, layer, x * factor, *mask)


@pytest.mark.parametrize("shape", [(70_001, 3), (33, 2, 50, 50)], ids=str)
@pytest.mark.parametrize("mean", [0, 1e4])
def test_it_compiles_whole_with_very_many_values(shape, mean):
    """On a CPU, where eager looks at the values that torch's kernel found."""
    kind = tn.BatchNorm1d if len(shape) == 2 else tn.BatchNorm2d
    layer, eager = (kind(shape[1]) for _ in range(2))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(*shape) + mean
    x = x if x.ndim == 2 else x.to(memory_format=torch.channels_last)
    y, right = run(x), (x.double() - over(x.double().mean, x)) / over(x.double().var, x).sqrt()
    assert_close(y.double(), right, rtol=1e-3, atol=1e-3)
    eager(x)
    assert_close(layer.running_var, eager.running_var, rtol=1e-3, atol=0)


def over(statistic, x):
    return statistic(dim=[a for a in range(x.ndim) if a != 1], keepdim=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler's own
def test_a_step_does_not_compile_whole_and_says_why():
    layer = tn.BatchNorm1d(3, commit="step")
    x = normal(11, 3)
    with pytest.raises(Exception, match="compile with fullgraph=False, or set commit='forward'"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    eager = tn.BatchNorm1d(3, commit="step")
    for one in (torch.compile(layer, backend="eager"), eager):
        one(x).sum().backward()
    layer.commit(), eager.commit()
    assert_close(layer.state_dict(), eager.state_dict())


# -- the meta device, make_fx and export -------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_meta_it_knows_its_shape(options):
    layer = tn.BatchNorm1d(3, device="meta", **options)
    x = torch.empty(11, 3, 4, device="meta")
    assert layer(x, torch.empty(11, 4, dtype=torch.bool, device="meta")).shape == x.shape
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_make_fx_writes_down_what_happens(options, training):
    layer, eager = (tn.BatchNorm1d(3, **options).train(training) for _ in range(2))
    x, other = normal(11, 3, 4) * 2 + 1, normal(11, 3, 4, seed=1) - 3
    graph = make_fx(layer, tracing_mode="real")(x)
    eager(x)  # as tracing did
    assert_close(graph(other), eager(other))
    assert_close(layer.state_dict(), eager.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_bare_layer_is_exported(options, training):
    layer = tn.BatchNorm1d(3, **options).train(training)
    x = normal(11, 3, 4) * 2 + 1
    module = torch.export.export(copy.deepcopy(layer), (x,)).module()
    assert_close(module(x), layer(x))
    for name, value in layer.state_dict().items():
        assert_close(module.state_dict()[name], value)


# -- torch.func -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*OPTIONS, {"frozen": True}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_under_vmap_is_its_members(options, training):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(4, 3), tn.BatchNorm1d(3, **options)) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(members)
    for member in members:
        member.train(training)
    x = normal(11, 4)

    def loss(parameters, buffers):
        y = torch.func.functional_call(members[0], (parameters, buffers), (x,))
        return y.pow(3).sum(), y

    grads, out = torch.func.vmap(torch.func.grad(loss, has_aux=True))(parameters, buffers)
    for i, member in enumerate(members):
        y = member(x)
        y.pow(3).sum().backward()
        assert_close(out[i], y)
        for name, parameter in member.named_parameters():
            assert_close(grads[name][i], parameter.grad, rtol=1e-4, atol=1e-4)
        for name, buffer in member.named_buffers():
            assert_close(buffers[name][i], buffer)


def test_a_member_whose_batch_is_not_finite_keeps_its_statistics():
    members = [tn.BatchNorm1d(3) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.stack([normal(11, 3), normal(11, 3)])
    x[1, 0, 0] = float("inf")

    def run(parameters, buffers, x):
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    torch.func.vmap(run)(parameters, buffers, x)
    members[0](x[0])
    assert_close(buffers["running_var"][0], members[0].running_var)
    assert torch.equal(buffers["running_var"][1], torch.ones(3))
    assert buffers["num_batches_tracked"].tolist() == [1, 0]


def test_without_statistics_it_is_the_layer_that_tracks_none():
    """``replace_all_batch_norm_modules_`` makes every batch norm one without statistics."""
    x = normal(12, 3)
    for options in ({}, {"ghost": 4}, {"act": "relu"}, {"commit": "step"}):
        net = nn.Sequential(tn.BatchNorm1d(3, **options))
        torch.func.replace_all_batch_norm_modules_(net)
        assert_close(net(x), tn.BatchNorm1d(3, track_running_stats=False, **options)(x))


@pytest.mark.parametrize("name", ["renorm", "frozen", "min_count"])
def test_what_needs_statistics_says_so_when_they_were_taken_away(name):
    value = {"renorm": tn.Renorm(), "frozen": True, "min_count": 4}[name]
    net = nn.Sequential(tn.BatchNorm1d(3, **{name: value}))
    torch.func.replace_all_batch_norm_modules_(net)
    with pytest.raises(tn.InputError, match=f"{name} needs running statistics.*replace_all_batch"):
        net(normal(12, 3))
