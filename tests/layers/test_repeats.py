from __future__ import annotations

import copy
import functools
import io
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import truenorm as tn
from truenorm.layers.repeats import MOST

RISING = tn.Renorm(rmax=1.5, dmax=0.5, start=0, rmax_at=6, dmax_at=6)
OPTIONS = [
    {"renorm": RISING},
    {"renorm": RISING, "ghost": 3},
    {"renorm": RISING, "momentum": None},
    {"min_count": 100},
    {"min_count": 100, "renorm": RISING},
    {"min_count": 20, "ghost": 3},
    {"renorm": RISING, "commit": "step"},
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(**options):
    """Two norms; the second is given what the first made of the batch."""
    torch.manual_seed(0)
    norms = (tn.BatchNorm1d(4, **options) for _ in range(2))
    return nn.Sequential(nn.Linear(3, 4), next(norms), nn.Linear(4, 4), next(norms)).double()


class Masked(nn.Module):
    """Two masked norms with a layer between."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (tn.BatchNorm1d(3, **options).double() for _ in range(2))
        self.between = nn.Linear(3, 3).double()

    def forward(self, x):
        mask = torch.arange(len(x)) % 4 != 1
        return self.second(self.between(self.first(x, mask)), mask)


def outcome(model, batches, reentrant=None, order=iter):
    """The gradients of inputs and parameters, after one backward of each forward in ``order``."""
    inputs = [batch.clone().requires_grad_() for batch in batches]
    if reentrant is None:
        outs = [model(x) for x in inputs]
    else:
        outs = [checkpoint(model, x, use_reentrant=reentrant) for x in inputs]
    for out in order(outs):
        out.backward(normal(*out.shape, seed=5))
    tn.commit(model)
    return [x.grad for x in inputs], [p.grad for p in model.parameters()], model.state_dict()


def joint(outs):
    yield sum(outs)


def batches(count):
    return [normal(8, 3, seed=seed) * (1 + seed % 3) + seed for seed in range(count)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [net, Masked])
@pytest.mark.parametrize("order", [iter, reversed, joint])
def test_a_checkpoints_gradient_is_that_of_its_forward(kind, options, reentrant, order):
    """However often the statistics moved between; running in any order, one backward or many."""
    data = batches(4)
    straight, again = kind(**options), kind(**options)
    for _ in range(2):
        assert_close(outcome(again, data, reentrant, order), outcome(straight, data, order=order))


@pytest.mark.parametrize("reentrant", [True, False])
def test_equal_batches_are_told_apart_by_their_order(reentrant):
    """Each forward of one batch is corrected by more; the last is the first to be repeated."""
    make = functools.partial(tn.BatchNorm1d, 3, dtype=torch.float64, renorm=RISING)
    straight, again = make(), make()
    data = [normal(8, 3) * 2 + 1] * 4
    for order in (joint, reversed):
        assert_close(outcome(again, data, reentrant, order), outcome(straight, data, order=order))
    for _ in range(3):  # one backward after each forward
        assert_close(outcome(again, data[:1], reentrant), outcome(straight, data[:1]))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the first run
def test_a_checkpoint_in_a_checkpoint_is_repeated_twice():
    def nested(model, x):
        inner = checkpoint(model[:2], x, use_reentrant=True)
        return checkpoint(model[2:], inner, use_reentrant=True)

    straight, again = net(renorm=RISING), net(renorm=RISING)
    for batch in batches(3):
        x, y = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        checkpoint(nested, again, x, use_reentrant=True).square().sum().backward()
        straight(y).square().sum().backward()
        assert_close(x.grad, y.grad)
    assert_close(again.state_dict(), straight.state_dict())


def in_a_compiled_function(layer):
    return torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")


def around_a_compiled_layer(layer):
    compiled = torch.compile(layer, backend="aot_eager")
    return lambda x: checkpoint(compiled, x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize("way", [in_a_compiled_function, around_a_compiled_layer])
def test_with_commit_by_step_a_compiled_checkpoint_is_exact_too(way):
    torch._dynamo.reset()
    make = functools.partial(tn.BatchNorm1d, 3, dtype=torch.float64, renorm=RISING, commit="step")
    straight, again = make(), make()
    run = way(again)
    for batch in batches(3):
        x, y = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        for out in (run(x), straight(y)):
            out.backward(normal(*out.shape, seed=5))
        assert_close(x.grad, y.grad)
        again.commit(), straight.commit()
    assert_close(again.state_dict(), straight.state_dict())


def test_a_batch_that_is_new_within_a_backward_is_corrected_by_what_stands():
    layer = tn.BatchNorm1d(3, dtype=torch.float64, renorm=RISING)
    for batch in batches(4):
        layer(batch)
    new, made = normal(8, 3, seed=9) * 3, []
    expected = copy.deepcopy(layer)(new)
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: made.append(layer(new)))
    x.sum().backward()
    assert_close(made, [expected])
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("moved", [lambda m: m.float(), lambda m: m.to("meta")])
def test_what_is_remembered_goes_when_the_layer_is_moved(moved):
    layer = tn.BatchNorm1d(3, dtype=torch.float64, renorm=RISING)
    layer(normal(8, 3))
    assert layer._past is not None
    moved(layer)
    assert layer._past is None


@pytest.mark.parametrize("options", [{}, {"ghost": 4}, {"min_count": 8}, {"commit": "step"}])
def test_a_layer_that_does_not_go_by_running_statistics_remembers_none(options):
    layer = tn.BatchNorm1d(3, **options)
    layer(torch.randn(16, 3))
    assert layer._past is None


@pytest.mark.parametrize("ghost", [None, 4])
def test_no_more_is_remembered_than_four_vectors_of_the_last_few(ghost):
    layer = tn.BatchNorm1d(3, renorm=RISING, ghost=ghost)
    for batch in itertools.repeat(torch.randn(64, 3), MOST + 5):
        layer(batch)
    assert len(layer._past) == MOST
    held = [part for seen in layer._past._seen for part in (*seen.moments, *seen.running)]
    assert sum(part.numel() for part in held) == MOST * (4 * 3 + 2)


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_a_file])
def test_a_copy_remembers_nothing_and_is_told_so_by_no_attribute(copied):
    layer = tn.BatchNorm1d(3, renorm=RISING)
    layer(torch.randn(8, 3))
    twin = copied(layer)
    assert "_past" not in vars(twin)
    assert_close(twin.state_dict(), layer.state_dict())
    x = torch.randn(8, 3)
    before = copy.deepcopy(layer)
    assert_close(twin(x), before(x))


def test_torchs_layer_made_of_it_remembers_nothing():
    model = nn.Sequential(tn.BatchNorm1d(3, renorm=RISING))
    model(torch.randn(8, 3))
    tn.convert(model, to="torch")
    assert "_past" not in vars(model[0])
