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


@pytest.mark.parametrize("name", ["training", "weight", "running_mean"])
def test_a_layer_that_lacks_a_part_raises_as_torchs_does(name):
    for layer in (nn.BatchNorm1d(3), tn.BatchNorm1d(3)):
        delattr(layer, name)
        with pytest.raises(AttributeError, match=f"'{name}'"):
            layer(torch.zeros(4, 3))


def test_a_layer_without_the_buffer_of_the_number_evaluates_as_torchs():
    x = normal(4, 3, dtype=torch.float32)
    ours, theirs = tn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3).eval()
    for layer in (ours, theirs):
        del layer.num_batches_tracked
    assert_close(ours(x), theirs(x))
    ours.train()(x)
    assert_close(ours.running_mean, x.mean(0) * 0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layers_state_dict_has_torchs_keys_in_torchs_order(bias):
    layer, theirs = tn.BatchNorm1d(3, frozen=True, bias=bias), nn.BatchNorm1d(3, bias=bias)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    layer.frozen = False
    assert list(layer.state_dict()) == list(theirs.state_dict())


# -- statistics measured anew by others ----------------------------------------------------------


def nets(**options):
    """Twins, of TrueNorm's norms with ``options`` and of torch's, with statistics of a training."""
    made = []
    for norm in (lambda: tn.BatchNorm1d(4, commit="step", **options), lambda: nn.BatchNorm1d(4)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), norm(), nn.ReLU(), nn.Linear(4, 2)).double()
        model(normal(8, 3, seed=9) + 3).sum().backward()
        tn.commit(model)
        made.append(model)
    return made


def updated(model, data):
    torch.optim.swa_utils.update_bn(data, model)
    return model


def averaged(model, data):
    return updated(torch.optim.swa_utils.AveragedModel(model), data).module


@torch.no_grad()
def precise(model, data):
    """By the statistics of each batch, read after its forward, as fvcore and its followers do."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    usual = [norm.momentum for norm in norms]
    seen = [[] for _ in norms]
    for norm in norms:
        norm.momentum = 1.0
    for batch in data:
        model(batch)
        for norm, moments in zip(norms, seen, strict=True):
            moments.append((norm.running_mean.clone(), norm.running_var.clone()))
    for norm, moments, momentum in zip(norms, seen, usual, strict=True):
        means, variances = (torch.stack(part) for part in zip(*moments, strict=True))
        norm.running_mean = means.mean(0)
        norm.running_var = variances.mean(0) + means.var(0, correction=0)
        norm.momentum = momentum
    return model


@torch.no_grad()
def forgotten(model, data):
    """With nothing but the statistics set back."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.reset_running_stats()
    for batch in data:
        model.train()(batch)
    return model


WAYS = (updated, averaged, precise, forgotten)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_who_measures_the_statistics_anew_finds_them_written(way, attached, momentum):
    """Though the layer else waits for a step, which cannot follow."""
    ours, theirs = nets()
    for model in (ours, theirs):
        model[1].momentum = momentum
        model(normal(8, 3, seed=8)).sum().backward()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    if attached:
        tn.attach(optimizer, ours)
    tn.commit(ours)
    data = list(normal(24, 3).split(8))
    a, b = (way(model, data)[1] for model in (ours, theirs))
    assert_close(a.running_mean, b.running_mean)
    assert_close(a.running_var, b.running_var)
    assert a.num_batches_tracked == b.num_batches_tracked
    assert a.rollback() == 0


@pytest.mark.parametrize("way", [updated, precise])
@pytest.mark.parametrize("options", [{"ghost": 4}, {"min_count": 16}, {"act": "silu"}], ids=str)
def test_statistics_measured_anew_are_those_of_a_layer_that_writes_at_once(way, options):
    waits, _ = nets(**options)
    writes = copy.deepcopy(waits)
    writes[1].commit = "forward"
    data = list(normal(24, 3).split(8))
    assert_close(way(waits, data).state_dict(), way(writes, data).state_dict())


@pytest.mark.parametrize("way", [updated, precise, forgotten])
def test_training_goes_on_after_statistics_were_measured_anew(way):
    """The next step commits as ever, and a validation by mistake does not count."""
    model, _ = nets()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with tn.attach(optimizer, model):
        way(model, list(normal(24, 3).split(8)))
        before = model[1].running_mean.clone()
        optimizer.zero_grad()
        with torch.no_grad():
            model(normal(8, 3, seed=5) + 50)
        model(normal(8, 3, seed=6)).sum().backward()
        with torch.no_grad():
            model(normal(8, 3, seed=5) + 50)
        assert torch.equal(model[1].running_mean, before)
        optimizer.step()
    seen = model[0](normal(8, 3, seed=6)).mean(0).detach()
    assert_close(model[1].running_mean, before * 0.9 + seen * 0.1)


def test_a_change_of_momentum_in_training_writes_nothing_early():
    model, _ = nets()
    before = model[1].running_mean.clone()
    for momentum in (None, 1.0, 0.5):
        model[1].momentum = momentum
        model(normal(8, 3)).sum().backward()
        with torch.no_grad():
            model(normal(8, 3) + 50)
    assert torch.equal(model[1].running_mean, before)


def test_evaluation_ends_what_a_reset_began():
    model, _ = nets()
    model[1].reset_running_stats()
    model.eval()
    with torch.no_grad():
        model.train()(normal(8, 3))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("commit", ["step", "forward"])
def test_compiled_statistics_are_measured_anew_too(commit):
    model, theirs = nets()
    model[1].commit = commit
    run = torch.compile(model, backend="aot_eager")
    data = list(normal(24, 3).split(8))
    torch.optim.swa_utils.update_bn(data, run)
    assert_close(model[1].running_var, updated(theirs, data)[1].running_var)
