from __future__ import annotations

import copy
import functools
import random
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


def by_hand(model, value):
    for p in model.parameters():
        if value is None:
            p.grad = None
        elif p.grad is not None:
            p.grad.fill_(value)


CLEARED = {
    "by the optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "to zero by the optimizer": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by the model": lambda model, optimizer: model.zero_grad(),
    "to zero by the model": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by hand": lambda model, optimizer: by_hand(model, None),
    "to zero by hand": lambda model, optimizer: by_hand(model, 0),
}


def assert_tracked(model, *batches):
    """The statistics of each norm of ``model`` are those after steps on ``batches`` alone.

    The weights have not moved: the rate of learning is 0.
    """
    clean = copy.deepcopy(model)
    for layer in clean.modules():
        if isinstance(layer, tn.BatchNorm):
            layer.reset_running_stats()
            layer.commit = "forward"
    for batch in batches:
        clean(batch)
    for one, other in zip(statistics(model), statistics(clean), strict=True):
        assert_close(one, other)


def still(model):
    """An optimizer whose steps change nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.mark.parametrize("clear", CLEARED)
@pytest.mark.parametrize("late", [False, True])
def test_a_skipped_step_takes_its_statistics_with_it(clear, late):
    """As a gradient scaler skips steps; clearing may stand before or after the forward."""
    model = net(commit="step")
    optimizer = still(model)
    with tn.attach(optimizer, model):
        model(normal(8, 3, seed=1) + 9).sum().backward()  # never stepped on
        if late:
            out = model(normal(8, 3, seed=2))
            CLEARED[clear](model, optimizer)
        else:
            CLEARED[clear](model, optimizer)
            out = model(normal(8, 3, seed=2))
        out.sum().backward()
        optimizer.step()
    assert_tracked(model, normal(8, 3, seed=2))


@pytest.mark.parametrize("clear", CLEARED)
def test_a_step_without_the_gradients_commits_nothing(clear):
    model = net(commit="step")
    optimizer = still(model)
    with tn.attach(optimizer, model):
        model(normal(8, 3)).sum().backward()
        CLEARED[clear](model, optimizer)
        optimizer.step()
    assert_tracked(model)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_what_changes_gradients_without_clearing_them_keeps_the_statistics(scale):
    """Clipping and unscaling between micro-batches."""
    model = net(commit="step")
    optimizer = still(model)
    with tn.attach(optimizer, model):
        for seed in range(3):
            model(normal(8, 3, seed=seed)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), scale)
        optimizer.step()
    assert model[1].num_batches_tracked == 1
    assert_tracked(model, torch.cat([normal(8, 3, seed=seed) for seed in range(3)]))


@pytest.mark.parametrize("clear", CLEARED)
def test_a_gradient_scalers_skipped_steps_do_not_count(clear):
    model = net(commit="step").float()
    optimizer = still(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    stepped = []
    with tn.attach(optimizer, model):
        for seed in range(5):
            x = normal(8, 3, seed=seed).float()
            scaler.scale(model(x).square().sum() * 100).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() == before:
                stepped.append(x)
            CLEARED[clear](model, optimizer)
    assert 0 < len(stepped) < 5
    assert_tracked(model, *stepped)


@pytest.mark.parametrize("clear", CLEARED)
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_step_of_many_closures_counts_the_last(clear, search):
    model = net(commit="step")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))

    def closure():
        CLEARED[clear](model, optimizer) if seen else None
        loss = model(normal(8, 3)).square().sum()
        loss.backward()
        return loss

    with tn.attach(optimizer, model):
        optimizer.step(closure)
    assert len(seen) > 2
    assert model[1].num_batches_tracked == 1
    assert_close(model[1].running_mean, seen[-1].mean(0) * 0.1)


def test_a_graph_that_is_retained_counts_again_after_its_gradients_were_cleared():
    """As methods do that weigh the gradients of several losses against each other."""
    model = net(commit="step")
    optimizer = torch.optim.SGD([model[3].bias], lr=0.0)  # which no backward pass looks at
    x = normal(8, 3)
    with tn.attach(optimizer, model):
        out = model(x)
        for column in range(2):
            optimizer.zero_grad()
            out[:, column].sum().backward(retain_graph=True)
        optimizer.step()
        assert_tracked(model, x)
        out.square().sum().backward()
        optimizer.step()  # the batch is in the statistics already
    assert_tracked(model, x)


# -- forwards that record no gradient --------------------------------------------------------------


def unrecorded(lone):
    """A net whose first norm, or only one, stands before everything that learns."""
    torch.manual_seed(0)
    norm = tn.BatchNorm1d(3, affine=False, commit="step")
    behind = [] if lone else [tn.BatchNorm1d(4, commit="step")]
    return nn.Sequential(norm, nn.Linear(3, 4), *behind, nn.Tanh(), nn.Linear(4, 2)).double()


class Reentrant(nn.Module):
    """A net that is run again in the backward pass, its norm, all of it, or a part."""

    def __init__(self, inside):
        super().__init__()
        model = net(commit="step")
        self.before = nn.Sequential(*model[:inside])
        self.within = nn.Sequential(*model[inside:])

    def forward(self, x):
        return checkpoint(self.within, self.before(x).requires_grad_(), use_reentrant=True)


UNRECORDED = {
    "first of two norms": lambda: unrecorded(lone=False),
    "only norm": lambda: unrecorded(lone=True),
    "checkpointed whole": lambda: Reentrant(0),
    "checkpointed from the norm on": lambda: Reentrant(1),
}


@pytest.mark.parametrize("clear", CLEARED)
@pytest.mark.parametrize("made", UNRECORDED)
def test_a_forward_that_records_no_gradient_counts_with_the_step(made, clear):
    model = UNRECORDED[made]()
    optimizer = still(model)
    with tn.attach(optimizer, model):
        model(normal(8, 3, seed=1) + 9).square().sum().backward()  # never stepped on
        CLEARED[clear](model, optimizer)
        with torch.no_grad():
            model(normal(20, 3, seed=4) + 50)  # a validation by mistake
        whole = "two" in made  # the second norm would see micro-batches normalized by themselves
        for part in normal(8, 3, seed=2).split([8] if whole else [5, 3]):
            model(part).square().sum().backward()
        optimizer.step()
    assert_tracked(model, normal(8, 3, seed=2))


@pytest.mark.parametrize("made", [n for n in UNRECORDED if n != "only norm"])
def test_a_validation_that_records_gradients_does_not_count_either(made):
    model = UNRECORDED[made]()
    optimizer = still(model)
    with tn.attach(optimizer, model):
        for seed in range(2):
            optimizer.zero_grad()
            model(normal(20, 3, seed=4) + 50)
            model(normal(8, 3, seed=seed)).square().sum().backward()
            model(normal(20, 3, seed=5) + 50)
            optimizer.step()
    assert_tracked(model, *(normal(8, 3, seed=seed) for seed in range(2)))


@pytest.mark.parametrize("made", UNRECORDED)
def test_a_step_on_gradients_that_are_not_finite_drops_those_forwards(made):
    model = UNRECORDED[made]()
    optimizer = still(model)
    with tn.attach(optimizer, model):
        with torch.no_grad():
            model(normal(20, 3, seed=4))
        (model(normal(8, 3)).sum() * float("inf")).backward()
        with pytest.warns(UserWarning, match="skipped_batches"):
            optimizer.step()
    assert_tracked(model)
    norms = [m for m in model.modules() if isinstance(m, tn.BatchNorm)]
    assert [norm.skipped_batches for norm in norms] == [1] * len(norms)


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


def test_an_attachment_may_be_removed_inside_its_block_and_again():
    model = net(commit="step")
    optimizer = sgd(model)
    with tn.attach(optimizer, model) as attached:
        attached.remove()
    attached.remove()
    with tn.attach(optimizer, model):
        pass


def test_what_others_made_of_zero_grad_stays():
    model = net(commit="step")
    optimizer = sgd(model)
    calls = []
    mine, ours = optimizer.zero_grad, lambda: (calls.append("before"), mine())
    optimizer.zero_grad = ours
    attached = tn.attach(optimizer, model)
    covered = optimizer.zero_grad
    optimizer.zero_grad = lambda: (calls.append("after"), covered())
    model(normal(8, 3)).sum().backward()
    attached.remove()
    optimizer.zero_grad()
    assert calls == ["after", "before"]
    assert tn.rollback(model) == 1  # a removed attachment drops nothing
    optimizer.zero_grad = ours
    with tn.attach(optimizer, model):
        optimizer.zero_grad()
    assert optimizer.zero_grad is ours


PAIRS = {
    "model, optimizer": lambda m, o: copy.deepcopy((m, o)),
    "optimizer, model": lambda m, o: copy.deepcopy((o, m))[::-1],
    "a trainer": lambda m, o: tuple(copy.deepcopy({"o": o, "more": {"m": m}, "again": o}).values()),
}


@pytest.mark.parametrize("order", PAIRS)
def test_a_copy_of_model_and_optimizer_is_attached_too(order):
    model = net(commit="step")
    optimizer = still(model)
    with tn.attach(optimizer, model):
        copied = PAIRS[order](model, optimizer)
        if order == "a trainer":
            copied = copied[1]["m"], copied[0]
        twin, own = copied
        for m, o, seeds in ((twin, own, (1, 2)), (model, optimizer, (3,))):
            for seed in seeds:
                o.zero_grad()
                m(normal(8, 3, seed=seed)).sum().backward()
                o.step()
        assert own.param_groups[0]["params"][0] is twin[0].weight
        assert_tracked(twin, normal(8, 3, seed=1), normal(8, 3, seed=2))
        assert_tracked(model, normal(8, 3, seed=3))
        again = copy.deepcopy(twin)
    assert "__deepcopy__" not in vars(optimizer)
    third, unattached = copy.deepcopy((again, optimizer))
    assert "zero_grad" not in vars(unattached)
    with pytest.raises(tn.InputError, match="attached already"):
        tn.attach(own, twin)
    assert third is not again


def test_an_attachment_is_copied_with_its_optimizer():
    model = net(commit="step")
    optimizer = still(model)
    attached = tn.attach(optimizer, model)
    twin, own, tie = copy.deepcopy([model, optimizer, attached])
    tie.remove()
    twin(normal(8, 3)).sum().backward()
    own.step()
    assert twin[1].num_batches_tracked == 0
    model(normal(8, 3)).sum().backward()
    optimizer.step()
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("lost", [lambda pair: pair, copy.deepcopy], ids=["never", "once"])
def test_a_step_that_commits_nothing_is_told_of_at_the_next_forward(lost):
    """Not attached at all, or a model that was copied without its optimizer."""
    model = net(commit="step")
    if lost is copy.deepcopy:
        tn.attach(still(model), model)
    model = lost(model)
    optimizer = sgd(model)
    model(normal(8, 3)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"a step was taken of .*attach\(optimizer, model\)"):
        model(normal(8, 3))
    model(normal(8, 3))  # told once


@pytest.mark.parametrize("finite", [True, False])
def test_sparse_gradients_are_looked_at_too(finite):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), tn.BatchNorm1d(4, commit="step"))
    optimizer = still(model)
    with tn.attach(optimizer, model):
        for _ in range(2):
            out = model(torch.tensor([0, 1, 1, 3]))
            (out.square() * torch.arange(4.0) * (1 if finite else float("inf"))).sum().backward()
        if finite:
            optimizer.step()
        else:
            with pytest.warns(UserWarning, match="skipped_batches"):
                optimizer.step()
    assert model[0].weight.grad.is_sparse
    assert (model[1].num_batches_tracked, model[1].skipped_batches) == (
        (1, 0) if finite else (0, 2)
    )


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_of_two_optimizers_none_commits_what_the_other_cannot_step_on(bad):
    model = net(commit="step")
    optimizers = [still(model[:2]), still(model[2:])]
    ties = [tn.attach(optimizer, model) for optimizer in optimizers]
    x = normal(8, 3)
    model(x).square().sum().backward()
    if bad is not None:
        model[3 * bad].weight.grad[0, 0] = float("nan")
        with pytest.warns(UserWarning, match="skipped_batches"):
            optimizers[0].step()
    else:
        optimizers[0].step()
    optimizers[1].step()
    assert_tracked(model, *([x] if bad is None else []))
    assert model[1].skipped_batches == (bad is not None)
    for tie in ties:
        tie.remove()


DROPPED = {
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "commit": lambda m: setattr(m[1], "commit", "forward") or setattr(m[1], "commit", "step"),
    "frozen": lambda m: setattr(m[1], "frozen", True) or setattr(m[1], "frozen", False),
    "convert": lambda m: (tn.convert(m, to="torch"), tn.convert(m, to="truenorm", commit="step")),
    "reset_running_stats": lambda m: m[1].reset_running_stats(),
}


@pytest.mark.parametrize("how", DROPPED)
def test_what_is_pending_belongs_to_the_state_it_was_made_with(how):
    model = net(commit="step")
    model(normal(8, 3) + 9).sum().backward()
    DROPPED[how](model)
    assert tn.rollback(model) == 0
    model(normal(8, 3)).sum().backward()
    tn.commit(model)
    assert_tracked(model, normal(8, 3))


def test_what_is_pending_outlives_a_state_that_is_none_of_its_own():
    model = net(commit="step")
    model(normal(8, 3)).sum().backward()
    model.load_state_dict(model[3].state_dict(prefix="3."), strict=False)
    assert tn.rollback(model) == 1


def test_commit_is_an_option_that_can_be_set_and_called():
    layer = tn.BatchNorm1d(3)
    layer.commit = "step"
    assert layer.commit == layer.options.commit == "step"
    assert type(layer.options.commit) is str
    layer(torch.rand(4, 3))
    assert layer.num_batches_tracked == 0
    layer.commit()
    assert layer.num_batches_tracked == 1
    with pytest.raises(tn.InputError, match="unknown commit 'later'"):
        layer.commit = "later"
    other = tn.BatchNorm1d(3, commit=layer.commit)
    assert type(other.options.commit) is str
    other.commit = "forward"
    other(torch.rand(4, 3))
    assert other.num_batches_tracked == 1
    assert layer.commit == "step"


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
@pytest.mark.parametrize("clear", CLEARED)
def test_a_compiled_model_may_be_attached(clear):
    model = net(commit="step")
    run = torch.compile(model, backend="aot_eager")
    optimizer = still(model)
    with tn.attach(optimizer, model):
        run(normal(8, 3, seed=1) + 9).sum().backward()  # never stepped on
        CLEARED[clear](model, optimizer)
        for part in normal(12, 3).split(6):
            run(part).sum().backward()
        optimizer.step()
    assert_tracked(model, normal(12, 3))


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


# -- in any order --------------------------------------------------------------------------


class Books:
    """A net in training, and which batches' gradients stand in its parameters, kept by hand."""

    def __init__(self, made):
        self.model = made()
        self.optimizer = still(self.model)
        self.tie = tn.attach(self.optimizer, self.model)
        self.batches = []  # all, by number
        self.pending = []  # numbers of those behind which no step has been taken
        self.outs = {}  # number -> output without a backward pass yet
        self.standing = set()
        self.steps = []  # the numbers that each step was taken on

    def forward(self, draw, *, learn=True, kept=True):
        x = normal(draw.randint(2, 6), 3, seed=len(self.batches))
        number = len(self.batches)
        self.batches.append(x)
        self.pending.append(number)
        with torch.set_grad_enabled(learn):
            out = self.model(x)
        if kept:
            self.outs[number] = out

    def backward(self, draw):
        if self.outs:
            number = draw.choice(list(self.outs))
            self.outs.pop(number).square().sum().backward()
            self.standing.add(number)

    def clear(self, draw):
        CLEARED[draw.choice(list(CLEARED))](self.model, self.optimizer)
        self.pending = [n for n in self.pending if n not in self.standing]
        self.standing.clear()

    def scale(self, draw):
        for p in self.model.parameters():
            p.grad = None if p.grad is None else p.grad.mul_(draw.random() + 0.1)

    def step(self, draw):
        self.optimizer.step()
        taken = [n for n in self.pending if n in self.standing] or self.pending
        self.steps += [taken] if taken else []
        self.pending = []
        self.outs.clear()  # the weights were written


ANY = {
    "plain": lambda: net(commit="step"),
    "first of two norms": UNRECORDED["first of two norms"],
    "checkpointed whole": UNRECORDED["checkpointed whole"],
    "checkpointed from the norm on": UNRECORDED["checkpointed from the norm on"],
}


@pytest.mark.parametrize("made", ANY)
@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_a_step_counts_the_forwards_whose_gradients_it_is_taken_on(made, seed):
    draw, books = random.Random(seed), Books(ANY[made])
    moves = [
        books.forward, books.forward, books.backward, books.backward, books.clear, books.step,
        books.scale, functools.partial(books.forward, learn=False, kept=False),
        functools.partial(books.forward, kept=False),
    ]  # fmt: skip
    for _ in range(40):
        draw.choice(moves)(draw)
    books.tie.remove()
    assert books.steps
    norm = next(m for m in reversed(list(books.model.modules())) if isinstance(m, tn.BatchNorm))
    seen = []
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    for numbers in books.steps:
        seen.clear()
        with torch.no_grad():
            for number in numbers:
                books.model(books.batches[number])
        batch = torch.cat(seen)
        mean, var = mean * 0.9 + batch.mean(0) * 0.1, var * 0.9 + batch.var(0) * 0.1
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == len(books.steps)
