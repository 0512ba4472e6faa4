"""Running statistics in the hands of others: loaders, copies, wrappers and re-estimations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
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
