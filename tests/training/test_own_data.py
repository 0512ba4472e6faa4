from __future__ import annotations

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import truenorm
from samples import blobs
from states import same_state
from truenorm import InputError, TrainConfig
from truenorm.training.run import Request


@pytest.fixture
def unscaled():
    """Splits whose scaling changes nothing, and the same parts as torch's data sets."""
    x, y = blobs(90)
    parts = truenorm.dataset(x[:60], y[:60]), truenorm.dataset(x[60:], y[60:])
    splits = truenorm.Splits(*parts, scaling=truenorm.Scaling(None, torch.ones(1)))
    return splits, [TensorDataset(part.x, part.y) for part in parts]


def config(**changes):
    return TrainConfig(**{"epochs": 3, "batch_size": 16, "lr": 0.01, **changes})


def figures(history):
    return [(e.train_loss, e.valid_loss, e.valid_accuracy, e.lr) for e in history.epochs]


def close(a, b):
    for one, other in zip(figures(a), figures(b), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"schedule": "onecycle"}, {"accumulate": 2}, {"label_smoothing": 0.1}]
)
def test_a_pair_of_data_sets_is_trained_on_as_splits_are(unscaled, model, changes):
    splits, parts = unscaled
    other = copy.deepcopy(model)
    close(
        truenorm.fit(model, splits, config(**changes)),
        truenorm.fit(other, parts, config(**changes)),
    )
    assert same_state(model.state_dict(), other.state_dict())


def test_arrays_are_the_data_set_that_they_make(unscaled, model):
    splits, parts = unscaled
    other = copy.deepcopy(model)
    train, valid = (
        (part.x.double().numpy(), part.y.numpy()) for part in (splits.train, splits.valid)
    )
    close(truenorm.fit(model, parts, config()), truenorm.fit(other, (train, valid), config()))
    assert same_state(model.state_dict(), other.state_dict())


def test_a_loader_gives_its_own_batches_in_its_own_order(unscaled, model):
    _, (train, valid) = unscaled
    seen = []

    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            if self.training:
                seen.append(x.clone())
            return self.inner(x)

    loaders = DataLoader(train, 20), DataLoader(valid, 7)
    truenorm.fit(Recorded(), loaders, config(epochs=2, batch_size=5))
    expected = [x for _ in range(2) for x in train.tensors[0].split(20)]
    assert len(seen) == len(expected)
    assert all(map(torch.equal, seen, expected))


def test_one_data_set_is_cut_by_the_share_and_the_seed(unscaled, model):
    _, (train, _) = unscaled
    counts = []
    truenorm.fit(
        model, train, config(epochs=1), valid=0.25, observe=lambda p: counts.append(p.total)
    )
    assert set(counts) == {45}


class Stream(IterableDataset):
    """Examples without a number."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


def test_what_has_no_length_is_trained_on(unscaled, model):
    _, (train, valid) = unscaled
    other = copy.deepcopy(model)
    loaded = truenorm.fit(model, (DataLoader(train, 16), DataLoader(valid, 16)), config())
    streamed = truenorm.fit(other, (Stream(train), Stream(valid)), config())
    assert figures(streamed) == figures(loaded)
    with pytest.raises(InputError, match="schedule 'onecycle' needs the number of steps"):
        truenorm.fit(model, (Stream(train), Stream(valid)), config(schedule="onecycle"))


def test_a_loader_is_in_the_same_order_for_a_seed_and_shuffled_anew_each_epoch(unscaled):
    _, (train, valid) = unscaled

    def trained(seed, generator=None):
        model = truenorm.build(truenorm.ModelSpec(widths=(8,)), (6,), 3, seed=0)
        loader = DataLoader(train, 16, shuffle=True, generator=generator, drop_last=True)
        return figures(truenorm.fit(model, (loader, DataLoader(valid, 16)), config(seed=seed)))

    assert trained(0) == trained(0)
    assert trained(0) != trained(1)
    own = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert trained(0, own[0]) == trained(0, own[1])


def test_random_states_are_given_back(unscaled, model):
    _, (train, valid) = unscaled
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(train, 16, shuffle=True, generator=generator)
    before = [torch.get_rng_state(), generator.get_state(), random.getstate()]
    before_numpy = np.random.get_state()[1].copy()  # noqa: NPY002
    truenorm.fit(model, (loader, DataLoader(valid, 16)), config())
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], generator.get_state())
    assert before[2] == random.getstate()
    assert (before_numpy == np.random.get_state()[1]).all()  # noqa: NPY002


def hundredth(parameters):
    return torch.optim.RMSprop(parameters, lr=0.01)


@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=24),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 9]),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
            ],
            [4],
        ),
    ],
    ids=["none", "onecycle", "multistep", "plateau", "sequential"],
)
def test_a_run_with_its_own_optimizer_and_scheduler_resumes_to_the_bit(
    tmp_path, unscaled, scheduler, monkeypatch
):
    monkeypatch.setattr("truenorm.training.fit._CHECKPOINT_SECONDS", 0.0)
    _, (train, valid) = unscaled

    def trained(folder, stop_after=None):
        model = truenorm.build(truenorm.ModelSpec(widths=(8,), dropout=0.2), (6,), 3, seed=0)
        settings = config(epochs=6, patience=6)
        if folder.exists():
            run = truenorm.Run.open(folder)
        else:
            run = truenorm.Run.create(folder, Request(None, settings))
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(train, 16, shuffle=True, generator=generator)

        def observe(progress):
            if progress.record is not None and progress.epoch == stop_after:
                raise KeyboardInterrupt

        history = truenorm.fit(
            model, (loader, DataLoader(valid, 16)), settings,
            optimizer=hundredth, scheduler=scheduler, run=run, observe=observe,
        )  # fmt: skip
        return model, history

    straight, whole = trained(tmp_path / "straight")
    _, first = trained(tmp_path / "stopped", stop_after=3)
    assert first.stopped == "interrupted"
    resumed, again = trained(tmp_path / "stopped")
    assert figures(again) == figures(whole)
    assert same_state(straight.state_dict(), resumed.state_dict())


def test_torchs_own_optimizer_takes_the_steps_of_the_configs(unscaled, model):
    splits, _ = unscaled
    other = copy.deepcopy(model)
    close(
        truenorm.fit(model, splits, config(schedule="onecycle")),
        truenorm.fit(
            other,
            splits,
            config(schedule="onecycle"),
            optimizer=lambda p: torch.optim.Adam(p, 0.01),
        ),
    )


def test_a_scheduler_moves_with_steps_or_epochs(unscaled, model):
    splits, _ = unscaled

    def rates(every):
        history = truenorm.fit(
            copy.deepcopy(model), splits, config(),
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            scheduler_every=every,
        )  # fmt: skip
        return [e.lr for e in history.epochs]

    assert rates("epoch") == [0.01, 0.005, 0.0025]
    assert rates("step") == pytest.approx([0.01 * 0.5**k for k in (3, 7, 11)])


def test_what_is_many_labelled_is_trained_by_its_own_loss(unscaled, model):
    _, (train, valid) = unscaled
    labels = [TensorDataset(p.tensors[0], torch.eye(3)[p.tensors[1]]) for p in (train, valid)]
    history = truenorm.fit(
        model, labels, config(epochs=20, patience=20), loss=nn.BCEWithLogitsLoss()
    )
    assert history.best.valid_loss < history.epochs[0].valid_loss
    assert all(math.isnan(e.valid_accuracy) for e in history.epochs)
    x, y = labels[1].tensors
    with torch.no_grad():
        expected = nn.functional.binary_cross_entropy_with_logits(model(x), y).item()
    assert history.best.valid_loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="cross entropy needs"):
        truenorm.fit(model, labels, config())


def test_a_loss_of_ones_own_goes_with_splits_weights_and_accuracy(unscaled, model):
    splits, _ = unscaled
    other = copy.deepcopy(model)
    close(
        truenorm.fit(model, splits, config()),
        truenorm.fit(other, splits, config(), loss=nn.CrossEntropyLoss()),
    )
    weight = torch.arange(60.0)
    weighted = truenorm.Splits(
        truenorm.dataset(splits.train.x, splits.train.y, weight=weight),
        splits.valid,
        scaling=splits.scaling,
    )
    each = nn.CrossEntropyLoss(reduction="none")
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    close(
        truenorm.fit(first, weighted, config()),
        truenorm.fit(second, weighted, config(), loss=each),
    )
    with pytest.raises(InputError, match="one loss for each"):
        truenorm.fit(model, weighted, config(), loss=nn.CrossEntropyLoss())


class Wrapped(nn.Module):
    """A model whose answer comes in a packing."""

    def __init__(self, inner, pack):
        super().__init__()
        self.inner, self.pack = inner, pack

    def forward(self, x):
        return self.pack(self.inner(x))


@pytest.mark.parametrize(
    "pack",
    [
        lambda out: {"logits": out},
        lambda out: {"prediction": out},
        lambda out: (out, "more"),
        lambda out: SimpleNamespace(logits=out, loss=None),
    ],
    ids=["dict", "only tensor", "tuple", "object"],
)
def test_logits_are_found_in_what_a_model_returns(unscaled, model, pack):
    splits, parts = unscaled
    plain = copy.deepcopy(model)
    expected = truenorm.fit(plain, splits, config())
    for data in (splits, parts):
        wrapped = Wrapped(copy.deepcopy(model), pack)
        close(truenorm.fit(wrapped, data, config()), expected)
        assert truenorm.logits_of(
            wrapped, splits.valid, splits.scaling, torch.device("cpu")
        ).shape == (30, 3)


def test_what_holds_no_logits_is_refused_with_what_was_returned(unscaled, model):
    splits, _ = unscaled
    wrapped = Wrapped(model, lambda out: {"scores": out, "features": out})
    with pytest.raises(InputError, match="returned dict with 'scores', 'features'"):
        truenorm.fit(wrapped, splits, config())
    with pytest.raises(InputError, match="returned str"):
        truenorm.fit(Wrapped(model, lambda out: "no"), splits, config())


class Named(Dataset):
    """Examples as dicts, as transformers' models take them."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i], "file": "none.png"}


def tiny_resnet(classes=3):
    transformers = pytest.importorskip("transformers")
    settings = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic",
        num_labels=classes,
    )  # fmt: skip
    return transformers.ResNetForImageClassification(settings)


def test_a_model_of_transformers_is_trained_on_dicts_by_its_own_loss():
    torch.manual_seed(0)
    model = tiny_resnet()
    y = torch.arange(24) % 3
    x = torch.randn(24, 1, 16, 16) + 3 * y[:, None, None, None]
    data = Named(x[:16], y[:16]), Named(x[16:], y[16:])
    history = truenorm.fit(model, data, config(epochs=2, batch_size=8))
    with torch.no_grad():
        expected = model(pixel_values=x[16:], labels=y[16:])
    assert history.best.valid_loss == pytest.approx(expected.loss.item(), rel=1e-4)
    right = (expected.logits.argmax(1) == y[16:]).double().mean().item()
    assert history.best.valid_accuracy == pytest.approx(right)
    with pytest.raises(InputError, match="label_smoothing is for cross entropy"):
        truenorm.fit(model, data, config(label_smoothing=0.1))


def test_frozen_layers_stay_frozen_with_loaders(unscaled, model):
    _, parts = unscaled
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    weight = model[1].weight.clone()
    truenorm.fit(model, parts, config(), optimizer=hundredth)
    assert torch.equal(model[1].running_mean, before)
    assert torch.equal(model[1].weight, weight)


def test_what_cannot_be_trained_on_is_refused_with_the_next_step(unscaled, model):
    splits, (train, valid) = unscaled
    loader = DataLoader(train, 16)
    for data, message in [
        (loader, "a DataLoader cannot be cut; give a pair"),
        (splits.train, "give Splits, which truenorm.split"),
        ("digits", "'digits', which truenorm.load reads"),
        ((iter(loader), valid), "gone through only once"),
        (None, "data cannot be a NoneType"),
        (3, "data cannot be a int"),
        ([train, valid, valid], "data cannot be a list"),
        ((torch.zeros(5, 6), torch.zeros(4)), "as long as each other"),
        (([[1.0], [2.0]], ["a", "b"]), "y: must be an array of numbers"),
        ((loader, []), "data cannot be a list"),
        ((loader, DataLoader(TensorDataset(torch.zeros(0, 6)), 2)), "validation loader gives no"),
        ((DataLoader(train, 16), DataLoader(TensorDataset(torch.zeros(4, 6)))), "missing"),
        ((train, TensorDataset(torch.zeros(4, 5), torch.zeros(4).long())), "cannot take a batch"),
    ]:
        with pytest.raises(InputError, match=message):
            truenorm.fit(model, data, config())
    with pytest.raises(InputError, match=r"valid must lie in \(0, 1\)"):
        truenorm.fit(model, train, config(), valid=1.0)
    with pytest.raises(InputError, match="shift moves the images of Splits"):
        truenorm.fit(model, (train, valid), config(shift=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": lambda p: None}, "got NoneType"),
        ({"optimizer": torch.optim.LBFGS}, "needs no closure"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "not the model's"),
        ({"scheduler": lambda o: 3}, "got int"),
        ({"scheduler": lambda o: None, "scheduler_every": "day"}, "scheduler_every 'day'"),
        ({"loss": lambda out, y: 3.0}, "must return a tensor"),
    ],
)
def test_optimizers_schedulers_and_losses_that_will_not_do_are_refused(
    unscaled, model, given, message
):
    with pytest.raises(InputError, match=message):
        truenorm.fit(model, unscaled[0], config(), **given)


def test_settings_of_the_configs_optimizer_do_not_go_with_another(unscaled, model):
    with pytest.raises(InputError, match="weight_decay is for the config's own optimizer"):
        truenorm.fit(model, unscaled[0], config(weight_decay=0.1), optimizer=hundredth)


def test_a_loader_that_can_be_gone_through_once_is_told_in_its_second_epoch(unscaled, model):
    _, (train, valid) = unscaled

    class Once:
        batches = iter(DataLoader(train, 16))

        def __iter__(self):
            return self.batches

    with pytest.raises(InputError, match="gave no batch in epoch 2"):
        truenorm.fit(model, (Once(), valid), config())


def test_verbose_prints_a_line_an_epoch(unscaled, model, capsys):
    history = truenorm.fit(model, unscaled[0], config(), verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert f"val loss {history.epochs[0].valid_loss:.4f}  val accuracy" in lines[0]


def test_class_numbers_of_any_integer_type_are_targets_and_others_are_refused(unscaled, model):
    splits, (train, valid) = unscaled
    other = copy.deepcopy(model)
    narrow = [TensorDataset(p.tensors[0], p.tensors[1].to(torch.uint8)) for p in (train, valid)]
    close(truenorm.fit(model, splits, config()), truenorm.fit(other, narrow, config()))
    x, y = train.tensors
    with pytest.raises(InputError, match=r"class numbers from 0 to 2, .* got 0 to 3"):
        truenorm.fit(model, (TensorDataset(x, y.clamp(max=1) * 3), valid), config())
    with pytest.raises(InputError, match=r"class numbers from 0 to 2, .* got -1 to"):
        truenorm.fit(model, (train, TensorDataset(x, y - 1)), config())


def test_maps_of_classes_are_trained_on(generator):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    x = torch.randn(12, 1, 6, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    history = truenorm.fit(model, ((x[:8], y[:8]), (x[8:], y[8:])), config(epochs=30, patience=30))
    with torch.no_grad():
        logits = model(x[8:])
    assert history.best.valid_loss == pytest.approx(
        nn.functional.cross_entropy(logits, y[8:]).item(), rel=1e-5
    )
    assert history.best.valid_accuracy == pytest.approx(
        (logits.argmax(1) == y[8:]).double().mean().item()
    )


def test_clipping_amp_and_accumulation_hold_with_ones_own_optimizer(unscaled, model):
    _, parts = unscaled
    before = {k: v.clone() for k, v in model.named_parameters()}
    settings = config(epochs=1, accumulate=2, clip_norm=1e-3, amp="bf16")
    truenorm.fit(model, parts, settings, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    moved = torch.cat([(v - before[k]).flatten() for k, v in model.named_parameters()]).norm()
    assert 0 < moved <= 2 * 1e-3 * 1.01  # two steps of 60 examples in batches of 16
