from __future__ import annotations

import copy
import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import reference
import truenorm
from samples import blobs
from states import same_state
from truenorm import InputError, ModelSpec, Splits, TrainConfig, build, dataset
from truenorm.data.batches import Batch, chunks
from truenorm.data.datasets import Uncut
from truenorm.layers.norms import NORMS
from truenorm.studies.bench import Bench
from truenorm.studies.probes import PROBES
from truenorm.studies.probes.layers import Spread, inputs_of, layers_of, state_of, without_dropout
from truenorm.studies.probes.modes import by_batches, fitted, of_one_class
from truenorm.studies.probes.noise import Noise, with_places
from truenorm.studies.probes.online import by_running_statistics, stream
from truenorm.studies.probes.setup import built
from truenorm.studies.probes.shift import LENGTHS, landscape, shifts, watched
from truenorm.studies.trial import Trial
from truenorm.training.devices import threads
from truenorm.training.steps import Stepper

SMALL = ModelSpec(widths=(8,))
TWO = ModelSpec(widths=(8, 7), dropout=0.3)
CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.01, seed=5, device="cpu")
SHAPES = {"mlp": (6,), "convnet": (1, 8, 8), "resnet": (1, 8, 8), "transformer": (1, 8, 8)}
WIDTHS = {"mlp": (8, 7), "convnet": (4, 6), "resnet": (4, 6), "transformer": (8, 8)}


@pytest.fixture(autouse=True)
def one_thread():
    """As trials run: sums of floats depend on the number of threads that share them."""
    with threads(1):
        yield


@pytest.fixture
def parts():
    """90 training, 30 validation and 60 test rows of 6 features in 3 classes."""
    x, y = blobs(180, spread=3.0)
    return Splits(*(dataset(x[i:j], y[i:j]) for i, j in ((0, 90), (90, 120), (120, 180))))


def images(count=24, side=6):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3 * count, 1, side, side)).astype(np.float32)
    y = np.arange(3 * count) % 3
    x[:, 0, 0, 0] += 3 * y
    return Splits(
        *(dataset(x[i * count : (i + 1) * count], y[i * count : (i + 1) * count]) for i in range(3))
    )


def batch_of(features=4, classes=3, count=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, dtype=torch.float64, generator=generator)
    return Batch(x, torch.arange(count) % classes, None)


def error(logits, labels):
    """The gradient of the mean cross entropy for the logits."""
    d = reference.softmax(logits)
    d[np.arange(len(labels)), labels] -= 1
    return d / len(labels)


# Training a step at a time --------------------------------------------------------------------


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_steps_are_those_of_fit_to_the_bit(parts, optimizer):
    config = dataclasses.replace(
        CONFIG, epochs=1, optimizer=optimizer, schedule="cosine", label_smoothing=0.1
    )
    theirs, ours = built(TWO, config, parts), built(TWO, config, parts)
    assert truenorm.fit(theirs, parts, config).best_epoch == 1
    stepper = Stepper(ours, parts, config)
    for number, batches in stepper.all_steps():
        stepper.update(number, batches)
    assert number == stepper.steps - 1
    assert same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.usefixtures("same_kernels")
def test_augmentation_is_that_of_fit_to_the_bit():
    splits, spec = images(), ModelSpec(name="convnet", widths=(4, 4))
    config = dataclasses.replace(CONFIG, epochs=1, shift=1)
    theirs, ours = built(spec, config, splits), built(spec, config, splits)
    assert truenorm.fit(theirs, splits, config).best_epoch == 1
    stepper = Stepper(ours, splits, config)
    for step in stepper.all_steps():
        stepper.update(*step)
    assert same_state(ours.state_dict(), theirs.state_dict())


def test_measuring_changes_nothing_in_the_training(parts):
    plain = Stepper(built(TWO, CONFIG, parts), parts, CONFIG)
    for step in plain.all_steps():
        plain.update(*step)
    seen = Stepper(built(TWO, CONFIG, parts), parts, CONFIG)
    watched(seen, [])
    trained = {n: p for n, p in seen.model.state_dict().items() if "running" not in n}
    assert all(torch.equal(p, plain.model.state_dict()[n]) for n, p in trained.items())


def test_at_the_end_the_running_statistics_are_exactly_those_of_the_training_part(parts):
    config = dataclasses.replace(CONFIG, epochs=1)
    stepper = Stepper(built(SMALL, config, parts), parts, config)
    found = watched(stepper)
    model = stepper.model
    given = model[0](parts.scaling(parts.train.x)).detach().double()
    np.testing.assert_allclose(model[1].running_mean, given.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var, given.var(0), rtol=1e-4)
    right = (model(parts.scaling(parts.test.x)).argmax(1) == parts.test.y).double().mean()
    assert found["test_accuracy"] == pytest.approx(right.item(), abs=1e-12)


@pytest.mark.parametrize("setting", [{"accumulate": 2}, {"amp": "bf16"}])
def test_what_makes_a_step_of_more_than_one_plain_batch_is_refused(parts, setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(InputError, match=f"got {name}={value!r}"):
        PROBES["shift"](SMALL, dataclasses.replace(CONFIG, **setting), parts)


# Covariate shift ------------------------------------------------------------------------------


def test_the_shift_of_two_linear_layers_is_as_computed_by_hand():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    batch = batch_of()
    before = state_of(model)
    after = {n: p + 0.1 * torch.sin(torch.arange(p.numel()).view_as(p)) for n, p in before.items()}
    x, y = batch.x.numpy(), batch.y.numpy()
    w1, w2 = (before[f"{i}.weight"].numpy() for i in range(2))
    moved = after["0.weight"].numpy()
    g = error(x @ w1.T @ w2.T, y).T @ (x @ w1.T)
    then = error(x @ moved.T @ w2.T, y).T @ (x @ moved.T)

    first, second = shifts(model, layers_of(model, batch.x), before, after, batch)

    distance, size = np.linalg.norm(g - then), np.linalg.norm(g)
    assert distance > 0.01 * size
    assert second.absolute == pytest.approx(distance, rel=1e-12)
    assert second.relative == pytest.approx(distance / size, rel=1e-12)
    assert second.cosine == pytest.approx((g * then).sum() / size / np.linalg.norm(then), rel=1e-12)
    assert (first.absolute, first.relative) == (0, 0)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_nothing_before_a_layer_moves_then_its_shift_is_exactly_zero(norm):
    model = build(ModelSpec(widths=(8, 7), norm=norm), (4,), 3, seed=0)
    batch = batch_of()._replace(x=batch_of().x.float())
    before = state_of(model)
    layers = layers_of(model, batch.x)
    still = shifts(model, layers, before, dict(before), batch)
    own = {n: p + 1 if n in layers[-1].weights else p for n, p in before.items()}
    for moved in (still, shifts(model, layers, before, own, batch)):
        assert [s.absolute for s in moved] == [0, 0, 0]
        assert [s.cosine for s in moved] == pytest.approx([1, 1, 1], abs=1e-12)


def test_with_all_but_the_last_layer_frozen_a_training_has_no_shift(parts):
    model = built(dataclasses.replace(TWO, dropout=0.0, norm="none"), CONFIG, parts)
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(False)
    stepper = Stepper(model, parts, CONFIG)
    steps = []
    # Parameters without gradient have no place in the landscape, but still in the shift.
    figures = watched(stepper, steps)
    assert figures["input_shift"] == 0
    assert {step["shift"] for step in steps} == {0.0}
    assert [step["shift_cos"] for step in steps] == pytest.approx([1] * len(steps), abs=1e-12)


def test_a_norms_parameters_belong_to_what_comes_before_the_next_layer():
    model = build(SMALL, (4,), 3, seed=0)
    batch = batch_of()._replace(x=batch_of().x.float())
    before = state_of(model)
    after = {n: p + 0.5 if n == "1.bias" else p for n, p in before.items()}
    model.train()
    first, second = shifts(model, layers_of(model, batch.x), before, after, batch)
    assert first.absolute == 0
    assert second.absolute > 0


def test_layers_stand_in_the_order_of_their_calls():
    model = build(ModelSpec(name="transformer", widths=(8,)), (1, 8, 8), 3, seed=0)
    layers = {layer.name: layer for layer in layers_of(model, torch.zeros(2, 1, 8, 8))}
    block = "blocks.0."
    attention = block + "attention"
    assert list(layers) == ["embed", attention, block + "mlp.0", block + "mlp.3", "head.1"]
    assert layers[attention].weights == (
        attention + ".in_proj_weight", attention + ".out_proj.weight"
    )  # fmt: skip
    assert block + "norms.0.norm.weight" in layers[attention].before
    assert block + "norms.1.norm.weight" not in layers[attention].before
    assert block + "norms.1.norm.weight" in layers[block + "mlp.0"].before
    assert attention + ".out_proj.bias" in layers[block + "mlp.0"].before
    assert layers["head.1"].before | {"head.1.weight", "head.1.bias"} == set(state_of(model))


def test_the_landscape_of_a_linear_model_is_as_computed_by_hand():
    model = nn.Linear(4, 3, bias=False).double()
    batch = batch_of()
    x, y, w = batch.x.numpy(), batch.y.numpy(), model.weight.detach().numpy()
    g = error(x @ w.T, y).T @ x
    moved = [w - length * g for length in LENGTHS]
    losses = [reference.cross_entropy(x @ m.T, y) for m in moved]
    changes = [np.linalg.norm(error(x @ m.T, y).T @ x - g) for m in moved]
    ways = [length * np.linalg.norm(g) for length in LENGTHS]
    found = landscape(model, state_of(model), batch)
    assert found.loss_range == pytest.approx(max(losses) - min(losses), rel=1e-10)
    assert found.grad_range == pytest.approx(max(changes) - min(changes), rel=1e-10)
    assert found.smoothness == pytest.approx(np.max(np.divide(changes, ways)), rel=1e-10)


def test_a_layers_inputs_are_measured_as_it_gets_them_in_training():
    model = build(dataclasses.replace(TWO, widths=(8,)), (4,), 3, seed=0).double()
    x = batch_of().x
    before = copy.deepcopy(model.state_dict())
    (spread,) = inputs_of(model, layers_of(model, x), x)
    h = x @ model[0].weight.T
    normed = (h - h.mean(0)) / torch.sqrt(h.var(0, correction=0) + 1e-5)
    given = normed.clamp(min=0).detach().numpy()
    np.testing.assert_allclose(spread.mean, given.mean(0), rtol=1e-10)
    np.testing.assert_allclose(spread.var, given.var(0), rtol=1e-10)
    assert same_state(model.state_dict(), before)


def test_a_move_of_the_inputs_is_counted_in_the_layers_standard_deviations():
    was = Spread(torch.tensor([0.0, 1.0]).double(), torch.tensor([3.0, 5.0]).double())
    now = Spread(torch.tensor([1.0, -2.0]).double(), torch.tensor([9.0, 9.0]).double())
    assert was.moved(now) == 2 / 2  # mean |difference| over sqrt(mean variance)
    assert math.isnan(Spread(was.mean, torch.zeros(2)).moved(now))


def test_dropout_is_off_while_a_step_is_measured():
    model = build(TWO, (4,), 3, seed=0)
    with without_dropout(model):
        x = batch_of().x.float()
        assert torch.equal(model(x), model(x))
        assert model[1].training
    assert all(module.training for module in model.modules())


# Noise ----------------------------------------------------------------------------------------


def test_noise_has_the_stated_moments():
    draws = [Noise(0).draw(2000, 3), *(Noise(s).draw(2, 500) for s in range(40))]
    scale, shift = draws[0]
    mu = shift.mean(0)
    assert (shift - mu).abs().max() <= 0.1 + 0.01
    assert shift.std(0) == pytest.approx(np.full(3, 0.2 / math.sqrt(12)), rel=0.05)
    assert scale.std(0) == pytest.approx(np.full(3, 0.1), rel=0.1)
    # Over units: their own uniform distribution and the examples' around it add up.
    shifts = torch.cat([s[0] for _, s in draws[1:]])
    scales = torch.cat([s[0] for s, _ in draws[1:]])
    assert shifts.mean() == pytest.approx(0, abs=0.01)
    assert shifts.var() == pytest.approx(1 / 12 + 0.2**2 / 12, rel=0.03)
    assert scales.mean() == pytest.approx(1.125, abs=0.005)
    assert scales.var() == pytest.approx(0.25**2 / 12 + 0.1**2, rel=0.04)


def test_noise_is_drawn_anew_each_step_and_is_off_in_evaluation():
    place = nn.Identity()
    place.register_forward_hook(Noise(0))
    x = torch.ones(4, 3, 5, 5)
    a, b = place(x), place(x)
    assert not torch.equal(a, b)
    assert (a == a[:, :, :1, :1]).all()  # one draw for all positions
    assert len(a[:, :, 0, 0].unique()) == 12
    assert torch.equal(place.eval()(x), x)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_without_norms_the_noise_stands_where_norms_would(name, position):
    shape = SHAPES[name]
    x = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0))
    data = dataset(x.numpy(), np.arange(12) % 3)
    splits = Splits(data, data)
    spec = ModelSpec(name=name, norm="none", norm_position=position, widths=WIDTHS[name])
    model, places = with_places(spec, CONFIG, splits)
    plain = built(spec, CONFIG, splits)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())

    def shapes_at(network, modules):
        seen = []
        for module in modules:
            module.register_forward_hook(lambda m, a, out: seen.append(sorted(out.shape)))
        network(x)
        return seen

    other = built(dataclasses.replace(spec, norm="batch"), CONFIG, splits)
    norms = [m for m in other.modules() if isinstance(m, NORMS)]
    assert shapes_at(model, places) == shapes_at(other, norms)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_noise_moves_the_inputs_of_layers_far_more_than_training_does(parts, norm):
    spec = ModelSpec(widths=(32,), norm=norm)
    quiet, loud = (PROBES[name](spec, CONFIG, parts) for name in ("shift", "noisy"))
    assert loud["input_shift"] > 3 * quiet["input_shift"] > 0


# Parts and modes ------------------------------------------------------------------------------


def wide_logits(model, splits, part, training=False):
    linear, norm, _, last = model
    held = {
        "w1": linear.weight, "w2": last.weight, "b2": last.bias,
        "gamma": norm.weight, "beta": norm.bias,
        "mean": norm.running_mean, "var": norm.running_var,
    }  # fmt: skip
    network = reference.Mlp({k: v.detach().double().numpy().copy() for k, v in held.items()})
    x = (part.x.double() - splits.scaling.shift.double()) * splits.scaling.scale.double()
    return lambda index: network.forward(x.numpy()[index], training)


def test_train_part_is_what_a_float64_evaluation_of_the_fitted_model_gives(parts):
    found = PROBES["train_part"](SMALL, CONFIG, parts)
    model = fitted(SMALL, CONFIG, parts)
    for name, part in (("train", parts.train), ("test", parts.test)):
        logits = wide_logits(model, parts, part)(slice(None))
        right = (logits.argmax(1) == part.y.numpy()).mean()
        assert found[f"{name}_accuracy"] == pytest.approx(right, abs=1e-12)
        loss = reference.cross_entropy(logits, part.y.numpy())
        assert found[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["gap_accuracy"] == found["train_accuracy"] - found["test_accuracy"]
    assert found["gap_loss"] == found["test_loss"] - found["train_loss"]


def test_eval_figures_are_those_of_a_trial(parts):
    bench = Bench(Uncut(parts.train, parts.test, parts.valid, parts.scaling))
    row = bench.perform(Trial("", SMALL, CONFIG))
    found = PROBES["modes"](SMALL, CONFIG, parts)
    assert (found["eval_accuracy"], found["eval_loss"]) == (row.test_accuracy, row.test_loss)
    part = PROBES["train_part"](SMALL, CONFIG, parts)
    assert (part["test_accuracy"], part["test_loss"]) == (row.test_accuracy, row.test_loss)


def test_batch_figures_are_by_the_statistics_of_test_batches_shuffled_by_the_seed(parts):
    found = PROBES["modes"](SMALL, CONFIG, parts)
    model = fitted(SMALL, CONFIG, parts)
    forward = wide_logits(model, parts, parts.test, training=True)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(CONFIG.seed)).numpy()
    y = parts.test.y.numpy()[order]
    for size in (4, 16):
        logits = np.concatenate([forward(order[i : i + size]) for i in range(0, 60, size)])
        accuracy = (logits.argmax(1) == y).mean()
        assert found[f"batch_{size}_accuracy"] == pytest.approx(accuracy, abs=1e-12)
        loss = reference.cross_entropy(logits, y)
        assert found[f"batch_{size}_loss"] == pytest.approx(loss, rel=1e-4)
    # 60 examples do not fill a batch of 64, and one vector has no batch statistics.
    for size in (1, 64, 256):
        assert math.isnan(found[f"batch_{size}_accuracy"])
    assert not math.isnan(found["sorted_accuracy"])


def test_a_sorted_batch_holds_one_class(parts):
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    runs = of_one_class(parts.test, order, 8)
    assert sorted(torch.cat(runs).tolist()) == list(range(60))
    assert all(len(parts.test.y[run].unique()) == 1 for run in runs)
    assert {len(run) for run in runs} == {8, 4}


def test_batches_of_one_class_mislead_batch_norm(parts):
    x, y = blobs(360, spread=0.5)
    splits = Splits(*(dataset(x[i:j], y[i:j]) for i, j in ((0, 120), (120, 160), (160, 360))))
    found = PROBES["modes"](SMALL, dataclasses.replace(CONFIG, epochs=20), splits)
    assert found["eval_accuracy"] > 0.95
    assert found["batch_64_accuracy"] > 0.95
    assert found["sorted_accuracy"] < 0.8


def test_without_batch_statistics_every_mode_gives_the_same(parts):
    found = PROBES["modes"](dataclasses.replace(SMALL, norm="layer"), CONFIG, parts)
    for name in ("batch_1", "batch_4", "batch_16", "sorted"):
        assert found[f"{name}_accuracy"] == found["eval_accuracy"]
        assert found[f"{name}_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


def test_a_single_image_has_batch_statistics_by_its_positions():
    splits = images()
    found = PROBES["modes"](ModelSpec(name="convnet", widths=(4, 4)), CONFIG, splits)
    assert not math.isnan(found["batch_1_loss"])


def test_evaluation_by_batches_leaves_the_model_alone(parts):
    model = fitted(SMALL, CONFIG, parts)
    before = copy.deepcopy(model.state_dict())
    by_batches(model, parts, parts.test, chunks(torch.arange(60), 16))
    assert same_state(model.state_dict(), before)
    assert not any(module.training for module in model.modules())


# Online ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_label_changes_no_prediction_before_the_one_after_it(parts, norm):
    one = dataclasses.replace(CONFIG, batch_size=1, epochs=1)
    spec = dataclasses.replace(SMALL, norm=norm)
    stepper = Stepper(built(spec, one, parts), parts, one)
    plain = stream(stepper)
    for place, same in ((89, 90), (40, 41)):  # the last example of all, and one in the middle
        y = parts.train.y.clone()
        number = stepper.order(1)[0][place]
        y[number] = (y[number] + 1) % 3
        changed = dataclasses.replace(parts, train=dataclasses.replace(parts.train, y=y))
        other = stream(Stepper(built(spec, one, changed), changed, one))
        assert torch.equal(other[:same], plain[:same])
        assert same == 90 or not torch.equal(other[same], plain[same])


def test_online_figures_are_those_of_predictions_made_one_by_one(parts):
    spec = dataclasses.replace(SMALL, norm="none")
    found = PROBES["online"](spec, CONFIG, parts)
    model = built(spec, CONFIG, parts)
    optimizer = torch.optim.Adam(model.parameters(), lr=CONFIG.lr)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(CONFIG.seed * 1_000_003 + 1))
    losses, right = [], []
    for i in order.tolist():
        logits = model(parts.scaling(parts.train.x[i : i + 1]))
        loss = nn.functional.cross_entropy(logits, parts.train.y[i : i + 1])
        losses.append(loss.item())
        right.append(int(logits.argmax()) == int(parts.train.y[i]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found["online_accuracy"] == pytest.approx(np.mean(right[45:]), abs=1e-12)
    assert found["online_loss"] == pytest.approx(np.mean(losses[45:]), rel=1e-4)
    assert (found["diverged"], found["undefined"]) == (0, 0)


def test_one_vector_is_undefined_for_batch_norm_but_not_by_running_statistics(parts):
    found = PROBES["online"](SMALL, CONFIG, parts)
    assert (found["undefined"], found["diverged"]) == (1, 0)
    assert math.isnan(found["online_accuracy"])
    assert math.isnan(found["test_accuracy"])
    running = PROBES["online_running"](SMALL, CONFIG, parts)
    assert running["undefined"] == 0
    assert 0 < running["online_loss"] < 3


def test_one_image_is_defined_for_batch_norm():
    spec = ModelSpec(name="convnet", widths=(4, 4))
    found = PROBES["online"](spec, CONFIG, images())
    assert found["undefined"] == 0
    assert math.isfinite(found["online_loss"])


def test_online_running_normalizes_and_tracks_as_the_float64_reference_does():
    splits = images()
    model = built(ModelSpec(name="convnet", widths=(4, 4)), CONFIG, splits)
    by_running_statistics(model, splits)
    norms = [m for m in model.modules() if isinstance(m, truenorm.BatchNorm)]
    assert [m.min_count for m in norms] == [32 * 36, 32 * 9]
    layer = norms[0].train()
    ours = reference.BatchNorm(4, min_count=32 * 36)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = 2 + 3 * torch.randn(1, 4, 6, 6, generator=generator)
        out = layer(x).detach()
        np.testing.assert_allclose(out, ours.forward(x.numpy()), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_mean, ours.mean, rtol=1e-5)


# Cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_cost_is_positive_and_folding_exact(parts, norm):
    config = dataclasses.replace(CONFIG, threads=1)
    found = PROBES["cost"](dataclasses.replace(SMALL, norm=norm), config, parts)
    assert 0 <= found.pop("fold_error") < 1e-4
    assert 0 <= found.pop("away") < 1
    assert all(math.isfinite(v) and v > 0 for v in found.values())
    names = ("with_norm_ms", "none_ms", "folded_ms", "norm_over_none", "folded_over_none")
    assert {f"{name}_{size}" for name in names for size in (1, 64)} <= found.keys()


def test_times_are_processor_time_which_a_pause_does_not_lengthen(parts, monkeypatch):
    clocks = iter(range(0, 10**9))
    monkeypatch.setattr(time, "thread_time", lambda: next(clocks) * 1e-3)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clocks) * 1e-1)  # others' work
    found = PROBES["cost"](SMALL, dataclasses.replace(CONFIG, threads=1), parts)
    assert found["away"] > 0.9
    assert found["folded_ms_1"] < 2  # a tick of the processor's clock over several calls


def test_of_several_threads_times_are_real_and_others_work_is_not_known(parts):
    found = PROBES["cost"](SMALL, dataclasses.replace(CONFIG, threads=2), parts)
    assert math.isnan(found["away"])
    assert found["with_norm_ms_1"] > 0


# All of them ----------------------------------------------------------------------------------

TIMELESS = [name for name in PROBES if name != "cost"]


@pytest.mark.parametrize("name", TIMELESS)
def test_same_seed_same_figures_and_torchs_generator_is_given_back(parts, name):
    spec = TWO if name != "online" else dataclasses.replace(TWO, norm="none")
    torch.manual_seed(1)
    first = PROBES[name](spec, CONFIG, parts)
    drawn = torch.rand(1)
    second = PROBES[name](spec, CONFIG, parts)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert all(type(value) is float for value in first.values())
    assert np.array_equal(list(first.values()), list(second.values()), equal_nan=True)
    other = PROBES[name](spec, dataclasses.replace(CONFIG, seed=6), parts)
    assert other.keys() == first.keys()
    assert not np.array_equal(list(first.values()), list(other.values()), equal_nan=True)


@pytest.mark.parametrize("name", ["shift", "noisy", "online"])
def test_a_training_that_breaks_says_so_and_has_no_other_figures(parts, name):
    config = dataclasses.replace(CONFIG, lr=1e30, optimizer="sgd")
    found = PROBES[name](dataclasses.replace(SMALL, norm="none"), config, parts)
    assert found.pop("diverged") == 1
    assert found.pop("undefined", 0.0) == 0
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("name", TIMELESS)
def test_without_a_test_part_its_figures_are_not_numbers(parts, name):
    found = PROBES[name](
        dataclasses.replace(SMALL, norm="none"), CONFIG, dataclasses.replace(parts, test=None)
    )
    tested = "eval_accuracy" if name == "modes" else "test_accuracy"
    assert math.isnan(found[tested])
