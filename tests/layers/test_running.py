"""Running statistics in the hands of others: loaders, copies, wrappers and re-estimations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

import truenorm as tn

NAN = float("nan")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def poisoned(layer):
    """``layer``, of three channels, after one batch that is not finite."""
    x = normal(4, 3, dtype=torch.float32)
    x[0, 0] = NAN
    with pytest.warns(UserWarning, match="skipped_batches"):
        layer(x)
    return layer


# -- the count of skipped batches ----------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"track_running_stats": False}, {"affine": False}])
def test_its_tensors_are_torchs_and_no_more(arguments):
    """A wrapper that broadcasts buffers, and functional_call, take each tensor by its name."""
    ours, theirs = tn.BatchNorm1d(3, **arguments), nn.BatchNorm1d(3, **arguments)
    for names in ("named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(ours, names)()] == [n for n, _ in getattr(theirs, names)()]
    x = normal(4, 3, dtype=torch.float32)
    called = torch.func.functional_call(ours, ours.state_dict(), (x,), strict=True)
    assert_close(called, theirs(x))


@pytest.mark.parametrize("track", [True, False])
def test_a_layer_of_the_meta_device_takes_a_state_dict_and_moves(track):
    with torch.device("meta"):
        layer = tn.BatchNorm1d(3, track_running_stats=track, ghost=2)
    trained = tn.BatchNorm1d(3, track_running_stats=track)
    trained(normal(6, 3, dtype=torch.float32))
    layer.load_state_dict(trained.state_dict(), assign=True)
    layer.to("cpu").double()
    assert layer.skipped_batches == 0
    assert_close(layer.eval()(normal(4, 3)), trained.double().eval()(normal(4, 3)))
    if track:
        assert poisoned(layer.float().train()).skipped_batches == 1


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.double().float(),
        lambda m: copy.deepcopy(m).share_memory(),
    ],
)
def test_the_count_goes_where_the_layer_goes(copied):
    layer = poisoned(tn.BatchNorm1d(3))
    twin = copied(layer)
    assert twin.skipped_batches == 1
    if twin is not layer:
        twin(torch.full((2, 3), NAN))
        assert (twin.skipped_batches, layer.skipped_batches) == (2, 1)
    twin.reset_running_stats()
    assert twin.skipped_batches == 0


def test_an_exported_program_holds_the_statistics_and_no_count():
    layer = tn.BatchNorm1d(3)
    program = torch.export.export(layer, (normal(4, 3, dtype=torch.float32),))
    held = {spec.target for spec in program.graph_signature.input_specs if spec.target}
    assert held == set(layer.state_dict())


# -- a layer without a number of batches ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ghost": 2}, {"commit": "step"}, {"min_count": 8}])
def test_a_layer_without_a_number_of_batches_tracks_as_torchs(options):
    ours, theirs = tn.BatchNorm1d(3, **options).double(), nn.BatchNorm1d(3).double()
    counted = tn.BatchNorm1d(3, **options).double()
    for layer in (ours, theirs):
        layer.num_batches_tracked = None
    for seed in range(2):
        x = normal(4, 3, seed=seed)
        for layer in (ours, theirs, counted):
            layer(x)
        ours.commit(), counted.commit()
    assert ours.num_batches_tracked is None
    assert_close(ours.running_var, counted.running_var)
    if not set(options) & {"ghost", "min_count"}:
        assert_close(ours.running_var, theirs.running_var)
    assert_close(ours.eval()(x), counted.eval()(x))
    with torch.no_grad():
        assert_close(torch.compile(ours, backend="eager")(x), ours(x))


@pytest.mark.parametrize("needs", [{"momentum": None}, {"renorm": tn.Renorm()}], ids=str)
def test_what_goes_by_the_number_of_batches_says_that_there_is_none(needs):
    layer = tn.BatchNorm1d(3, **needs)
    layer.num_batches_tracked = None
    with pytest.raises(tn.InputError, match=r"goes by num_batches_tracked, which is None"):
        layer(torch.zeros(4, 3))
    assert layer.eval()(torch.zeros(4, 3)).shape == (4, 3)
    layer.frozen = True
    assert layer.train()(torch.zeros(4, 3)).shape == (4, 3)


# -- weights that others compute, replace or take away ------------------------------------------


def pruned(layer, name):
    return prune.random_unstructured(layer, name, 1)


MOVED = {
    "pruned weight": lambda layer: pruned(layer, "weight"),
    "pruned bias": lambda layer: pruned(layer, "bias"),
    "both pruned": lambda layer: pruned(pruned(layer, "weight"), "bias"),
    "parametrized": lambda layer: (
        parametrize.register_parametrization(layer, "bias", nn.Softplus()) and layer
    ),
    "a parameter more": lambda layer: layer.register_parameter("more", nn.Parameter(torch.ones(1))),
    "no weight": lambda layer: layer.register_parameter("weight", None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moved", MOVED)
def test_weights_that_others_compute_are_used(moved, training):
    ours, theirs = tn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.weight.copy_(normal(3, seed=1))
            layer.bias.copy_(normal(3, seed=2))
        torch.manual_seed(0)
        MOVED[moved](layer)
        layer.train(training)
    x, y = (normal(4, 3).requires_grad_() for _ in range(2))
    a, b = ours(x), theirs(y)
    assert_close(a, b)
    for out in (a, b):
        out.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_close(ours.running_var, theirs.running_var)
    assert {n: p.grad for n, p in ours.named_parameters()}.keys() == {
        n for n, _ in theirs.named_parameters()
    }
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert_close(p.grad, q.grad, msg=name)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.*norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normed",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm],
    ids=["old", "parametrization"],
)
def test_a_norm_of_the_weight_is_used(normed):
    ours, theirs = tn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    for layer in (ours, theirs):
        normed(layer)
        layer(normal(4, 3)).square().sum().backward()
    assert_close(ours(normal(4, 3)), theirs(normal(4, 3)))
    assert_close(ours.running_mean, theirs.running_mean)


def test_other_tensors_may_be_called_with():
    layer = tn.BatchNorm1d(3).double()
    given = {name: value.clone() for name, value in layer.state_dict().items()}
    given["weight"] = normal(3, seed=5)
    x = normal(4, 3)
    called = torch.func.functional_call(layer, given, (x,), strict=True)
    assert_close(called, layer(x) * given["weight"])
    assert_close(given["running_mean"], layer.running_mean)


def test_weights_that_are_computed_cannot_be_frozen():
    """The tensors that they are computed from would go on learning."""
    layer = pruned(tn.BatchNorm1d(3), "weight")
    with pytest.raises(tn.InputError, match="weight is computed from other tensors"):
        layer.frozen = True
    prune.remove(layer, "weight")
    layer.frozen = True
    assert not list(layer.parameters())


def test_a_layer_whose_mode_was_deleted_raises_as_torchs_does():
    for layer in (nn.BatchNorm1d(3), tn.BatchNorm1d(3)):
        del layer.training
        with pytest.raises(AttributeError, match="'training'"):
            layer(torch.zeros(4, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layers_state_dict_has_torchs_keys_in_torchs_order(bias):
    layer, theirs = tn.BatchNorm1d(3, frozen=True, bias=bias), nn.BatchNorm1d(3, bias=bias)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    layer.frozen = False
    assert list(layer.state_dict()) == list(theirs.state_dict())
