"""convert(fuse=True): what stands behind a norm is taken in, and nothing that would not be same."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import truenorm as tn
from states import same_state

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """A convolution, a norm, and what a test says."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.more = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.nothing = nn.Identity()
        self.slow = False


class Functional(Block):
    def forward(self, x):
        return self.conv(F.silu(self.bn(x)))


class Method(Block):
    def forward(self, x):
        return self.bn(self.conv(x)).tanh()


class Shared(Block):
    def forward(self, x):
        return self.act(self.more(self.conv(self.act(self.bn(x)))))


class PartlyShared(Block):
    def forward(self, x):
        return self.act(self.bn(self.conv(self.act(x))))


class Residual(Block):
    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.act(out)


class ResidualOnTheLeft(Block):
    def forward(self, x):
        return F.relu(torch.add(x, self.nothing(self.bn(self.conv(x)))))


class TwoNorms(Block):
    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + self.more(x))


class NotAGraph(Block):
    def forward(self, x):
        if x.mean() > 100:
            return x
        return self.act(self.bn(x))


class Optional(Block):
    def forward(self, x, scale=None):
        y = self.act(self.bn(x))
        return y if scale is None else y * scale


def sequence(act):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act, nn.Dropout(0.5))


def batch_norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def of(model):
    """What two steps of training, an evaluation and their gradients come to."""
    model = copy.deepcopy(model).double()
    found = []
    for training in (True, True, False):
        torch.manual_seed(0)
        x = X.double().requires_grad_()
        y = model.train(training)(x * 1)  # which may be overwritten
        y.square().sum().backward()
        found += [y, x.grad]
    return [*found, *(p.grad for p in model.parameters()), *model.buffers()]


TAKEN = {
    "a module": (lambda: sequence(nn.GELU("tanh")), {"1": "gelu_tanh"}, 0),
    "a function": (Functional, {"bn": "silu"}, 0),
    "a method": (Method, {"bn": "tanh"}, 0),
    "one module for two norms": (Shared, {"bn": "relu", "more": "relu"}, 0),
    "a module that others need": (PartlyShared, {"bn": "relu"}, 0),
    "a residual added in place": (Residual, {"bn": "relu"}, 1),
    "a residual on the left": (ResidualOnTheLeft, {"bn": "relu"}, 1),
    "two norms that are added": (TwoNorms, {"bn": "relu"}, 1),
    "a forward that is no graph": (NotAGraph, {"bn": "relu"}, 0),
    "an argument that may be left out": (Optional, {"bn": "relu"}, 0),
    "blocks within blocks": (
        lambda: nn.Sequential(Residual(), nn.Sequential(Residual(), Shared())),
        {"0.bn": "relu", "1.0.bn": "relu", "1.1.bn": "relu", "1.1.more": "relu"},
        2,
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_follows_a_norm_is_taken_in_and_all_stays_as_it_was(case):
    make, acts, residuals = TAKEN[case]
    torch.manual_seed(1)
    model = make()
    for norm in batch_norms(model).values():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    expected, keys, kinds = of(model), list(model.state_dict()), [*map(type, model.modules())]
    table = tn.convert(model, to="truenorm", fuse=True, example=X)
    found = {name: norm.act for name, norm in batch_norms(model).items() if norm.act}
    assert found == acts
    rows = {row.layer: row.note for row in table.rows if "takes in" in row.note}
    assert rows.keys() == acts.keys()
    assert sum("the residual and" in note for note in rows.values()) == residuals
    assert list(model.state_dict()) == keys
    now = zip(model.modules(), kinds, strict=True)
    assert all(isinstance(module, (kind, nn.Identity)) for module, kind in now)
    for ours, theirs in zip(of(model), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


class OnlyInTraining(Block):
    def forward(self, x):
        x = self.bn(x)
        return F.relu(x) if self.training else x


class Twice(Block):
    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) + y


class ForTwo(Block):
    def forward(self, x):
        return F.relu(self.bn(x)) + torch.tanh(self.bn(x * 2))


class Overwrites(Block):
    def forward(self, x):
        y = x * 2
        return F.relu(y.add_(self.bn(x))) * y


class OverwritesItsArgument(Block):
    def forward(self, x):
        x += self.bn(x * 2)
        return F.relu(x)


class AddsANumber(Block):
    def forward(self, x):
        return F.relu(self.bn(x) + 1)


class Counts(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn(x))


class AsksWhatItIs(Block):
    def forward(self, x):
        x = x if isinstance(x, torch.Tensor) else x[0]
        return F.relu(self.bn(x))


class MakesATensor(Block):
    def forward(self, x):
        return F.relu(self.bn(x)) + torch.zeros(1)


class MayBeLeftOut(Block):
    def forward(self, x, scale=None):
        return F.relu(self.bn(x))


class Broadcasts(Block):
    def forward(self, x):
        return F.relu(self.bn(x) + x.mean((2, 3), keepdim=True))


class Unlike(nn.Module):
    """A ReLU of vectors, and only of them."""

    def forward(self, x):
        return x.relu() if x.ndim == 1 else x * 0.5


def hooked():
    model = sequence(nn.ReLU())
    model[1].register_forward_hook(lambda module, args, out: None)
    return model


def with_an_activation():
    return nn.Sequential(tn.BatchNorm2d(4, act="elu"), nn.ReLU())


LEFT = {
    "another slope": (lambda: sequence(nn.LeakyReLU(0.2)), r"2 \(LeakyReLU\) takes its output"),
    "what is no activation": (lambda: sequence(nn.MaxPool2d(2)), r"2 \(MaxPool2d\) takes"),
    "an activation of vectors alone": (lambda: sequence(Unlike()), "outputs would differ in eval"),
    "the end": (lambda: nn.Sequential(nn.BatchNorm2d(4)), "its output is that of Sequential"),
    "another forward in training": (OnlyInTraining, "OnlyInTraining: .* another in training"),
    "two that take its output": (Twice, "bn is taken by 2 operations"),
    "two activations": (ForTwo, "called for relu and for tanh"),
    "a residual that is overwritten": (Overwrites, "add_ writes into the tensor"),
    "an argument that is overwritten": (OverwritesItsArgument, "writes into its arguments would"),
    "a number that is added": (AddsANumber, "add adds no tensor"),
    "a forward that counts": (Counts, "Counts: its forward changes its attributes"),
    "a forward that asks": (AsksWhatItIs, "depends on the kind of its arguments"),
    "a forward that makes a tensor": (MakesATensor, "makes tensors of its own"),
    "an argument that may be left out": (MayBeLeftOut, "takes scale, which may be left out"),
    "a residual of another shape": (Broadcasts, "with it the forward raises in eval.* shape"),
    "hooks": (hooked, "its hooks would see another output"),
    "an activation of its own": (with_an_activation, "applies an activation already"),
    "the model itself": (lambda: nn.BatchNorm2d(4), "it is the whole model"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_taken_in_is_left_with_its_reason(case):
    make, reason = LEFT[case]
    model = make()
    before = [copy.deepcopy(m) for n, m in model.named_modules() if not batch_norms(m) and n]
    table = tn.convert(model, to="truenorm", fuse=True, example=X)
    told = next(row.note for row in table.rows if row.layer in ("bn", "0", "1", ""))
    assert told.startswith("takes nothing in: ")
    assert re.search(reason, told)
    after = [m for n, m in model.named_modules() if not batch_norms(m) and n]
    assert [*map(type, after)] == [*map(type, before)]
    assert type(model).__module__ != "truenorm.layers.rewriting"


def test_a_rewritten_block_is_copied_pickled_and_exported():
    model = nn.Sequential(Residual(), Shared()).eval()
    expected = model(X * 1)
    tn.convert(model, to="truenorm", fuse=True, example=X)
    assert isinstance(model[0], Residual)
    assert type(model[0]) is not Residual
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        assert_close(again(X * 1), expected)
    assert_close(torch.export.export(model, (X,)).module()(X), expected)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)


def test_a_state_dict_goes_from_one_to_the_other():
    plain, fused = nn.Sequential(Residual(), Shared()), nn.Sequential(Residual(), Shared())
    tn.convert(fused, to="truenorm", fuse=True, example=X)
    fused.load_state_dict(plain.state_dict())
    assert_close(fused.eval()(X), plain.eval()(X * 1))


def test_a_fused_model_is_folded():
    model = nn.Sequential(Functional(), Residual()).train()
    model(X * 1)
    expected = model.eval()(X * 1)
    tn.convert(model, to="truenorm", fuse=True, example=X)
    folded = tn.fold(model, X)
    assert_close(folded.model(X), expected, rtol=1e-4, atol=1e-5)


def test_looking_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sigmoid(), Residual()).train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    tn.convert(model, to="truenorm", fuse=True, example=X)
    assert same_state(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_only_what_where_selects_takes_anything_in():
    model = Shared()
    tn.convert(model, to="truenorm", fuse=True, example=X, where="more")
    assert type(model.bn) is nn.BatchNorm2d
    assert model.more.act == "relu"
    assert isinstance(model.act, nn.ReLU)  # which the other one needs


def test_a_norm_that_the_example_does_not_call_is_told():
    model = Functional()
    table = tn.convert(model, to="truenorm", fuse=True, example=X)
    notes = {row.layer: row.note for row in table.rows}
    assert notes["more"] == "takes nothing in: the example does not call it"


@pytest.mark.parametrize("settings", [{"fuse": True}, {"example": X}], ids=["fuse", "example"])
def test_fuse_and_example_need_each_other(settings):
    model = sequence(nn.ReLU())
    with pytest.raises(tn.InputError, match="fuse=True needs the setting example"):
        tn.convert(model, to="truenorm", **settings)
    assert type(model[1]) is nn.BatchNorm2d


def test_an_example_that_does_not_fit_changes_nothing():
    model = sequence(nn.ReLU())
    with pytest.raises(RuntimeError, match="channels"):
        tn.convert(model, to="truenorm", fuse=True, example=torch.zeros(2, 3, 5, 5))
    assert type(model[1]) is nn.BatchNorm2d
    assert isinstance(model[2], nn.ReLU)
