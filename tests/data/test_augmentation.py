from __future__ import annotations

import numpy as np
import pytest
import torch

import truenorm
from samples import blobs
from truenorm import InputError, TrainConfig
from truenorm.data.augmentation import lightly, shifted
from truenorm.data.datasets import Splits, dataset
from truenorm.training.feed import InMemory


def draws_of(count, seed):
    return torch.rand(7, count, generator=torch.Generator().manual_seed(seed)).numpy().astype(float)


def at(image, row, column):
    """The value of (H, W) between pixels, by float64 bilinear interpolation; the border goes on."""
    height, width = image.shape
    row, column = np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
    r, c = int(row), int(column)
    r2, c2 = min(r + 1, height - 1), min(c + 1, width - 1)
    below, right = row - r, column - c
    top = image[r, c] * (1 - right) + image[r, c2] * right
    bottom = image[r2, c] * (1 - right) + image[r2, c2] * right
    return top * (1 - below) + bottom * below


def reference(image, draws):
    """One image (C, H, W) changed in float64, pixel by pixel, from its seven draws."""
    channels, height, width = image.shape
    side = 1 - 0.2 * draws[0]
    left, top = (1 - side) * draws[1] * width, (1 - side) * draws[2] * height
    out = np.empty_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                across = width - 1 - j if channels == 3 and draws[3] < 0.5 else j
                row = top + side * (i + 0.5) - 0.5
                out[c, i, j] = at(image[c], row, left + side * (across + 0.5) - 0.5)
    if channels == 3:
        luma = 0.299 * out[0] + 0.587 * out[1] + 0.114 * out[2]
        out = luma + (0.7 + 0.6 * draws[6]) * (out - luma)
    mean, std = out.mean(), out.std()
    return mean + (0.4 * draws[5] - 0.2) * std + (0.8 + 0.4 * draws[4]) * (out - mean)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_light_augmentation_is_what_a_reference_computes_pixel_by_pixel(channels, generator):
    x = torch.rand(5, channels, 6, 9, generator=generator)
    changed = lightly(x, torch.Generator().manual_seed(3))
    draws = draws_of(5, 3)
    expected = np.stack([reference(x[i].double().numpy(), draws[:, i]) for i in range(5)])
    np.testing.assert_allclose(changed.numpy(), expected, rtol=0, atol=2e-6)
    assert len(set(draws[3] < 0.5)) == 2  # some are mirrored, and some are not


def test_the_unit_of_the_pixels_does_not_matter(generator):
    x = torch.rand(8, 3, 7, 7, generator=generator)
    scaled, raw = (lightly(k * x, torch.Generator().manual_seed(1)) for k in (1, 255))
    torch.testing.assert_close(raw / 255, scaled)


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (1, 1, 2, 5), (3, 3, 40, 3)])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_an_image_of_one_value_stays_as_it_is(shape, value, generator):
    x = torch.full(shape, value)
    torch.testing.assert_close(lightly(x, generator), x)


def test_grey_images_are_never_mirrored():
    # Brightness rises to the right; mirrored it would fall.
    x = torch.linspace(0, 1, 16).expand(64, 1, 16, 16)
    changed = lightly(x, torch.Generator().manual_seed(0))
    assert (changed.diff(dim=3) >= -1e-6).all()
    coloured = lightly(x.expand(-1, 3, -1, -1), torch.Generator().manual_seed(0))
    falls = (coloured.diff(dim=3) <= 1e-6).flatten(1).all(1)
    assert 16 <= falls.sum() <= 48


def test_shifted_images_are_what_numpy_cuts_out(generator):
    x = torch.rand(6, 2, 5, 7, generator=generator)
    moves = torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(2)).numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    expected = [padded[i, :, a : a + 5, b : b + 7] for i, (a, b) in enumerate(moves.T)]
    assert np.array_equal(shifted(x, 2, torch.Generator().manual_seed(2)).numpy(), expected)


def images(count=48, channels=3, size=8):
    """Splits of bytes in which a class is a place and a tint."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 120, (count, channels, size, size), np.uint8)
    y = np.arange(count) % 2
    x[y == 1, 0, 2:6, 2:6] += 100
    cut = count * 2 // 3
    return Splits(dataset(x[:cut], y[:cut]), dataset(x[cut:], y[cut:]))


def batches(splits, **fields):
    feed = InMemory(splits, TrainConfig(batch_size=8, **fields), torch.device("cpu"))
    return [batch for epoch in (1, 2) for batch in feed.epoch(epoch)]


def test_a_seed_augments_alike_and_each_epoch_anew():
    splits = images()
    first, again = batches(splits, augment="light"), batches(splits, augment="light")
    plain, other = batches(splits), batches(splits, augment="light", seed=1)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.x, b.x) for a, b in zip(first, plain, strict=True))
    assert not torch.equal(first[0].x, other[0].x)
    assert all(torch.equal(a.y, b.y) for a, b in zip(first, plain, strict=True))  # the same order
    both = batches(splits, augment="light", shift=2)
    assert not any(torch.equal(a.x, b.x) for a, b in zip(first, both, strict=True))


def trained(splits, epochs, run=None, **fields):
    spec = truenorm.ModelSpec(name="convnet", widths=(4, 8))
    model = truenorm.build(spec, splits.input_shape, 2, seed=0)
    config = TrainConfig(epochs=epochs, batch_size=8, patience=9, augment="light", **fields)
    history = truenorm.fit(model, splits, config, run=run)
    return history, model.state_dict()


def test_an_augmented_run_that_was_cut_off_ends_with_the_same_bits(tmp_path, monkeypatch):
    from truenorm.training import fit as fitting
    from truenorm.training.run import Request

    splits = images()
    monkeypatch.setattr(fitting, "_CHECKPOINT_SECONDS", 0)
    whole, weights = trained(splits, 4, accumulate=2)
    config = TrainConfig(epochs=4, batch_size=8, patience=9, augment="light", accumulate=2)
    run = truenorm.Run.create(tmp_path / "run", Request(None, config))
    seen = []

    def cut_off(progress):
        seen.append(progress.record)
        if progress.record is not None and progress.epoch == 2:
            raise KeyboardInterrupt

    spec = truenorm.ModelSpec(name="convnet", widths=(4, 8))
    model = truenorm.build(spec, splits.input_shape, 2, seed=0)
    assert truenorm.fit(model, splits, config, run=run, observe=cut_off).stopped == "interrupted"
    resumed, again = trained(splits, 4, run=truenorm.Run.open(tmp_path / "run"), accumulate=2)
    assert [e.train_loss for e in resumed.epochs] == [e.train_loss for e in whole.epochs]
    assert all(torch.equal(weights[k], again[k]) for k in weights)


@pytest.mark.parametrize("fields", [{"shift": 2}, {"augment": "light"}])
def test_rows_are_not_augmented_but_refused(fields, splits, model, cli):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"{name} changes images, got {value!r} for rows of 6"):
        truenorm.fit(model, splits, TrainConfig(**fields))
    for command in ("train", "compare"):
        status, _, err = cli(command, "--data", "iris", f"--{name}", value)
        assert status == 2
        assert err.count("\n") == 1
        assert f"{name} changes images, got {value!r} for rows of 4 numbers" in err
    status, _, err = cli("train", "--data", "digits", "--augment", "heavy")
    assert status == 2
    assert "light" in err


@pytest.mark.parametrize("fields", [{"shift": 2}, {"augment": "light"}])
def test_a_loader_of_ones_own_is_not_augmented_but_refused(fields, model):
    x, y = blobs(40)
    with pytest.raises(InputError, match=f"{next(iter(fields))} moves the images of Splits"):
        truenorm.fit(model, (x, y), TrainConfig(**fields))


def textures(count, seed):
    """Rows, columns and checks of any phase, light, contrast and tint, in noise."""
    rng, side = np.random.default_rng(seed), 16
    y, (rows, columns) = np.arange(count) % 3, np.mgrid[:side, :side]
    x = np.empty((count, 3, side, side))
    for i, kind in enumerate(y):
        period, phase = rng.uniform(4, 6), rng.uniform(0, 2 * np.pi, 2)
        down, across = (
            np.sin(2 * np.pi * at / period + phase[axis]) for axis, at in enumerate((rows, columns))
        )
        wave = (down, across, 1.4 * down * across)[kind]
        light, tint = rng.uniform(80, 170, (3, 1, 1)), rng.uniform(0.5, 1, (3, 1, 1))
        noise = rng.normal(0, 25, (3, side, side))
        x[i] = light + rng.uniform(5, 60) * tint * wave + noise
    return x.clip(0, 255).astype(np.uint8), y


@pytest.mark.parametrize("seed", [0, 1])
def test_light_augmentation_helps_where_examples_are_few(seed):
    parts = (textures(30, seed), textures(60, 100 + seed), textures(600, 200))
    splits = Splits(*(dataset(*part) for part in parts))
    accuracies = []
    for augment in ("none", "light"):
        spec = truenorm.ModelSpec(name="convnet", widths=(8, 16))
        model = truenorm.build(spec, (3, 16, 16), 3, seed=seed)
        config = TrainConfig(
            epochs=40, batch_size=10, lr=0.01, schedule="onecycle", patience=40, augment=augment
        )
        truenorm.fit(model, splits, config)
        accuracies.append(truenorm.evaluate(model, splits).accuracy)
    assert accuracies[1] > accuracies[0] + 0.03


def test_what_is_not_augmented_has_the_keys_of_older_stores():
    assert "augment" not in TrainConfig().to_json()
    assert TrainConfig(augment="light").to_json()["augment"] == "light"
    assert TrainConfig(**TrainConfig(augment="light", lr=0.5).to_json()).lr == 0.5
