from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import truenorm
from truenorm import InputError

X = torch.arange(120.0).reshape(40, 3)
Y = torch.arange(40) % 2
KNOWN = {tuple(x): y for x, y in zip(X.tolist(), Y.tolist(), strict=True)}


class Pairs(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Words(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"x": X[i]}


@pytest.mark.parametrize(
    "given",
    [
        (X, Y), [X, Y], (X.numpy(), Y.numpy()), [X.tolist(), Y.tolist()], TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), 7), Pairs(), DataLoader(Pairs(), 7),
        DataLoader(Endless(), 7), {"data": X, "target": Y},
    ],
    ids=lambda g: type(g).__name__,
)  # fmt: skip
def test_pairs_in_any_hands_are_the_same_examples(given):
    splits = truenorm.load(given)
    parts = (splits.train, splits.valid, splits.test)
    assert sum(map(len, parts)) == 40
    for part in parts:
        for x, y in zip(part.x.tolist(), part.y.tolist(), strict=True):
            assert KNOWN[tuple(x)] == part.classes[y]


def test_a_bunch_of_scikit_learn_has_its_names():
    assert truenorm.load(load_wine()).classes == ("class_0", "class_1", "class_2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param([X], "cannot load list of 1: give a name or path, a pair", id="one array"),
        pytest.param((X, Y, Y), "cannot load tuple of 3", id="three arrays"),
        pytest.param(X, "cannot load Tensor", id="a tensor"),
        pytest.param(7, "cannot load int", id="a number"),
        pytest.param(None, "cannot load NoneType", id="None"),
        pytest.param(
            Endless(), "Endless has no length; wrap it in a DataLoader that ends", id="endless"
        ),
        pytest.param(Words(), r"item 0 of the data is dict, not a pair \(x, y\)", id="dicts"),
        pytest.param(TensorDataset(X), "not a pair", id="no labels"),
        pytest.param(([[1, 2], [3]], [0, 1]), "whose rows are of one length", id="ragged"),
        pytest.param(
            (np.ma.masked_less(X.numpy(), 9), Y.numpy()), "masked array; fill it", id="masked"
        ),
        pytest.param(
            (X, Y[:-1]),
            r"one label per example, shape \(40,\), got labels of shape \(39,\)",
            id="a label short",
        ),
        pytest.param((X, Y / 3), "labels are measurements such as 0.3333", id="measurements"),
    ],
)
def test_what_is_no_pair_is_refused_with_what_would_be(given, message):
    with pytest.raises(InputError, match=message):
        truenorm.load(given)


# -- .npz ------------------------------------------------------------------------------------------


def saved(path, **arrays):
    np.savez(path, **{name: np.asarray(a) for name, a in arrays.items()})
    return str(path)


@pytest.mark.parametrize(
    "names", [("x", "y"), ("X", "y"), ("X", "Y"), ("data", "target"), ("images", "labels")]
)
def test_arrays_of_an_npz_go_by_their_usual_names(tmp_path, names):
    path = saved(tmp_path / "a.npz", **dict(zip(names, (X, Y), strict=True)))
    assert truenorm.load(path).input_shape == (3,)


def test_an_npz_of_other_names_is_told_those_that_it_has(tmp_path):
    assert truenorm.load(saved(tmp_path / "b.npz", foo=X, bar=Y)).input_shape == (3,)  # no doubt
    path = saved(tmp_path / "a.npz", foo=X, bar=Y, baz=Y)
    with pytest.raises(InputError, match=r"got .*bar.*baz.*foo|got .*foo.*bar.*baz"):
        truenorm.load(path)


def test_two_arrays_of_one_name_but_for_case_are_refused(tmp_path):
    path = saved(tmp_path / "a.npz", X=X, x=X, y=Y)
    with pytest.raises(InputError, match=r"'?X'? and '?x'?|'?x'? and '?X'?"):
        truenorm.load(path)


def test_labels_that_are_python_objects_are_refused_with_what_to_save(tmp_path):
    path = saved(tmp_path / "a.npz", x=X, y=np.array(["a", "b"] * 20, dtype=object))
    with pytest.raises(InputError, match=r"'y' holds Python objects.*y\.astype\(str\)"):
        truenorm.load(path)


# -- tables in files -------------------------------------------------------------------------------

TABLE = "a,b,k\n" + "".join(f"{i},{i % 7},{'uv'[i % 2]}\n" for i in range(40))


def test_a_table_is_known_by_its_ending_in_any_case_compressed_or_not(tmp_path):
    import gzip

    texts = {"t.CSV": TABLE, "t.tsv": TABLE.replace(",", "\t"), "t.Tsv": TABLE.replace(",", "\t")}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    expected = None
    for path in sorted(tmp_path.iterdir()):
        x = truenorm.load(str(path), target="k").train.x
        expected = x if expected is None else expected
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("text", ["a,b,k\n", "a,b,k", "", "\n\n"])
def test_a_table_without_rows_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=r"t\.csv"):
        truenorm.load(str(tmp_path / "t.csv"), target="k")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encoding_and_delimiter_change_nothing(tmp_path, encoding, delimiter):
    words = ("männlich", "größer") if encoding == "latin-1" else ("恶性", "良性")
    rows = [("größe" if encoding == "latin-1" else "年龄", "k")]
    rows += [(str(i), words[i % 2]) for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(map(delimiter.join, rows)), encoding)
    splits = truenorm.load(str(tmp_path / "t.csv"), target="k", encoding=encoding)
    assert set(splits.classes) == set(words)
    found = truenorm.load(str(tmp_path / "t.csv"), target="k")
    torch.testing.assert_close(found.train.x, splits.train.x, rtol=0, atol=0)
    assert found.classes == splits.classes


def test_measurements_as_labels_are_refused_with_the_reason(tmp_path):
    (tmp_path / "t.csv").write_text("a,k\n" + "".join(f"{i},{i / 7}\n" for i in range(40)))
    with pytest.raises(InputError, match="TrueNorm classifies"):
        truenorm.load(str(tmp_path / "t.csv"), target="k")
