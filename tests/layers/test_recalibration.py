from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import foreign as others
import patients
import truenorm as tn
from states import same_state
from truenorm.calling.call import Call, accuracy_of, loss_of, output_of
from truenorm.calling.nested import examples_of
from truenorm.layers import recalibration

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def rows(count=96, features=4, seed=0):
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double()
    return x * torch.tensor([1.0, 2, 3, 4]).double()[:features] + 5


def net(norm=nn.BatchNorm1d, seed=0, dropout=0.0):
    """linear-bn-relu-linear-bn in float64."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Dropout(dropout), nn.Linear(5, 3), norm(3)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.uniform_(-1, 1)
    return model


def by_hand(model, x):
    """Statistics of both norms of ``net`` where each layer sees what inference gives it."""
    value, found = x.numpy(), []
    for layer in model:
        if isinstance(layer, nn.Linear):
            value = value @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        elif isinstance(layer, nn.ReLU):
            value = np.maximum(value, 0)
        elif isinstance(layer, nn.BatchNorm1d):
            mean, var = value.mean(0), value.var(0, ddof=1)
            found.append((mean, var))
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            value = (value - mean) / np.sqrt(var + layer.eps) * weight + bias
    return found


def same_statistics(model, expected, **tolerance):
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer, (mean, var) in zip(norms, expected, strict=True):
        assert_close(layer.running_mean, torch.as_tensor(mean), **(tolerance or EXACT))
        assert_close(layer.running_var, torch.as_tensor(var), **(tolerance or EXACT))


# -- the statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, tn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("cuts", [[96], [48, 48], [1, 2, 3, 30, 60], [32, 32, 32]])
def test_statistics_are_those_of_all_data_through_inference_however_cut(norm, cuts):
    model, x = net(norm), rows()
    expected = by_hand(net(), x)
    told = tn.recalibrate(model, list(x.split(cuts)))
    same_statistics(model, expected)
    assert told.kept
    assert told.batches == len(cuts)
    assert [row.layer for row in told.rows] == ["1", "5"]
    assert [row.values for row in told.rows] == [96, 96]


def test_a_chain_is_exact_after_a_pass_for_each_layer_and_one_to_see_it():
    x = rows()
    assert tn.recalibrate(net(), x.split(24)).passes == 3
    model = net()
    tn.recalibrate(model, x.split(24))
    again = tn.recalibrate(model, x.split(24))
    assert again.passes == 1
    assert [(row.drift, row.ratio) for row in again.rows] == [(0, 1), (0, 1)]


def test_one_batch_takes_one_pass():
    model, x = net(), rows()
    assert tn.recalibrate(model, [x]).passes == 1
    same_statistics(model, by_hand(net(), x))


def test_one_pass_normalizes_each_batch_by_its_own_statistics():
    model, x = net(), rows()
    parts = x.split(8)
    assert tn.recalibrate(model, parts, exact=False).passes == 1
    inputs = []
    for part in parts:
        hidden = model[0](part).detach()
        own = F.batch_norm(
            hidden, hidden.mean(0), hidden.var(0), model[1].weight, model[1].bias, eps=1e-5
        )
        inputs.append(model[4](own.relu()).detach())
    hidden, last = model[0](x).detach(), torch.cat(inputs)
    same_statistics(model, [(v.mean(0), v.var(0)) for v in (hidden, last)])
    exact = by_hand(net(), x)[1][1]
    assert not np.allclose(model[5].running_var.numpy(), exact, rtol=1e-3)  # what one pass costs


def test_large_means_cost_no_precision():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e4
    model = nn.Sequential(nn.BatchNorm1d(3))
    tn.recalibrate(model, x.split(100))
    assert_close(model[0].running_var.double(), x.double().var(0), rtol=1e-6, atol=0)
    assert model[0].running_var.dtype == torch.float32


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4).double()

        def forward(self, x):
            return torch.cat([self.bn(x), self.bn(3 * x[:5])])

    for cut in (96, 32):
        model, x = Twice(), rows()
        told = tn.recalibrate(model, x.split(cut))
        seen = torch.cat([torch.cat([part, 3 * part[:5]]) for part in x.split(cut)])
        same_statistics(model, [(seen.mean(0), seen.var(0))])
        assert told.rows[0].values == len(seen)


def test_what_is_masked_does_not_count():
    class Masked(nn.Module):
        def __init__(self, by_name):
            super().__init__()
            self.bn, self.by_name = tn.BatchNorm1d(4).double(), by_name

        def forward(self, x, mask):
            return self.bn(x, mask=mask) if self.by_name else self.bn(x, mask)

    x, mask = rows(), torch.arange(96) % 3 != 0
    for by_name in (True, False):
        model = Masked(by_name)
        spoilt = torch.where(mask[:, None], x, float("nan"))
        told = tn.recalibrate(model, list(zip(spoilt.split(20), mask.split(20), strict=True)))
        same_statistics(model, [(x[mask].mean(0), x[mask].var(0))])
        assert (told.rows[0].values, told.rows[0].note) == (64, "")


def test_a_batch_that_is_not_finite_is_left_out_and_told_of():
    model, x = net(), rows()
    expected = by_hand(net(), torch.cat([x[:32], x[64:]]))
    spoilt = x.clone()
    spoilt[40, 2] = float("nan")
    told = tn.recalibrate(model, spoilt.split(32))
    same_statistics(model, expected)
    assert told.rows[1].note == "1 of 3 calls were not finite and do not count"


def test_statistics_that_were_poisoned_are_healed():
    model, x = net(), rows()
    with torch.no_grad():
        model[1].running_var[0] = float("nan")
    y = torch.arange(96) % 3
    told = tn.recalibrate(model, list(zip(x.split(32), y.split(32), strict=True)))
    assert told.kept
    assert np.isnan(told.before.loss)
    assert (told.rows[0].drift, told.rows[0].note) == (np.inf, "was not finite before")
    same_statistics(model, by_hand(net(), x))


def test_drift_is_in_running_deviations_and_ratio_of_variances_either_way():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0)).double()
    x = torch.tensor([[3.0, 0.0], [5.0, 0.25]]).double()
    model[0].running_var.fill_(4)
    row = tn.recalibrate(model, [x]).rows[0]
    assert row.drift == 4 / 2
    assert_close(row.ratio, 4 / 0.03125)


def test_a_channel_whose_statistics_do_not_fit_half_precision_stays():
    x = torch.ones(6, 2, dtype=torch.float16)
    x[::2, 0] = 60_000
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    told = tn.recalibrate(model, [x])
    assert model[0].running_mean.tolist() == [0, 1]
    assert model[0].running_var.tolist() == [1, 0]
    assert told.rows[0].note.startswith("1 channels stay: fewer than two values, or")
    assert told.rows[0].note.endswith("beyond float16")


# -- faults of update_bn ----------------------------------------------------------------------


def test_frozen_statistics_stay_where_update_bn_moves_them():
    def frozen(model):
        model[1].eval().requires_grad_(False)
        model[1].running_mean.fill_(7)
        return model

    theirs, ours = frozen(net()), frozen(net())
    update_bn(rows().split(16), theirs)
    assert (theirs[1].running_mean != 7).all()
    told = tn.recalibrate(ours, rows().split(16))
    assert (ours[1].running_mean == 7).all()
    assert told.left[0].layer == "1"
    assert told.left[0].reason.startswith("is frozen: in eval mode within a model in train mode")
    assert [row.layer for row in told.rows] == ["5"]


def test_dropout_is_off_as_in_inference_where_update_bn_leaves_it_on():
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    theirs, ours = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)).train() for _ in range(2))
    torch.manual_seed(0)
    update_bn(x.split(1000), theirs)
    tn.recalibrate(ours, x.split(1000))
    assert_close(theirs[1].running_var.item(), 2.0, rtol=0.05, atol=0)
    assert_close(ours[1].running_var, x.var(0))


# -- what is left, and why --------------------------------------------------------------------


def reasons(model, **change):
    return {it.layer: it.reason for it in tn.recalibrate(model, rows().split(32), **change).left}


def test_what_is_frozen_of_ours_is_left():
    model = net(tn.BatchNorm1d)
    model[5].frozen = True
    before = copy.deepcopy(model[5].state_dict())
    assert reasons(model) == {"5": "is frozen"}
    assert same_state(model[5].state_dict(), before)


def test_frozen_norms_of_other_packages_are_left_and_named():
    x = rows().view(96, 4, 1, 1)
    model = nn.Sequential(others.FrozenNorm(4), nn.BatchNorm2d(4)).double()
    kept = copy.deepcopy(model[0].state_dict())
    told = tn.recalibrate(model, x.split(32))
    assert told.left == (("0", "is frozen, by its class"),)
    assert [row.layer for row in told.rows] == ["1"]
    assert same_state(model[0].state_dict(), kept)
    assert "0 of 1 batch norms" in str(tn.recalibrate(model[:1], x.split(32)))


def test_in_an_eval_model_a_norm_without_gradient_is_frozen_if_others_have_one():
    model = net().eval()
    model[1].requires_grad_(False)
    assert reasons(model) == {
        "1": "is frozen: its weight and bias need no gradient, others of the model do"
    }
    assert reasons(net().eval().requires_grad_(False)) == {}
    assert reasons(net().requires_grad_(False)) == {}


def test_a_norm_without_statistics_and_one_never_called_are_left():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.none = nn.BatchNorm1d(4, track_running_stats=False)
            self.unused = nn.BatchNorm1d(4)
            self.used = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.used(self.none(x))

    model = Partly().double()
    assert reasons(model) == {
        "none": "tracks no running statistics",
        "unused": "was never called",
    }
    assert model.unused.num_batches_tracked == 0
    text = str(tn.recalibrate(model, rows().split(32)))
    assert "1 of 3 batch norms recalibrated; batches: 3" in text
    assert "  unused left as it is: was never called" in text


def test_one_value_has_no_variance_and_changes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    told = tn.recalibrate(model, [rows(1)])
    assert {it.reason for it in told.left} == {"saw fewer than two values per channel"}
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        (net(), [], "at least one batch, and data has none"),
        (net(), iter([]), "at least one batch, and data has none"),
        (net(), rows(), "put a single batch into a list"),
        (net(), 3, "data must be batches that can be iterated, got int"),
        (nn.Linear(4, 5), [rows()], "has no batch norm"),
        (nn.Sequential(nn.LazyBatchNorm1d()), [rows()], "0 is lazy; call the model once"),
        (net(), [3], "must be a tensor, a tuple, a list or a dict, got int; give arguments="),
        (net(), [{"a": rows()}], "forward takes input, and the batch has only a; give arguments="),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_next_step(model, data, text):
    before = None if "lazy" in text else copy.deepcopy(model.state_dict())
    with pytest.raises(tn.InputError, match=text):
        tn.recalibrate(model, data)
    if before is not None:
        assert same_state(model.state_dict(), before)


def test_other_wrong_arguments_are_refused():
    with pytest.raises(tn.InputError, match="max_batches must be at least 1 or None, got 0"):
        tn.recalibrate(net(), [rows()], max_batches=0)
    with pytest.raises(tn.InputError, match="no loss can be measured on held_out"):
        tn.recalibrate(net(), [rows()], held_out=[rows()])


# -- data -------------------------------------------------------------------------------------


def labelled(count=96, size=16, shift=0):
    x, y = rows(count), (torch.arange(count) + shift) % 3
    return list(zip(x.split(size), y.split(size), strict=True))


def test_a_one_shot_iterator_is_read_once_and_no_further_than_asked():
    model, taken = net(), []
    parts = (taken.append(part) or part for part in itertools.cycle(rows().split(32)))
    told = tn.recalibrate(model, parts, max_batches=3)
    assert len(taken) == told.batches == 3
    same_statistics(model, by_hand(net(), rows()))


def test_at_most_max_batches_are_used_with_or_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows())

    for data in (DataLoader(Stream(), batch_size=10), list(rows().split(10))):
        model = net()
        tn.recalibrate(model, data, max_batches=3)
        same_statistics(model, by_hand(net(), rows()[:30]))


def test_dicts_give_what_the_forward_has_names_for():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, features, labels=None):
            out = self.net(features)
            return {"logits": out, "loss": F.cross_entropy(out, labels)}

    model = Named()
    parts = [{"features": x, "labels": y, "id": "?"} for x, y in labelled()]
    told = tn.recalibrate(model, parts[:5], held_out=parts[5:], keep_worse=True)
    same_statistics(model, by_hand(net(), rows()[:80]))
    x, y = labelled()[5]
    after = F.cross_entropy(model.eval().net(x), y).item()
    assert told.after.loss == after
    assert told.after.examples == 16


def test_the_user_says_how_a_batch_is_called():
    for way in (
        lambda batch: (batch[1],),
        lambda batch: {"input": batch[1]},
        lambda batch: ((batch[1],), {}),
        lambda batch: ((), {"input": batch[1]}),
    ):
        model = net()
        tn.recalibrate(
            model,
            [("name", part) for part in rows().split(32)],
            arguments=way,
            loss=lambda out, target: out.square(),
            keep_worse=True,
        )
        same_statistics(model, by_hand(net(), rows()))


def test_every_tenth_of_labelled_batches_judges_and_is_then_pooled_in():
    model, judged = net(), net()
    batches = labelled(320)
    told = tn.recalibrate(model, batches, keep_worse=True)
    same_statistics(model, by_hand(net(), rows(320)))
    assert (told.batches, told.examples) == (20, 320)
    assert [row.values for row in told.rows] == [320, 320]
    held = [4, 14]
    tn.recalibrate(judged, [x for i, (x, _) in enumerate(batches) if i not in held])
    x, y = (torch.cat(part) for part in zip(*(batches[i] for i in held), strict=True))
    for measured, of in ((told.after, judged), (told.pooled, model)):
        out = of.eval()(x)
        assert measured.examples == 32
        assert_close(measured.loss, F.cross_entropy(out, y).item(), **EXACT)
        assert measured.accuracy == (out.argmax(1) == y).double().mean()
    assert len({told.before.loss, told.after.loss, told.pooled.loss}) == 3
    assert f"then pooled in, and loss {told.pooled.loss:.6g}" in str(told)


def test_held_out_batches_of_the_users_are_not_pooled_in():
    model, batches = net(), labelled(320)
    told = tn.recalibrate(model, batches[2:], held_out=batches[:2], keep_worse=True)
    same_statistics(model, by_hand(net(), rows(320)[32:]))
    assert (told.batches, told.examples, told.pooled) == (18, 288, None)
    assert "pooled" not in str(told)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [2, 3, 10, 21])
def test_targets_change_nothing_in_the_statistics(exact, count):
    torch.manual_seed(3)
    parts = torch.randn(count * 8, 3, 6, 6).double().split(8)
    layers = []
    for channels in (3, 4, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    deep = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    bare = copy.deepcopy(deep)
    batches = [(x, torch.arange(8) % 4) for x in parts]
    told = tn.recalibrate(deep, batches, exact=exact, keep_worse=True)
    assert told.pooled is not None
    plain = tn.recalibrate(bare, parts, exact=exact)
    assert (told.batches, told.examples) == (plain.batches, plain.examples) == (count, 8 * count)
    for a, b in zip(deep.state_dict().values(), bare.state_dict().values(), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_statistics_that_are_refused_are_those_that_were_judged():
    model, losses = net(), iter([1.0, 2.0])
    before = copy.deepcopy(model.state_dict())
    told = tn.recalibrate(model, labelled(), loss=lambda *_: next(losses))
    assert not told.kept
    assert (told.batches, told.examples, told.pooled) == (5, 80, None)
    assert same_state(model.state_dict(), before)


def test_what_makes_an_accepted_model_worse_is_not_pooled_in():
    model, losses, batches = net(), iter([3.0, 2.0, 4.0]), labelled()
    told = tn.recalibrate(model, batches, loss=lambda *_: next(losses))
    assert told.kept
    assert (told.before.loss, told.after.loss, told.pooled) == (3, 2, None)
    assert (told.batches, told.examples) == (5, 80)
    assert told.reason.startswith("with the held-out batches pooled in")
    nine_tenths = torch.cat([x for i, (x, _) in enumerate(batches) if i != 3])
    same_statistics(model, by_hand(net(), nine_tenths))
    asked, losses = net(), iter([3.0, 2.0, 4.0])
    told = tn.recalibrate(asked, batches, loss=lambda *_: next(losses), keep_worse=True)
    assert told.pooled.loss == 4
    same_statistics(asked, by_hand(net(), rows()))


def test_examples_weigh_alike_in_unequal_batches():
    model, (x, y) = net(), labelled(96, 96)[0]
    uneven = list(zip(x.split([90, 5, 1]), y.split([90, 5, 1]), strict=True))
    told = tn.recalibrate(model, [x], held_out=iter(uneven), keep_worse=True)
    assert_close(told.after.loss, F.cross_entropy(model.eval()(x), y).item(), **EXACT)


def test_a_worse_model_is_refused_unless_it_is_asked_for():
    model, data = net(), labelled()
    tn.recalibrate(model, data, keep_worse=True)
    good = copy.deepcopy(model.state_dict())
    spoilt = [(x * 30 - 90, y) for x, y in data]
    model.eval()
    labels = [(x, model(x).argmax(1)) for x, _ in data]
    told = tn.recalibrate(model, spoilt, held_out=labels)
    assert not told.kept
    assert told.after.loss > told.before.loss
    assert told.reason.startswith("the held-out loss would be higher than before")
    assert "measured and left as they were" in str(told)
    assert same_state(model.state_dict(), good)
    told = tn.recalibrate(model, spoilt, held_out=labels, keep_worse=True)
    assert told.kept
    assert not same_state(model.state_dict(), good)


def test_a_loss_that_stays_is_no_reason_to_refuse():
    assert tn.recalibrate(net(), labelled(), loss=lambda out, target: 1.5).kept
    told = tn.recalibrate(net(), labelled(), loss=lambda out, target: float("nan"))
    assert told.kept


# -- what is borrowed -------------------------------------------------------------------------


def randoms():
    state = np.random.get_state()  # noqa: NPY002  the global one is restored
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


class Draws(nn.Module):
    """A model that draws random numbers of every kind, even in eval mode, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.net = net(dropout=0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.net(x + torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002


def test_modes_random_states_gradients_hooks_and_other_buffers_are_given_back():
    for training in (True, False):
        model = Draws().train(training)
        model.net[4].train(not training)
        model(rows()).sum().backward()
        modes = [m.training for m in model.modules()]
        grads = [p.grad.clone() for p in model.parameters()]
        before, calls, replaced = randoms(), model.calls.clone(), model.replaced
        told = tn.recalibrate(model, rows().split(32))
        assert told.passes == 3  # every pass draws the same numbers
        assert randoms() == before
        assert [m.training for m in model.modules()] == modes
        assert model.calls == calls
        assert model.replaced is replaced
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        assert told.rows[0].drift > 0


@pytest.mark.parametrize("own", [True, False])
def test_a_shuffling_loader_repeats_itself_and_keeps_its_state(own):
    generator = torch.Generator().manual_seed(3) if own else None
    data = TensorDataset(rows(), torch.arange(96) % 3)
    loader = DataLoader(data, batch_size=12, shuffle=True, generator=generator)
    model = net()
    before = randoms(), generator and generator.get_state().tolist()
    told = tn.recalibrate(model, loader, keep_worse=True)
    assert told.passes == 6  # three of them without what is held out
    assert told.after.examples == 12
    assert (randoms(), generator and generator.get_state().tolist()) == before
    same_statistics(model, by_hand(net(), rows()))
    batches = list(loader)  # as they were drawn each time
    x, y = batches.pop(4)
    tn.recalibrate(model, [x for x, _ in batches])
    assert_close(told.after.loss, F.cross_entropy(model.eval()(x), y).item(), **EXACT)


class Stop(BaseException):
    pass


def fails_in(place, error):
    def loader():
        for i, part in enumerate(rows().split(16)):
            if place == "loader" and i == 3:
                raise error
            yield part

    class Again:
        def __iter__(self):
            self.times = getattr(self, "times", 0) + 1
            return loader() if self.times > 3 else iter(rows().split(16))

    calls = itertools.count()

    def fail(module, args):
        if place == "model" and next(calls) == 9:
            raise error

    return Again(), fail


@pytest.mark.parametrize("error", [ValueError("broken"), Stop()])
@pytest.mark.parametrize("place", ["loader", "model"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, tn.BatchNorm1d])
def test_a_failed_recalibration_leaves_the_model_as_it_was(norm, place, error):
    model = net(norm)
    model(rows())
    model[5].eval()
    with torch.no_grad():
        model[1].running_mean[0] = -0.0
        model[1].running_var[1] = float("nan")
    data, fail = fails_in(place, error)
    model[4].register_forward_pre_hook(fail)
    state = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    modes, before = [m.training for m in model.modules()], randoms()
    with pytest.raises(type(error)):
        tn.recalibrate(model, data)
    assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == state
    assert [m.training for m in model.modules()] == modes
    assert randoms() == before
    assert not model[1]._forward_pre_hooks


def test_data_that_differ_from_pass_to_pass_are_told_of():
    class Fresh:
        generator_of_its_own = torch.Generator().manual_seed(0)

        def __iter__(self):
            own = self.generator_of_its_own
            return iter([torch.randn(16, 4, generator=own).double() for _ in range(2)])

    told = tn.recalibrate(net(), Fresh())
    assert "the last pass still moved the statistics" in told.reason
    assert told.passes == 3


def test_a_compiled_model_is_recalibrated():
    inner = net().eval()
    model = torch.compile(inner, backend="eager")
    with torch.no_grad():
        model(rows())
    told = tn.recalibrate(model, [{"input": x, "id": 3} for x in rows().split(32)])
    same_statistics(inner, by_hand(net(), rows()))
    assert [row.layer for row in told.rows] == ["_orig_mod.1", "_orig_mod.5"]
    inner = net().eval()
    inner.compile(backend="eager")
    with torch.no_grad():
        inner(rows())
    tn.recalibrate(inner, rows().split(32))
    same_statistics(inner, by_hand(net(), rows()))
    part = net().eval()
    nested = nn.Sequential(torch.compile(part, backend="eager"), nn.Identity())
    with torch.no_grad():
        nested(rows()[:32])  # of the size that comes: else it is compiled again, with the hooks
    assert not tn.recalibrate(nested, rows().split(32)).left
    same_statistics(part, by_hand(net(), rows()))


def test_the_result_reads_as_a_table():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0)).double()
    x = torch.tensor([[3.0, 0.0], [5.0, 2.0]]).double()
    text = str(tn.recalibrate(model, [(x, x)], held_out=[(x, x)], keep_worse=True))
    assert text.splitlines() == [
        "1 of 1 batch norms recalibrated; batches: 1, examples: 2, passes: 1",
        "  held out, 2 examples: loss 0 -> 8.58579",
        "  the held-out loss is higher than before; kept as keep_worse=True asks",
        "  layer  mean drift  variance ratio  values",
        "  0            4 sd               2       2",
    ]


# -- calls ------------------------------------------------------------------------------------


def test_as_many_leading_elements_are_arguments_as_the_forward_requires():
    class Two(nn.Module):
        def forward(self, a, b, c=None, *, d=None):
            return a

    a, b, c = torch.zeros(2, 1), torch.ones(2), torch.ones(3)
    args, kwargs, target = Call(Two()).prepare([a, b, c])
    assert [v is w for v, w in zip(args, (a, b), strict=True)] == [True, True]
    assert (kwargs, target is c) == ({}, True)
    assert Call(Two()).prepare((a, b)).target is None
    args, kwargs, target = Call(Two()).prepare({"a": a, "d": b, "e": c, "y": c})
    assert (args, list(kwargs), target is c) == ((), ["a", "d"], True)
    by_name = Call(Two(), arguments=lambda batch: {"d": batch}).prepare(a)
    assert (by_name.args, by_name.kwargs["d"] is a) == ((), True)


def test_tensors_go_to_the_device_however_deep():
    batch = ({"a": [torch.zeros(2), "text"]}, SimpleNamespace(b=1))
    args = Call(nn.Identity(), device="meta", arguments=lambda batch: batch[:1]).prepare(batch).args
    assert args[0]["a"][0].is_meta
    assert args[0]["a"][1] == "text"


def test_a_loss_is_found_in_the_order_stated():
    out, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    held = SimpleNamespace(loss=torch.tensor(7.0), logits=out)
    assert loss_of(held, y, lambda output, target: torch.tensor([1.0, 2.0])) == 1.5
    assert loss_of(held, y) == 7
    assert loss_of({"loss": 3.0, "logits": out}, y) == 3
    assert loss_of({"out": out}, y) == F.cross_entropy(out, y).item()
    assert loss_of((out, None), y) == F.cross_entropy(out, y).item()
    assert loss_of(out, torch.zeros(2, 2)) == F.mse_loss(out, torch.zeros(2, 2)).item()
    assert loss_of(out, torch.zeros(2)) is None
    assert loss_of(out, None) is None
    assert loss_of("text", y) is None
    dense = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(32).view(2, 4, 4) % 3
    assert loss_of(dense, classes) == F.cross_entropy(dense, classes).item()
    assert accuracy_of(dense, classes) == (dense.argmax(1) == classes).double().mean()
    assert accuracy_of(out, torch.tensor([0, -100])) == 1
    assert accuracy_of(out, torch.zeros(2, 2)) is None
    assert output_of({"a": out}) is None


def test_examples_are_counted_along_the_first_axis():
    assert examples_of(("id", {"x": torch.zeros(7, 2)}, torch.zeros(3))) == 7
    assert examples_of(torch.zeros(())) == 1


# -- ranks ------------------------------------------------------------------------------------

SHARES = ([0, 1, 2, 3, 4], [5])  # which batches each rank has


def ranks_work(folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    mine = [labelled()[i] for i in SHARES[rank]]
    model = net()
    parallel = DistributedDataParallel(model)
    if rank:  # the ranks' statistics have come apart
        model(rows(seed=5))
    told = tn.recalibrate(parallel, [x for x, _ in mine], held_out=mine[:1], keep_worse=True)
    pooled = net()  # one rank has a batch to hold out, the other has none
    all_told = tn.recalibrate(pooled, mine, keep_worse=True)
    lone = net()
    tn.recalibrate(DistributedDataParallel(lone), [x for x, _ in mine] if rank else [])
    failed = ""
    try:
        tn.recalibrate(net(), [rows()] if rank else [None])
    except (RuntimeError, tn.InputError) as error:
        failed = str(error)
    counted = told.batches, all_told.batches, all_told.examples, all_told.after.examples
    torch.save(
        (model.state_dict(), counted, told.after, lone.state_dict(), failed, pooled.state_dict()),
        folder / f"{rank}",
    )
    dist.destroy_process_group()


def test_ranks_with_unequal_shares_have_the_statistics_of_all_data(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    given = [torch.load(tmp_path / f"{rank}", weights_only=False) for rank in range(2)]
    expected = by_hand(net(), rows())
    only = by_hand(net(), rows()[80:])
    for state, counted, after, lone, _, pooled in given:
        model = net()
        model.load_state_dict(state)
        same_statistics(model, expected)
        assert counted == (6, 6, 96, 16)
        held = [labelled()[i] for i in (0, 5)]
        x, y = (torch.cat(part) for part in zip(*held, strict=True))
        assert_close(after.loss, F.cross_entropy(model.eval()(x), y).item(), **EXACT)
        model.load_state_dict(lone)
        same_statistics(model, only)
        model.load_state_dict(pooled)
        same_statistics(model, expected)
    assert given[0][4].startswith("a batch must be a tensor")
    assert given[1][4] == "recalibrate failed on 1 other ranks; nothing was changed."


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=ranks_work, args=(Path(sys.argv[1]), r)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode for process in processes))


@pytest.mark.parametrize(
    ("count", "held"),
    [
        (2, [1]),
        (3, [1]),
        (9, [4]),
        (10, [4]),
        (11, [4]),
        (19, [4]),
        (20, [4, 14]),
        (39, [4, 14, 24]),
    ],
)
def test_what_is_held_out_is_spread_and_about_a_tenth(count, held):
    assert list(recalibration.held_out_of(count)) == held


@pytest.mark.parametrize("momentum", [0.5, 0.1, 0.01, 1e-4, None])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_recalibrated_model_is_healthy_however_few_the_batches(momentum, count):
    model = patients.trained("mlp")
    for norm in patients.norms(model):
        norm.momentum = momentum
        norm.reset_running_stats()
    data = [x for x, _ in patients.batches("mlp", count, size=96)]
    tn.recalibrate(model, data)
    diagnosis = tn.examine(model, data)
    assert diagnosis.healthy, str(diagnosis)
    assert not diagnosis.of("TN104")
    tracked = {int(norm.num_batches_tracked) for norm in patients.norms(model)}
    if momentum is None:
        assert tracked == {count}  # the weight of what is tracked from here on
    else:
        assert min(tracked) >= count
