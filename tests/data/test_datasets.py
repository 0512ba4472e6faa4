from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from samples import blobs
from truenorm import InputError
from truenorm.data.augmentation import shifted
from truenorm.data.batches import chunks, gather, in_batches, in_order
from truenorm.data.datasets import Dataset, Scaling, Splits, dataset, split

CPU = torch.device("cpu")


def test_bytes_stay_bytes_until_a_batch_is_gathered():
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    data = dataset(images, [0, 1])
    assert data.x.dtype == torch.uint8
    batch = gather(data, torch.tensor([1]), Scaling.of(data.x), CPU)
    assert batch.x.dtype == torch.float32
    torch.testing.assert_close(batch.x[0, 0], torch.from_numpy(images[1]).float() / 255)


def test_images_are_scaled_to_the_unit_interval():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert Scaling.of(x)(x).flatten().tolist() == [0.0, 1.0]


def test_features_are_standardized_by_the_training_split_alone():
    x, y = blobs(40)
    far = x[30:] + 1000  # would move the mean far off if it were looked at
    splits = Splits(dataset(x[:30], y[:30]), dataset(far, y[30:]))
    scaled = splits.scaling(splits.train.x)
    expected = reference.standardize(x[:30]).astype(np.float32)
    torch.testing.assert_close(scaled, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert splits.scaling(splits.valid.x).mean() > 100


def test_a_large_mean_does_not_spoil_standardization():
    x = (1e4 + 0.1 * np.random.default_rng(0).normal(size=(500, 2))).astype(np.float32)
    scaled = Scaling.of(torch.from_numpy(x))(torch.from_numpy(x))
    assert scaled.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e6, 0.1])
def test_a_constant_feature_becomes_zero(value):
    x = torch.full((100, 2), value)
    x[:, 1] = torch.arange(100)
    assert Scaling.of(x)(x)[:, 0].abs().max() < 1e-3


def test_float_images_are_standardized_a_channel_at_a_time(generator):
    x = torch.randn(50, 2, 3, 3, generator=generator) * torch.tensor([1.0, 9.0]).view(2, 1, 1)
    scaled = Scaling.of(x)(x)
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(2))


def test_scaling_survives_json_to_the_bit(generator):
    import json

    scaling = Scaling.of(torch.randn(20, 5, generator=generator))
    again = Scaling.from_json(json.loads(json.dumps(scaling.to_json())))
    assert torch.equal(again.shift, scaling.shift)
    assert torch.equal(again.scale, scaling.scale)


@given(st.integers(1, 200), st.integers(1, 40))
def test_chunks_hold_every_index_once_and_never_end_in_one(count, size):
    runs = chunks(torch.arange(count), size)
    assert torch.cat(runs).tolist() == list(range(count))
    if count > 1 and size > 1:
        assert all(1 < len(run) <= size + 1 for run in runs)


@given(st.integers(10, 300), st.integers(2, 5), st.integers(0, 5))
def test_a_stratified_split_keeps_the_shares_of_the_classes(count, classes, seed):
    labels = torch.arange(count) % classes
    data = Dataset(torch.zeros(count, 1), labels, tuple(range(classes)))
    parts = split(data, test=0.2, valid=0.25, seed=seed)
    sizes = [len(p) for p in (parts.train, parts.valid, parts.test)]
    assert sum(sizes) == count
    for part, size in zip((parts.train, parts.valid, parts.test), sizes, strict=True):
        counts = torch.bincount(part.y, minlength=classes).double() / size
        whole = torch.bincount(labels, minlength=classes).double() / count
        assert ((counts - whole).abs() * size).max() <= 2


def test_a_split_is_a_function_of_the_seed():
    data = dataset(np.arange(40.0)[:, None], np.arange(40) % 2)
    first, again, other = (split(data, seed=s).train.x.tolist() for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_source_with_a_test_set_is_cut_by_one_permutation():
    data = dataset(np.arange(100.0)[:, None], np.arange(100) % 2)
    parts = split(data, test=data, valid=0.2, seed=5)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    assert parts.train.x.flatten().tolist() == order[:80].tolist()
    assert parts.valid.x.flatten().tolist() == order[80:].tolist()
    assert parts.test is data


def test_batches_in_order_are_the_data_in_order():
    data = dataset(np.arange(10.0)[:, None], np.arange(10) % 2, weight=np.ones(10))
    batches = list(in_order(data, Scaling(None, torch.ones(1)), CPU, size=4))
    assert [len(b.x) for b in batches] == [4, 4, 2]
    assert torch.cat([b.x for b in batches]).flatten().tolist() == list(range(10))


@pytest.mark.parametrize("block", [1, 40, 2**20])
@pytest.mark.parametrize("weighted", [False, True])
@given(count=st.integers(2, 60), size=st.integers(1, 20))
def test_batches_of_an_order_are_its_chunks_however_many_are_gathered(block, weighted, count, size):
    weight = np.arange(count) + 1.0 if weighted else None
    data = dataset(np.arange(2.0 * count).reshape(count, 2), np.arange(count) % 2, weight=weight)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    scaling = Scaling(None, torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("truenorm.data.batches._BLOCK", block)
        batches = list(in_batches(data, order, size, scaling, CPU))
    assert len(batches) == len(chunks(order, size))
    for batch, index in zip(batches, chunks(order, size), strict=True):
        assert torch.equal(batch.x, data.x[index])
        assert torch.equal(batch.y, data.y[index])
        assert (batch.weight is None) == (not weighted)
        assert batch.weight is None or torch.equal(batch.weight, data.weight[index])


def test_a_shifted_image_is_a_window_of_the_padded_one(generator):
    x = torch.rand(64, 3, 5, 6, generator=generator)
    moved = shifted(x, 2, generator)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    windows = {
        (i, dy, dx)
        for i in range(64)
        for dy in range(5)
        for dx in range(5)
        if torch.equal(padded[i, :, dy : dy + 5, dx : dx + 6], moved[i])
    }
    assert {i for i, _, _ in windows} == set(range(64))
    assert len({(dy, dx) for _, dy, dx in windows}) > 15  # all directions occur


@pytest.mark.parametrize(
    ("given_shape", "held_shape"),
    [
        ((4, 7), (4, 7)),
        ((4, 5, 6), (4, 1, 5, 6)),
        ((4, 3, 5, 6), (4, 3, 5, 6)),
        ((4, 5, 6, 3), (4, 3, 5, 6)),
        ((4, 5, 6, 1), (4, 1, 5, 6)),
    ],
)
def test_examples_are_held_as_rows_or_channels_first_images(given_shape, held_shape):
    assert dataset(np.zeros(given_shape, np.uint8), [0, 1, 0, 1]).x.shape == held_shape


@pytest.mark.parametrize("kind", ["<f8", ">f4", "<i2", "?", "<u4", "<f2"])
def test_numbers_of_every_kind_become_float32(kind):
    x = np.array([[0, 1], [1, 0]]).astype(kind)
    assert dataset(x, ["a", "b"]).x.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_labels_become_positions_in_the_sorted_classes():
    data = dataset(np.zeros((4, 1)), ["dog", "cat", "dog", "emu"])
    assert data.classes == ("cat", "dog", "emu")
    assert data.y.tolist() == [1, 0, 1, 2]


def test_equal_data_have_equal_fingerprints_and_others_do_not():
    a, b = (dataset(np.arange(6.0).reshape(3, 2), [0, 1, 1]) for _ in range(2))
    c = dataset(np.arange(6.0).reshape(3, 2), [0, 1, 0])
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


BAD = {
    "one class": (np.zeros((3, 2)), [1, 1, 1], r"at least two classes.*only 1"),
    "nan cell": (np.array([[0, 1], [2, np.nan]]), [0, 1], r"row 1 .*\(1,\) is nan"),
    "infinite cell": (np.array([[0, np.inf], [2, 3]]), [0, 1], r"row 0 .* is inf"),
    "too large for float32": (np.array([[0, 1e39], [2, 3]]), [0, 1], r"row 0 .* is inf"),
    "text": (np.array([["a"], ["b"]]), [0, 1], "must be numbers"),
    "no label for one": (np.zeros((3, 2)), [0, 1], r"one label per example, shape \(3,\)"),
    "missing label": (np.zeros((2, 2)), np.array(["a", None], object), "row 1 .* missing"),
    "nan label": (np.zeros((2, 2)), [0.0, np.nan], "label of row 1 .* is nan"),
    "fraction label": (np.zeros((2, 2)), [0.5, 1], "TrueNorm classifies"),
    "mixed labels": (np.zeros((2, 2)), np.array(["a", 1], object), "mix types"),
    "one number each": (np.zeros(3), [0, 1, 0], r"got shape \(3,\)"),
    "nothing": (np.zeros((0, 3)), [], "nothing empty"),
    "complex": (np.zeros((2, 2), complex), [0, 1], "must be numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_data_set_is_refused_with_its_place(case):
    x, y, text = BAD[case]
    with pytest.raises(InputError, match=text):
        dataset(x, y)


def test_fewer_training_examples_than_classes_are_refused():
    data = dataset(np.zeros((10, 2)), np.arange(10))
    with pytest.raises(InputError, match=r"fewer training examples \(6\) than classes \(10\)"):
        split(data, seed=0)


@pytest.mark.parametrize("weight", [[1, -1, 1], [1, np.nan, 1], [0, 0, 0], [1, 1]])
def test_weights_that_weigh_nothing_are_refused(weight):
    with pytest.raises(InputError, match="weights must"):
        dataset(np.zeros((3, 2)), [0, 1, 0], weight=weight)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_a_share_outside_the_unit_interval_is_refused(share):
    data = dataset(np.zeros((10, 1)), np.arange(10) % 2)
    with pytest.raises(InputError, match=r"valid must lie in \(0, 1\)"):
        split(data, valid=share)


def test_parts_of_different_kinds_are_refused():
    rows = dataset(np.zeros((4, 2)), [0, 1, 0, 1])
    with pytest.raises(InputError, match="shape"):
        Splits(rows, dataset(np.zeros((4, 3)), [0, 1, 0, 1]))
    with pytest.raises(InputError, match="classes"):
        Splits(rows, dataset(np.zeros((4, 2)), [0, 2, 0, 2]))
