from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import truenorm as tn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(kind=tn.BatchNorm1d, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), kind(4, **options), nn.ReLU(), nn.Linear(4, 2)).double()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def statistics(model):
    return [b.clone() for n, b in model.state_dict().items() if "running" in n or "tracked" in n]


def test_micro_batches_are_pooled_as_the_batch_they_make():
    """Unequal ones, too; torch.nn's average of their variances is another number."""
    x = normal(32, 3) * 2 + 1
    whole, parts, theirs = net(), net(commit="step"), net(nn.BatchNorm1d)
    whole(x)
    optimizer = sgd(parts)
    with tn.attach(optimizer, parts):
        for part in x.split([4, 4, 10, 2, 12]):
            parts(part).square().mean().backward()
            theirs(part)
        optimizer.step()
    for ours, exact in zip(statistics(parts), statistics(whole), strict=True):
        assert_close(ours, exact)
    assert parts[1].num_batches_tracked == 1
    assert theirs[1].num_batches_tracked == 5
    assert not torch.allclose(theirs[1].running_var, whole[1].running_var, rtol=0.05)


def test_nothing_is_written_before_the_step():
    model = net(commit="step")
    before = statistics(model)
    model(normal(8, 3)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    tn.commit(model)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"commit": "step"}, {"ghost": 4}], ids=str)
def test_activation_checkpointing_counts_once(reentrant, options):
    x = normal(8, 3).requires_grad_()
    results = []
    for kind, own in ((tn.BatchNorm1d, options), (nn.BatchNorm1d, {})):
        again, straight = net(kind, **own), net(kind, **own)
        for model in (again, straight):
            optimizer = sgd(model)
            attached = tn.attach(optimizer, model) if own.get("commit") else None
            out = checkpoint(model, x, use_reentrant=reentrant) if model is again else model(x)
            out.square().sum().backward()
            optimizer.step()
            if attached:
                attached.remove()
        results.append((statistics(again), statistics(straight)))
    ours, theirs = results
    assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True))
    assert theirs[0][2] == 2  # the fault: torch's layer counts the repeated forward


def test_checkpointed_gradients_with_renorm_are_exact_with_commit_by_step():
    renorm = tn.Renorm(start=0, rmax_at=0, dmax_at=0)
    grads = []
    for checkpointed in (False, True):
        model = net(commit="step", renorm=renorm)
        model[1].num_batches_tracked.fill_(5)
        x = normal(8, 3).requires_grad_()
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        out.square().sum().backward()
        grads.append(x.grad)
    assert_close(*grads)


def test_a_forward_whose_loss_was_nan_never_reaches_the_average():
    model = net(commit="step")
    optimizer = sgd(model)
    with tn.attach(optimizer, model):
        before = statistics(model)
        (model(normal(8, 3)).sum() * float("nan")).backward()
        with pytest.warns(UserWarning, match="skipped_batches"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
        assert model[1].skipped_batches == 1


@pytest.mark.parametrize("late_zero_grad", [False, True])
def test_a_skipped_step_takes_its_statistics_with_it(late_zero_grad):
    """As a gradient scaler skips steps; zero_grad may stand before or after the forward."""
    model, clean = net(commit="step"), net(commit="step")
    optimizer = sgd(model)
    with tn.attach(optimizer, model):
        model(normal(8, 3, seed=1) + 9).sum().backward()  # never stepped on
        if late_zero_grad:
            out = model(normal(8, 3, seed=2))
            optimizer.zero_grad()
        else:
            optimizer.zero_grad()
            out = model(normal(8, 3, seed=2))
        out.sum().backward()
        optimizer.step()
    clean(normal(8, 3, seed=2))
    tn.commit(clean)
    for one, other in zip(statistics(model), statistics(clean), strict=True):
        assert_close(one, other)


def test_validation_in_train_mode_by_mistake_does_not_count():
    """Whether rolled back by hand, or left out because no gradient reached it."""
    model, clean = net(commit="step"), net(commit="step")
    optimizer = sgd(model)
    with tn.attach(optimizer, model):
        with torch.no_grad():
            model(normal(20, 3, seed=3) + 50)
        assert tn.rollback(model) == 1
        with torch.no_grad():
            model(normal(20, 3, seed=4) + 50)
        model(normal(8, 3)).sum().backward()
        optimizer.step()
    clean(normal(8, 3))
    tn.commit(clean)
    for one, other in zip(statistics(model), statistics(clean), strict=True):
        assert_close(one, other)


def test_without_any_gradient_all_forwards_are_pooled():
    model, whole = net(commit="step"), net()
    with torch.no_grad():
        for part in normal(12, 3).split(4):
            model(part)
    tn.commit(model)
    whole(normal(12, 3))
    assert_close(model[1].running_var, whole[1].running_var)


def test_committing_nothing_changes_nothing():
    model = net(commit="step")
    before = statistics(model)
    tn.commit(model)
    assert tn.rollback(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))


def test_an_attachment_is_taken_off_whole():
    model = net(commit="step")
    optimizer = sgd(model)
    attached = tn.attach(optimizer, model)
    with pytest.raises(tn.InputError, match="attached already"):
        tn.attach(optimizer, model)
    attached.remove()
    assert "zero_grad" not in vars(optimizer)
    model(normal(8, 3)).sum().backward()
    optimizer.step()
    assert model[1].num_batches_tracked == 0
    tn.attach(optimizer, model).remove()


def test_a_model_without_transactions_cannot_be_attached():
    model = net()
    with pytest.raises(tn.InputError, match="commit='step'"):
        tn.attach(sgd(model), model)


def test_statistics_that_are_never_committed_are_told_of_once():
    layer = tn.BatchNorm1d(2, commit="step")
    x = torch.ones(2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1100):
            layer(x)
    assert [str(w.message).split(" of a")[0] for w in caught] == ["1024 forwards"]


def test_fit_commits_each_of_its_steps(splits):
    model = tn.build(tn.ModelSpec(widths=(8,)), (6,), 3, seed=0)
    again = copy.deepcopy(model)
    tn.convert(model, to="truenorm", commit="step")
    config = tn.TrainConfig(epochs=2, batch_size=16)
    tn.fit(model, splits, config)
    tn.fit(again, splits, config)
    for key, value in again.state_dict().items():
        assert_close(model.state_dict()[key], value)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_a_compiled_layer_commits_by_step_too():
    eager, compiled = net(commit="step"), net(commit="step")
    run = torch.compile(compiled, backend="aot_eager")
    for model, call in ((eager, eager), (compiled, run)):
        for part in normal(12, 3).split(4):
            call(part).sum().backward()
        tn.commit(model)
    for one, other in zip(statistics(compiled), statistics(eager), strict=True):
        assert_close(one, other)
    assert eager[1].num_batches_tracked == 1
