"""Norms of other packages, with activation and dropout inside, become TrueNorm's and go back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import foreign as others
import truenorm as tn
from states import same_state

CHANNELS = 4


def normal(*shape, seed=0, **arguments):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **arguments)


X = normal(6, CHANNELS, 5, 5, seed=99)


def net(**arguments):
    """Every kind of batch norm with children, one with a parameter and one with randomness."""
    torch.manual_seed(0)
    model = nn.Sequential(
        others.BatchNormAct(CHANNELS, act=nn.ReLU(inplace=True), **arguments),
        nn.Conv2d(CHANNELS, CHANNELS, 3),
        others.BatchNormAct(CHANNELS, act=nn.PReLU(CHANNELS), eps=1e-3, momentum=None),
        others.BatchNormAct(CHANNELS, act=nn.SiLU(), drop=nn.Dropout(0.3), affine=False),
        others.BatchNormAct(CHANNELS),
        others.BatchNormAct(CHANNELS, track_running_stats=False, act=nn.Tanh()),
    )
    for seed in range(3):
        model(normal(6, CHANNELS, 5, 5, seed=seed))
    return model


def outcome(model, x):
    """Output, gradients and the state dict after a step of training, and the evaluation."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).train()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *gradients, *model.state_dict().values(), model.eval()(x).detach()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_there_and_back_changes_no_bit(dtype, training):
    model = net().to(dtype).train(training)
    model[0].bias.requires_grad_(False)
    kept, held = copy.deepcopy(model), dict(model.named_parameters())
    calls = []
    model[2].act.register_forward_hook(lambda *_: calls.append(1))
    table = tn.convert(model, to="truenorm")
    assert len(table.changed) == 5
    assert not calls  # what the forward does was proved without them
    norms = [m for m in model if not isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, tn.BatchNorm2d) for m in norms)
    assert list(model.state_dict()) == list(kept.state_dict())
    assert all(held[n] is p for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in kept.parameters()
    ]
    assert [m.training for m in model.modules()] == [m.training for m in kept.modules()]
    x = X.to(dtype)
    expected = outcome(kept[:5], x)
    assert equal(outcome(model[:5], x), expected)
    tn.convert(model, to="torch")
    assert [type(m) for m in model.modules()] == [type(m) for m in kept.modules()]
    assert equal(outcome(model[:5], x), expected)
    before, after = vars(kept[0]), vars(model[0])
    assert before.keys() == after.keys()


@pytest.mark.usefixtures("same_kernels")
def test_the_layer_without_statistics_goes_the_same_way():
    model = net()[5:]
    expected = outcome(model, X)
    tn.convert(model, to="truenorm")
    assert equal(outcome(model, X), expected)


def test_frozen_holds_them_in_training():
    model = net()[:5]
    model[3].drop.p = 0.0
    expected = copy.deepcopy(model).eval()(X)
    keys = list(model.state_dict())
    tn.convert(model, to="frozen")
    tn.assert_frozen(model)
    state = copy.deepcopy(model.state_dict())
    assert_close(model.train()(X), expected)
    assert same_state(model.state_dict(), state)
    assert sorted(state) == sorted(keys)
    tn.convert(model, to="unfrozen")
    assert model[0].weight.requires_grad
    assert (model.train()(X) - expected).abs().max() > 0.1


def test_frozen_goes_back_to_its_class_by_modes():
    model = nn.Sequential(others.BatchNormAct(CHANNELS, act=nn.PReLU(CHANNELS), drop=nn.Dropout()))
    tn.convert(model, to="frozen")
    table = tn.convert(model, to="torch")
    assert type(model[0]) is others.BatchNormAct
    assert "eval() and requires_grad=False stand for it" in table.rows[0].note
    assert not model[0].training
    assert not model[0].weight.requires_grad
    assert model[0].act.weight.requires_grad
    assert model[0].drop.training


def test_ghost_groups_are_normalized_before_the_activation():
    layer = others.BatchNormAct(CHANNELS, act=nn.Tanh())
    tn.convert(layer, to="ghost", ghost=2)
    plain = tn.BatchNorm2d(CHANNELS, ghost=2)
    assert torch.equal(layer(X), plain(X).tanh())


def test_sync_goes_on_and_off():
    model = nn.Sequential(others.BatchNormAct(CHANNELS, act=nn.ReLU()))
    expected = model(X)
    tn.convert(model, to="sync")
    assert model[0].sync
    assert_close(model(X), expected)  # one process
    with pytest.warns(tn.ConversionWarning, match="BatchNormAct, which it was, needs to='unsync'"):
        tn.convert(model, to="torch")
    tn.convert(model, to="unsync")
    tn.convert(model, to="torch")
    assert type(model[0]) is others.BatchNormAct


def test_a_synchronized_one_stays_synchronized():
    model = nn.Sequential(others.SyncBatchNormAct(CHANNELS, nn.SiLU()))
    expected = model.eval()(X)
    keys = list(model.state_dict())
    tn.convert(model, to="truenorm")
    assert model[0].sync
    assert not isinstance(model[0], nn.SyncBatchNorm)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), expected)
    tn.convert(model, to="torch")
    assert type(model[0]) is others.SyncBatchNormAct
    assert model[0].process_group is None


@pytest.mark.parametrize("kind", [others.GroupNormAct, others.ActivationGroupNorm])
def test_group_norms_keep_what_they_apply(kind):
    model = nn.Sequential(kind(CHANNELS, 2))
    if kind is others.GroupNormAct:
        model[0].act = nn.PReLU(CHANNELS)
    expected = outcome(model, X)
    keys = list(model.state_dict())
    tn.convert(model, to="truenorm")
    assert isinstance(model[0], tn.GroupNorm)
    assert list(model.state_dict()) == keys
    assert equal(outcome(model, X), expected)
    tn.convert(model, to="torch")
    assert type(model[0]) is kind


def test_a_mask_is_kept_through_the_activation():
    model = nn.Sequential(others.BatchNormAct(CHANNELS, act=nn.Sigmoid()))
    layer = tn.convert(model, to="truenorm").model[0]
    plain = tn.BatchNorm2d(CHANNELS)
    mask = torch.tensor([True] * 4 + [False] * 2)
    out = layer(X, mask)
    assert_close(out[:4], plain(X, mask)[:4].sigmoid())
    assert not out[4:].any()
    residual = normal(*X.shape, seed=3)
    assert_close(layer.eval()(X, residual=residual), (plain.eval()(X) + residual).sigmoid())


def test_a_batch_norm_becomes_a_group_norm_that_applies_the_same():
    model = net()[:5]
    table = tn.convert(model, to="group", groups=2)
    assert len(table.changed) == 4
    assert list(model.state_dict()) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "2.act.weight",
        "4.weight", "4.bias",
    ]  # fmt: skip
    expected = nn.functional.group_norm(X, 2, model[0].weight, model[0].bias, 1e-5).relu()
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin[0], tn.GroupNorm)
        assert torch.equal(twin[0](X), expected)
    with pytest.warns(tn.ConversionWarning, match="no group norm that applies what this one does"):
        tn.convert(model, to="torch")


# -- frozen norms of others -----------------------------------------------------------------------


def filled(norm):
    generator = torch.Generator().manual_seed(5)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).uniform_(0.5, 2, generator=generator)
    return norm


@pytest.mark.parametrize("kind", others.FROZEN)
def test_a_frozen_norm_of_others_becomes_ours_and_goes_back(kind):
    model = nn.Sequential(filled(kind(CHANNELS)))
    if kind is others.FrozenNormAct:
        model[0].act = nn.PReLU(CHANNELS)
    kept, x = copy.deepcopy(model), X.clone().requires_grad_()
    expected = kept(x)
    tn.assert_frozen(model)
    tn.convert(model, to="truenorm")
    tn.assert_frozen(model)
    assert isinstance(model[0], tn.BatchNorm2d)
    assert type(model[0]).__name__ == "BatchNorm2d"  # frozen or not, as it may be later
    assert model[0].frozen
    assert list(model.state_dict()) == list(kept.state_dict())
    for training in (True, False):
        assert_close(model.train(training)(x), expected)
    assert same_state(model.state_dict(), kept.state_dict())
    gradient = torch.autograd.grad(model(x).sum(), x)[0]
    assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
    tn.convert(model, to="torch")
    assert type(model[0]) is kind
    assert vars(model[0]).keys() == vars(kept[0]).keys()
    assert same_state(model.state_dict(), kept.state_dict())
    assert torch.equal(model(x), kept(x))


@pytest.mark.parametrize("kind", others.FROZEN)
def test_a_frozen_norm_of_others_loads_states_with_and_without_a_counter(kind):
    model = nn.Sequential(filled(kind(CHANNELS)))
    kept = copy.deepcopy(model)
    bare = {name: v for name, v in kept.state_dict().items() if "num" not in name}
    counted = {**bare, "0.num_batches_tracked": torch.tensor(7)}
    tn.convert(model, to="truenorm")
    for state in (kept.state_dict(), bare, counted, copy.deepcopy(model.state_dict())):
        for values in model.buffers():
            values.zero_()
        model.load_state_dict(state)
        assert_close(model.eval()(X), kept(X))
    kept.load_state_dict(model.state_dict())


@pytest.mark.parametrize("to", ["frozen", "sync", "ghost", "torch"])
def test_a_frozen_norm_of_others_is_no_failure_where_nothing_is_to_do(to):
    model = nn.Sequential(others.FrozenNorm(CHANNELS), nn.BatchNorm2d(CHANNELS))
    table = tn.convert(model, to=to, **({"ghost": 2} if to == "ghost" else {}))
    assert type(model[0]) is others.FrozenNorm
    assert not table.refused
    if to == "frozen":
        assert table.rows[0].note == "is frozen already"
        assert "1 of 2 normalization layers converted, 1 so already" in str(table)


def test_a_frozen_norm_of_others_thaws():
    model = nn.Sequential(filled(others.FrozenNormAct(CHANNELS, nn.ReLU())))
    expected = model(X)
    table = tn.convert(model, to="unfrozen")
    assert "new parameters" in table.rows[0].note
    assert len(list(model.parameters())) == 2
    assert_close(model.eval()(X), expected)
    model.train()(X)
    assert model[0].num_batches_tracked == 1
    assert "0.num_batches_tracked" in model.state_dict()
    twin = nn.Sequential(others.BatchNormAct(CHANNELS, act=nn.ReLU()))
    twin.load_state_dict(model.state_dict())
    with pytest.warns(tn.ConversionWarning, match="is frozen, and torch.nn has none with act"):
        tn.convert(model, to="torch")
    assert_close(twin.eval()(X), model.eval()(X))


def test_a_thawed_one_without_activation_becomes_torchs():
    model = nn.Sequential(filled(others.FrozenNorm(CHANNELS)))
    expected = model(X)
    tn.convert(model, to="unfrozen")
    tn.convert(model, to="torch")
    assert type(model[0]) is nn.BatchNorm2d
    assert_close(model.eval()(X), expected)
    assert model[0].weight.requires_grad
    model.train()(X)


def test_a_refused_setting_leaves_a_frozen_norm_of_others_as_it_was():
    model = nn.Sequential(filled(others.FrozenNormAct(CHANNELS, nn.ReLU())))
    before = set(vars(model[0]))
    expected = model(X)
    with pytest.warns(tn.ConversionWarning, match="set the child act"):
        tn.convert(model, to="truenorm", act="relu")
    assert type(model[0]) is others.FrozenNormAct
    assert set(vars(model[0])) == before
    assert torch.equal(model(X), expected)
    assert "_skipped" not in dict(model[0].named_buffers())


def test_a_frozen_norm_of_others_with_an_eps_of_zero_stays():
    model = nn.Sequential(filled(others.FrozenNorm(CHANNELS, eps=0.0)))
    before = dict(vars(model[0]))
    with pytest.warns(tn.ConversionWarning, match="eps must be a number above 0, got 0"):
        tn.convert(model, to="unfrozen")
    assert vars(model[0]) == before


# -- what is not what it seems --------------------------------------------------------------------


class Backward(others.BatchNormAct):
    """Activates first."""

    def forward(self, x):
        return nn.BatchNorm2d.forward(self, self.act(self.drop(x)))


class Twice(others.BatchNormAct):
    def forward(self, x):
        return self.act(super().forward(x))


class Swapped(others.BatchNormAct):
    def forward(self, x):
        return self.drop(self.act(nn.BatchNorm2d.forward(self, x)))


class Skipping(others.BatchNormAct):
    """Drops nothing."""

    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x))


class Gated(others.BatchNormAct):
    """Differs in training alone."""

    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Slow(others.BatchNormAct):
    """Moves its statistics half as far."""

    def forward(self, x):
        self.momentum /= 2
        out = super().forward(x)
        self.momentum *= 2
        return out


class Looser(others.FrozenNormAct):
    """Its eps is not the one that it tells."""

    def forward(self, x):
        return self.act(self.drop(self.normed(x, self.eps / 2)))


class Shifted(others.FrozenNormAct):
    def forward(self, x):
        return super().forward(x) + 1


class Pairs(others.GroupNormAct):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    "kind", [Backward, Twice, Swapped, Skipping, Gated, Slow, Looser, Shifted, Pairs]
)
@pytest.mark.parametrize("to", ["truenorm", "frozen"])
def test_a_forward_that_does_otherwise_is_left_and_told(kind, to):
    groups = (2,) if kind is Pairs else ()
    model = nn.Sequential(kind(CHANNELS, *groups))
    if to == "frozen" and kind in (Looser, Shifted, Pairs):
        assert not tn.convert(model, to=to).changed
        return
    with pytest.warns(tn.ConversionWarning, match=f"{kind.__name__}: its forward"):
        tn.convert(model, to=to)
    assert type(model[0]) is kind


def test_a_forward_of_the_instance_is_not_tried():
    layer = others.BatchNormAct(CHANNELS, act=nn.ReLU())
    layer.forward = lambda x: pytest.fail("called")
    with pytest.warns(tn.ConversionWarning, match="in the place of its class's"):
        tn.convert(layer, to="truenorm")


def test_the_proof_touches_neither_state_nor_randomness():
    model = net()
    kept, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.device("meta"):  # as where a large model is made without memory
        tn.convert(model, to="truenorm")
    assert same_state(model.state_dict(), kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_without_memory_convert():
    with torch.device("meta"):
        model = nn.Sequential(others.BatchNormAct(CHANNELS, act=nn.ReLU()))
    tn.convert(model, to="frozen")
    model.to_empty(device="cpu")
    model.load_state_dict(nn.Sequential(others.BatchNormAct(CHANNELS)).state_dict())
    assert_close(model(X), (X / (1 + 1e-5) ** 0.5).relu())


# -- copies and files -----------------------------------------------------------------------------


def test_it_is_copied_and_pickled_with_its_way_back():
    model = tn.convert(net()[:5], to="truenorm").model
    tn.convert(model, to="ghost", ghost=3, where="0")
    expected = outcome(model, X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(twin[0]) is type(model[0])
        assert equal(outcome(twin, X), expected)
    twin = pickle.loads(pickle.dumps(model))
    tn.convert(twin, to="torch")
    assert type(twin[0]) is others.BatchNormAct


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_compiles_exports_and_traces():
    model = tn.convert(net()[:3], to="truenorm").model.eval()
    expected = model(X)
    with torch.no_grad():
        assert_close(torch.jit.trace(model, X)(X), expected)
    assert_close(torch.export.export(model, (X,)).module()(X), expected)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)
    assert_close(torch.fx.symbolic_trace(model)(X), expected)


def test_its_eps_is_not_told_to_converters_that_would_lose_the_activation():
    model = tn.convert(net()[:5], to="truenorm").model
    with pytest.raises(tn.InputError, match="applies act after normalizing"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    with pytest.raises(tn.InputError, match="applies drop and act after"):
        _ = model[3].eps
    assert model[4].eps == 1e-5  # it applies nothing
