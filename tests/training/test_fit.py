from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
import truenorm
from samples import blobs
from states import same_state
from truenorm import EarlyStopping, InputError, TrainConfig
from truenorm.data.batches import chunks
from truenorm.data.datasets import Splits, dataset
from truenorm.training.evaluate import logits_of, score
from truenorm.training.state import snapshot

CPU = torch.device("cpu")


def fit(model, splits, **changes):
    return truenorm.fit(model, splits, TrainConfig(**{"batch_size": 16, **changes}))


def reference_mlp(model):
    linear, norm, _, last = model
    names = {
        "w1": linear.weight, "w2": last.weight, "b2": last.bias,
        "gamma": norm.weight, "beta": norm.bias,
        "mean": norm.running_mean, "var": norm.running_var,
    }  # fmt: skip
    return {k: v.detach().double().numpy().copy() for k, v in names.items()}


@pytest.mark.parametrize(
    ("optimizer", "rule"), [("adam", reference.Adam()), ("sgd", reference.Sgd())]
)
def test_training_follows_the_float64_reference_step_by_step(splits, model, optimizer, rule):
    model.double()
    network = reference.Mlp(reference_mlp(model))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1))
    x = splits.scaling(splits.train.x).double().numpy()
    np.testing.assert_allclose(x, reference.standardize(splits.train.x.numpy()), atol=1e-6)
    batches = [(x[i.numpy()], splits.train.y[i].numpy()) for i in chunks(order, 16)]
    losses = network.train(batches, rule, lr=0.01)

    whole = nn.Sequential(Widen(), *model)
    history = fit(whole, splits, epochs=1, lr=0.01, seed=3, optimizer=optimizer)

    for name, value in reference_mlp(model).items():
        np.testing.assert_allclose(value, network.p[name], rtol=1e-7, atol=1e-9, err_msg=name)
    expected = np.average(losses, weights=[len(y) for _, y in batches])
    assert history.epochs[0].train_loss == pytest.approx(expected, rel=1e-9)
    valid = splits.scaling(splits.valid.x).double().numpy()
    logits = network.forward(valid, training=False)
    expected = reference.cross_entropy(logits, splits.valid.y.numpy())
    assert history.epochs[0].valid_loss == pytest.approx(expected, rel=1e-9)


def test_the_best_epoch_is_restored_to_the_bit_as_a_replay_shows(splits):
    def build():
        return truenorm.build(truenorm.ModelSpec(widths=(32,), dropout=0.3), (6,), 3, seed=1)

    first, again = build(), build()
    history = fit(first, splits, epochs=60, lr=0.02, patience=5, min_delta=0.0)
    assert history.stopped == "early"
    assert 0 < history.best_epoch < len(history.epochs)
    fit(again, splits, epochs=history.best_epoch, lr=0.02, patience=60, min_delta=0.0)
    assert same_state(first.state_dict(), again.state_dict())


def test_a_snapshot_is_a_copy_where_a_state_dict_is_a_reference(model):
    reference_only, copied = model.state_dict(), snapshot(model)
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].running_mean.add_(1)
    assert torch.equal(reference_only["0.weight"], model[0].weight)
    assert not torch.equal(copied["0.weight"], model[0].weight)
    assert not torch.equal(copied["1.running_mean"], model[1].running_mean)


def test_the_restored_running_statistics_are_the_best_epochs_own(splits, model):
    history = fit(model, splits, epochs=40, lr=0.05, patience=4, min_delta=0.0)
    with truenorm.accelerate():  # as in fit: torch's own kernels round otherwise
        logits = logits_of(model, splits.valid, splits.scaling, CPU)
    assert history.best_epoch < len(history.epochs)
    assert score(logits, splits.valid).loss == history.best.valid_loss


def test_validation_writes_no_statistic(splits, model):
    fit(model, splits, epochs=1)
    before = snapshot(model)
    model.train()
    logits_of(model, splits.valid, splits.scaling, CPU)
    assert same_state(before, model.state_dict())
    assert model.training
    assert model[1].training


def test_the_mean_validation_loss_weighs_examples_not_batches(splits, model):
    many = splits.valid.take(torch.arange(2051) % len(splits.valid))  # batches of 1024, 1024, 3
    logits = logits_of(model, many, splits.scaling, CPU)
    expected = reference.cross_entropy(logits.double().numpy(), many.y.numpy())
    assert score(logits, many).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [3, 17, 18, 33, 49, 60])
def test_a_last_batch_of_one_is_no_crash_and_every_example_is_used(splits, model, count):
    few = Splits(splits.train.take(torch.arange(count)), splits.valid)
    fit(model, few, epochs=2)
    assert model[1].num_batches_tracked == 2 * {3: 1, 17: 1, 18: 2, 33: 2, 49: 3, 60: 4}[count]


def test_a_batch_size_of_one_is_refused_with_the_next_step(splits, model):
    with pytest.raises(InputError, match=r"batch of 1: .* batch_size of at least 2"):
        fit(model, splits, batch_size=1)


class LossyAt(nn.Module):
    """A network whose logits become NaN in train mode from its ``at``-th batch on."""

    def __init__(self, at):
        super().__init__()
        self.inner, self.at, self.seen = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), at, 0
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        if self.training:
            self.seen += 1
            if self.seen >= self.at:
                x = x * math.nan
        return self.last(self.inner(x))


def test_a_nan_loss_stops_training_and_the_best_epoch_is_restored(splits):
    model, again = LossyAt(at=11), LossyAt(at=10**9)  # 4 batches an epoch: in the third
    again.load_state_dict(model.state_dict())
    history = fit(model, splits, epochs=10)
    assert history.stopped == "nan"
    assert history.best_epoch == 2
    assert "nan at epoch 3, step 3; the loss before it was" in history.fault
    fit(again, splits, epochs=2)
    assert same_state(model.state_dict(), again.state_dict())


def test_a_nan_loss_in_the_first_epoch_leaves_the_weights_it_came_with(splits):
    model = LossyAt(at=1)
    before = snapshot(model)
    history = fit(model, splits)
    assert (history.stopped, history.best_epoch, history.epochs) == ("nan", 0, ())
    assert same_state(model.state_dict(), before)


def test_a_nan_loss_is_never_an_improvement():
    stopping = EarlyStopping(patience=2, min_delta=0.0)
    assert not stopping.improved(1, math.nan)
    assert stopping.improved(2, 1.0)
    assert not stopping.improved(3, math.nan)
    assert stopping.best_epoch == 2
    assert stopping.exhausted(4)


@given(st.lists(st.floats(0, 10) | st.just(math.nan), max_size=30), st.integers(1, 5))
def test_early_stopping_keeps_the_first_of_the_best_and_counts_from_it(losses, patience):
    stopping = EarlyStopping(patience=patience, min_delta=0.0)
    for epoch, loss in enumerate(losses, 1):
        stopping.improved(epoch, loss)
        seen = [(v, i) for i, v in enumerate(losses[:epoch], 1) if not math.isnan(v)]
        best = min(seen)[1] if seen else 0
        assert stopping.best_epoch == best
        assert stopping.exhausted(epoch) == (epoch - best >= patience)


def test_an_improvement_below_min_delta_does_not_count():
    stopping = EarlyStopping(patience=3, min_delta=0.1)
    assert stopping.improved(1, 1.0)
    assert not stopping.improved(2, 0.95)
    assert not stopping.improved(3, 0.91)
    assert stopping.improved(4, 0.85)


def test_ctrl_c_ends_training_at_the_best_epoch(splits, model):
    def interrupt(progress):
        if progress.epoch == 4 and progress.record is None:
            raise KeyboardInterrupt

    again = copy.deepcopy(model)
    config = TrainConfig(batch_size=16, epochs=10)
    history = truenorm.fit(model, splits, config, observe=interrupt)
    assert history.stopped == "interrupted"
    assert len(history.epochs) == 3
    fit(again, splits, epochs=history.best_epoch)
    assert same_state(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_ctrl_c_at_an_epochs_end_leaves_history_and_weights_in_step(
    splits, model, monkeypatch, moment
):
    """The best epoch that the history names is the one whose weights are there."""
    replay, taken = copy.deepcopy(model), []

    def interrupted(trained):
        taken.append(trained)
        if len(taken) > moment:  # the first is taken before training
            raise KeyboardInterrupt
        return snapshot(trained)

    monkeypatch.setattr("truenorm.training.state.snapshot", interrupted)
    history = fit(model, splits, epochs=9)
    monkeypatch.undo()
    assert history.stopped == "interrupted"
    assert len(history.epochs) > history.best_epoch
    if history.best_epoch:
        fit(replay, splits, epochs=history.best_epoch)
    assert same_state(model.state_dict(), replay.state_dict())


def test_any_other_exception_passes_through_with_the_best_epoch_restored(splits, model):
    def fail(progress):
        if progress.epoch == 3:
            raise ZeroDivisionError

    again = copy.deepcopy(model)
    with pytest.raises(ZeroDivisionError):
        truenorm.fit(model, splits, TrainConfig(batch_size=16), observe=fail)
    fit(again, splits, epochs=2)
    assert same_state(model.state_dict(), again.state_dict())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(splits):
    states = []
    for seed in (0, 0, 1):
        model = truenorm.build(truenorm.ModelSpec(dropout=0.5), (6,), 3, seed=0)
        torch.rand(7)  # what the caller drew before must not matter
        fit(model, splits, epochs=3, seed=seed)
        states.append(model.state_dict())
    assert same_state(states[0], states[1])
    assert not same_state(states[0], states[2])


def test_what_fit_borrows_it_gives_back(splits, model):
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(model, splits, epochs=1, threads=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_fit_leaves_the_model_in_eval_mode(splits, model):
    fit(model, splits, epochs=1)
    assert not any(m.training for m in model.modules())


def test_a_norm_the_user_froze_by_eval_stays_frozen(splits, model):
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    fit(model, splits, epochs=2)
    assert torch.equal(model[1].running_mean, before)


def test_a_model_left_in_eval_mode_is_trained_all_the_same(splits, model):
    model.eval()
    fit(model, splits, epochs=1)
    assert model[1].num_batches_tracked > 0


def test_accumulated_batches_give_the_gradient_of_their_union(splits):
    """Without batch statistics, k batches accumulated equal one batch of their examples."""
    models = [
        truenorm.build(truenorm.ModelSpec(norm="none", widths=(8,)), (6,), 3, seed=0).double()
        for _ in range(2)
    ]
    sizes = ({"batch_size": 7, "accumulate": 4}, {"batch_size": 28})
    for model, size in zip(models, sizes, strict=True):
        double = nn.Sequential(Widen(), model)
        fit(double, splits, epochs=2, optimizer="sgd", lr=0.1, **size)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Scaling is done in float32, the sums in float64.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Widen(nn.Module):
    def forward(self, x):
        return x.double()


def test_example_weights_equal_repeated_examples(splits):
    """A weight of two on the loss is the example twice, where batches do not mix examples."""
    x, y = blobs(30)
    counts = np.arange(30) % 3 + 1
    repeated = np.repeat(np.arange(30), counts)
    valid = dataset(x, y)
    pairs = [dataset(x, y, weight=counts), dataset(x[repeated], y[repeated])]
    results = []
    for data in pairs:
        model = truenorm.build(truenorm.ModelSpec(norm="none", widths=(8,)), (6,), 3, seed=0)
        fixed = Splits(data, valid, scaling=truenorm.Scaling.of(valid.x))
        history = fit(model, fixed, epochs=5, batch_size=100, optimizer="sgd", lr=0.05)
        results.append((model, history))
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    first, second = (r[1].epochs[0].train_loss for r in results)
    assert first == pytest.approx(second, rel=1e-5)


def test_weighted_scores_follow_the_reference(generator):
    x, y = blobs(30)
    weight = np.random.default_rng(0).random(30)
    data = dataset(x, y, weight=weight)
    logits = torch.randn(30, 3, generator=generator)
    scores = score(logits, data)
    expected = reference.cross_entropy(logits.numpy(), y, weight)
    assert scores.loss == pytest.approx(expected, rel=1e-5)
    right = logits.argmax(1).numpy() == y
    assert scores.accuracy == pytest.approx(np.average(right, weights=weight), rel=1e-5)


def test_label_smoothing_spreads_the_label(splits, model):
    history = fit(model, splits, epochs=1, lr=1e-12, label_smoothing=0.2, batch_size=60)
    model.train()
    logits = model(splits.scaling(splits.train.x)).detach().numpy()
    expected = reference.cross_entropy(logits, splits.train.y.numpy(), smoothing=0.2)
    assert history.epochs[0].train_loss == pytest.approx(expected, rel=1e-5)


def test_bf16_training_learns(splits):
    model = truenorm.build(truenorm.ModelSpec(), (6,), 3, seed=0)
    history = fit(model, splits, epochs=20, lr=0.01, amp="bf16")
    assert history.best.valid_accuracy > 0.85
    assert model[0].weight.dtype == torch.float32


def test_any_module_can_be_trained(splits):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.lazy, self.norm, self.last = nn.LazyLinear(9), nn.BatchNorm1d(9), nn.Linear(9, 3)
            self.unused = nn.Linear(2, 2)  # never gets a gradient

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.lazy(x))))

    history = fit(Mine(), splits, epochs=20, lr=0.01, weight_decay=0.01, clip_norm=1.0)
    assert history.best.valid_accuracy > 0.85


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(5, 3), r"cannot take a batch of shape \(N, 6\)"),
        (nn.Linear(6, 2), r"\(N, 3\) logits, one per class, got shape \(2, 2\)"),
        (nn.Sequential(nn.Linear(6, 3), nn.Flatten(0)), r"logits"),
        (nn.Flatten(), "nothing to train"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(splits, module, text):
    with pytest.raises(InputError, match=text):
        fit(module, splits)


def test_a_device_that_is_not_there_is_refused(splits, model):
    with pytest.raises(InputError, match="device 'cuda:7' cannot be used here"):
        fit(model, splits, device="cuda:7")
    with pytest.raises(InputError, match="device 'toaster'"):
        fit(model, splits, device="toaster")


def test_images_are_shifted_only_in_training(generator):
    x = torch.zeros(40, 1, 6, 6, dtype=torch.uint8)
    x[:, :, 2:4, 2:4] = 255
    x[::2] = 0
    data = dataset(x, np.arange(40) % 2)
    splits = Splits(data, data)
    model = truenorm.build(truenorm.ModelSpec(), (1, 6, 6), 2, seed=0)
    seen = {True: set(), False: set()}

    def look(module, inputs):
        seen[module.training].update(tuple(i.flatten().tolist()) for i in inputs[0])

    model.register_forward_pre_hook(look)
    fit(model, splits, epochs=3, shift=2)
    assert len(seen[False]) == 2
    assert len(seen[True]) > 10


def test_a_batch_that_leaves_one_value_is_named_by_its_own_size():
    """Groups of one example, in three batches that are one step: the first has 5, the last 4."""
    x, y = blobs(41)
    splits = Splits(dataset(x[:14], y[:14]), dataset(x[14:], y[14:]))
    model = nn.Sequential(nn.Linear(6, 3), truenorm.BatchNorm1d(3, ghost=1))
    config = TrainConfig(epochs=1, batch_size=5, accumulate=3)
    with pytest.raises(InputError, match="cannot normalize a batch of 5: a channel needs more"):
        truenorm.fit(model, splits, config)
