from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import truenorm as tn
from states import same_state


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convnet(**arguments):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, **arguments),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6, affine=False),
        nn.Sequential(nn.LayerNorm(6), nn.BatchNorm1d(6, track_running_stats=False)),
    )


def trained(model, steps=3):
    for seed in range(steps):
        model(normal(5, 3, 8, 8, seed=seed))
    return model


X = normal(5, 3, 8, 8, seed=99)


@given(
    affine=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    frozen_gradients=st.booleans(),
)
def test_there_and_back_is_where_it_began(affine, training, dtype, frozen_gradients):
    model = trained(convnet(affine=affine)).to(dtype).train(training)
    for parameter in model[1].parameters():
        parameter.requires_grad_(not frozen_gradients)
    kept = copy.deepcopy(model)
    held = dict(model.named_parameters())
    there = tn.convert(model, to="truenorm")
    assert len(there.changed) == 5
    assert not there.left
    x = X.to(dtype)
    mode = [m.training for m in model.modules()]
    expected = copy.deepcopy(kept).eval()(x)
    middle = copy.deepcopy(model).eval()(x)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    assert_close(middle, expected, **tolerance)
    back = tn.convert(model, to="torch")
    assert len(back.changed) == 5
    assert [type(m) for m in model.modules()] == [type(m) for m in kept.modules()]
    assert same_state(model.state_dict(), kept.state_dict())
    assert list(model.state_dict()) == list(kept.state_dict())
    assert mode == [m.training for m in model.modules()] == [m.training for m in kept.modules()]
    assert all(held[n] is p for n, p in model.named_parameters())  # an optimizer stays valid
    for (_, a), (_, b) in zip(model.named_parameters(), kept.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
    assert torch.equal(copy.deepcopy(model).eval()(x), expected)
    assert torch.equal(copy.deepcopy(model).train()(x), copy.deepcopy(kept).train()(x))
    pickle.loads(pickle.dumps(model))


def test_hooks_and_parametrizations_stay():
    model = convnet()
    seen = []
    model[1].register_forward_hook(lambda m, a, out: seen.append(type(m).__name__))

    class Positive(nn.Module):
        def forward(self, weight):
            return weight.abs()

    parametrize.register_parametrization(model[4], "weight", Positive())
    kept = copy.deepcopy(model).eval()
    expected = kept(X)
    keys = list(model.state_dict())
    tn.convert(model, to="truenorm")
    assert isinstance(model[4], tn.BatchNorm2d)
    assert parametrize.is_parametrized(model[4])
    assert list(model.state_dict()) == keys
    seen.clear()
    assert_close(model.eval()(X), expected)
    assert seen == ["BatchNorm2d"]
    model.train()(X)
    tn.convert(model, to="torch")
    assert isinstance(model[4], nn.BatchNorm2d)
    assert not isinstance(model[4], tn.BatchNorm2d)
    parametrize.remove_parametrizations(model[4], "weight")
    assert type(model[4]) is nn.BatchNorm2d


def test_a_shared_layer_is_converted_once_and_stays_shared():
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    table = tn.convert(model, to="truenorm")
    assert model["a"][0] is model["b"][0] is norm
    assert isinstance(norm, tn.BatchNorm1d)
    assert len(table.rows) == 1
    assert table.rows[0].note == "one layer, also b.0"


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("to", "settings"),
    [("truenorm", {}), ("sync", {}), ("frozen", {}), ("group", {}), ("ghost", {"ghost": 2})],
)
def test_a_subclass_is_left_whole_and_named(to, settings):
    model = nn.Sequential(Activated(3))
    before = model[0](normal(4, 3, 2, 2))
    with pytest.warns(
        tn.ConversionWarning, match="1 of 1 .* were left, .*Activated is a class of its own"
    ):
        table = tn.convert(model, to=to, **settings)
    assert type(model[0]) is Activated
    assert not table.changed
    assert "Activated is a class of its own (forward)" in table.refused[0].note
    assert torch.equal(model[0](normal(4, 3, 2, 2)), before)


def test_a_subclass_of_ours_is_left_too():
    class Own(tn.BatchNorm1d):
        pass

    model = nn.Sequential(Own(3))
    for to in ("torch", "frozen"):
        with pytest.warns(tn.ConversionWarning, match="Own is a class of its own"):
            assert "Own is a class of its own" in tn.convert(model, to=to).refused[0].note
    assert tn.convert(nn.Sequential(Activated(3)), to="torch").left[0].note == "is not TrueNorm's"


def test_the_model_itself_may_be_the_layer():
    layer = nn.BatchNorm1d(3)
    assert tn.convert(layer, to="truenorm").model is layer
    assert type(layer) is tn.BatchNorm1d


def test_sync_goes_on_and_off():
    model = convnet()
    assert len(tn.convert(model, to="sync").changed) == 4
    assert all(m.sync for m in model.modules() if isinstance(m, tn.BatchNorm))
    assert len(tn.convert(model, to="sync").changed) == 0
    tn.convert(model, to="torch")
    assert type(model[1]) is nn.SyncBatchNorm
    tn.convert(model, to="truenorm")
    assert type(model[1]) is tn.BatchNorm
    assert model[1].sync
    tn.convert(model, to="unsync")
    assert model[1].sync is None
    with pytest.warns(tn.ConversionWarning, match="not sync"):
        tn.convert(model, to="torch", where="1")


def test_frozen_and_unfrozen():
    model = trained(convnet())
    expected = copy.deepcopy(model).eval()(X)
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(tn.ConversionWarning, match="frozen needs running statistics"):
        table = tn.convert(model, to="frozen")
    assert [row.layer for row in table.left] == ["8.0", "8.1"]
    assert [row.layer for row in table.refused] == ["8.1"]
    assert "track_running_stats" in table.left[1].note
    with pytest.raises(AssertionError, match=r"8\.1"):
        tn.assert_frozen(model)
    tn.assert_frozen(model[:5])
    model.train()(X)
    assert_close(model.eval()(X), expected)
    table = tn.convert(model, to="unfrozen")
    assert "new parameters" in table.changed[0].note
    assert same_state(dict(sorted(model.state_dict().items())), dict(sorted(state.items())))


def test_options_are_set_and_what_torch_cannot_hold_is_said():
    model = convnet()
    tn.convert(model, to="ghost", ghost=4, where="1")
    assert model[1].ghost == 4
    assert type(model[4]) is nn.BatchNorm2d
    tn.convert(
        model, to="truenorm", min_count=3, where=lambda n, m: getattr(m, "num_features", 0) == 8
    )
    assert (model[1].ghost, model[1].min_count) == (4, 3)
    table = tn.convert(model, to="torch")
    assert "drops ghost" in table.changed[0].note
    assert "drops min_count" in table.changed[0].note
    tn.convert(model, to="truenorm", act="relu", where="1")
    with pytest.warns(tn.ConversionWarning, match="relu would be lost"):
        tn.convert(model, to="torch")
    assert model[1].act == "relu"


def test_batch_to_group_carries_the_affine_map():
    model = trained(convnet())
    weight = model[1].weight
    table = tn.convert(model, to="group", groups=2)
    assert type(model[1]) is tn.GroupNorm
    assert model[1].weight is weight
    assert "running statistics and momentum have no place" in table.changed[0].note
    assert list(model[1].state_dict()) == ["weight", "bias"]
    reference = nn.GroupNorm(2, 8)
    reference.load_state_dict(model[1].state_dict())
    x = normal(4, 8, 3, 3)
    assert torch.equal(model[1](x), reference(x))
    assert repr(model[1]).startswith("GroupNorm(2, 8")
    with pytest.warns(tn.ConversionWarning, match="6 channels do not divide into 4"):
        tn.convert(nn.Sequential(nn.BatchNorm1d(6)), to="group", groups=4)
    copy.deepcopy(model)


class Shared(nn.Module):
    """One norm on two levels of very different scale."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.once = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.once(self.norm(x) + self.norm(100 * x + 50))


def test_each_call_gets_a_norm_of_its_own():
    model = Shared()
    table = tn.convert(model, to="per-call", example=normal(4, 3))
    assert [row.layer for row in table.changed] == ["norm"]
    assert table.left[0].note == "is called once"
    for seed in range(60):
        model(normal(64, 3, seed=seed))
    first, second = model.norm.norms
    assert_close(first.running_mean, torch.zeros(3), atol=0.2, rtol=0)
    assert_close(second.running_mean, torch.full((3,), 50.0), atol=8, rtol=0)
    x = normal(500, 3, seed=5)
    both = copy.deepcopy(model)
    assert_close(both.eval()(x), both.train()(x), atol=0.2, rtol=0.2)
    shared = Shared()
    for seed in range(60):
        shared(normal(64, 3, seed=seed))
    gap = shared.eval()(x) - shared.train()(x)
    assert gap.abs().max() > 1  # the fault: one norm cannot hold two distributions


def test_one_call_too_many_is_an_error_with_its_remedy():
    model = Shared()
    tn.convert(model, to="per-call", example=normal(4, 3))
    model(normal(4, 3))
    with pytest.raises(tn.InputError, match="convert again with an example"):
        model.norm(normal(4, 3))


@pytest.mark.parametrize("to", ["keras", "flax"])
def test_momentum_comes_from_the_other_convention(to):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.99), nn.BatchNorm1d(3, momentum=0.1))
    table = tn.convert(model, to=to)
    assert model[0].momentum == 0.01
    assert model[1].momentum == 0.1
    assert "reads as torch's already" in table.left[0].note
    tn.convert(model, to=to, momentum=0.9, eps=1e-3)
    assert [m.momentum for m in model] == [0.1, 0.1]
    assert [m.eps for m in model] == [1e-3, 1e-3]


def test_lazy_layers_are_converted_lazy():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    tn.convert(model, to="truenorm", ghost=2)
    model(normal(4, 3))
    assert type(model[0]) is tn.BatchNorm1d
    assert model[0].ghost == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "trunorm"}, "unknown target 'trunorm'; choose one of truenorm"),
        ({"to": "ghost"}, "needs the setting ghost"),
        ({"to": "per-call"}, "needs the setting example"),
        ({"to": "truenorm", "goast": 3}, "unknown setting 'goast'"),
        ({"to": "truenorm", "ghost": -3}, "ghost must be an integer"),
        ({"to": "keras", "eps": 0}, "eps must be a number above 0, got 0"),
        ({"to": "torch", "ghost": 3}, "unknown setting 'ghost' of to='torch'; it takes none"),
    ],
)
def test_wrong_settings_are_refused_before_anything_changes(arguments, message):
    model = convnet()
    with pytest.raises(tn.InputError, match=message):
        tn.convert(model, **arguments)
    assert type(model[1]) is nn.BatchNorm2d


def test_the_table_reads():
    text = str(tn.convert(convnet(), to="ghost", ghost=8, where=["1", "8"]))
    assert text.splitlines()[:3] == [
        "2 of 5 normalization layers converted",
        "  1: torch.nn.BatchNorm2d -> truenorm.BatchNorm2d(ghost=8)",
        "  4: torch.nn.BatchNorm2d left as it is; not selected by where",
    ]


# -- what is asked and not done -------------------------------------------------------------------


def test_what_was_asked_and_not_done_leads_the_table():
    model = nn.Sequential(Activated(3), nn.BatchNorm2d(3), Activated(4))
    with pytest.warns(tn.ConversionWarning, match="to='frozen': 2 of 3") as told:
        table = tn.convert(model, to="frozen")
    assert len(told) == 1
    first, second, *_ = str(table).splitlines()
    assert first == (
        "2 of 3 normalization layers were left, though asked for: 2 test_conversion.Activated "
        "(test_conversion.Activated is a class of its own (forward), which converting would drop)"
    )
    assert second == "1 of 3 normalization layers converted"


def test_a_pattern_that_selects_nothing_is_told():
    with pytest.warns(tn.ConversionWarning, match="where selects none of the 5"):
        tn.convert(convnet(), to="frozen", where="encoder")


def test_a_model_without_a_norm_is_told():
    with pytest.warns(tn.ConversionWarning, match="no normalization layer that is known"):
        tn.convert(nn.Sequential(nn.Linear(3, 3)), to="frozen")


class FromScratch(nn.Module):
    """A norm that is no subclass of torch's, as timm's InplaceAbn and EvoNorm2dB0."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))


@pytest.mark.parametrize(
    "moving", [FromScratch(3), nn.InstanceNorm2d(3, track_running_stats=True),
               nn.LazyInstanceNorm2d(track_running_stats=True)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_statistics_that_would_go_on_moving_are_told(moving):
    model = nn.Sequential(nn.BatchNorm2d(3), moving)
    with pytest.warns(tn.ConversionWarning, match="no frozen form of: in training they move"):
        table = tn.convert(model, to="frozen")
    assert [row.outcome for row in table.rows] == ["changed", "refused"]
    with pytest.raises(AssertionError, match=f"1: {type(moving).__name__}: keeps running"):
        tn.assert_frozen(model)
    tn.assert_frozen(model[:1])


@pytest.mark.parametrize("still", [nn.InstanceNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3)])
def test_what_has_no_statistics_is_no_cause_for_a_warning(still):
    model = nn.Sequential(nn.BatchNorm2d(3), still)
    assert not tn.convert(model, to="frozen").refused
    tn.assert_frozen(model)


def test_what_is_so_already_is_counted_and_no_cause_for_a_warning():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3))
    tn.convert(model, to="frozen")
    table = tn.convert(model, to="frozen")
    assert str(table).startswith("0 of 2 normalization layers converted, 1 so already\n")
    assert [row.outcome for row in table.rows] == ["already", "unasked"]
    assert not table.refused
