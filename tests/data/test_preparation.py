from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder

import truenorm
from truenorm.data.datasets import Splits, dataset
from truenorm.data.preparation import Column, Preparation

AGE, CITY = Column("age", "number"), Column("city", "category", ("A", "B", "C"))
nan = np.nan
cells = st.one_of(st.just(nan), st.floats(-1e6, 1e6, width=32))
places = st.sampled_from([nan, 0.0, 1.0, 2.0])


def some(most):
    return st.lists(st.tuples(cells, places), min_size=1, max_size=most)


def rows(values):
    return np.array(values, dtype=np.float32)


def test_numbers_stay_gaps_become_the_median_with_a_mark_and_text_becomes_one_column_each():
    x = rows([[1, 0], [nan, 2], [3, nan], [10, 0]])
    learned = Preparation.learn(x, (AGE, CITY))
    assert learned.features == ("age", "age=(empty)", "city=A", "city=C", "city=(empty)")
    expected = [[1, 0, 1, 0, 0], [3, 1, 0, 1, 0], [3, 0, 0, 0, 1], [10, 0, 1, 0, 0]]
    np.testing.assert_array_equal(learned.apply(x, (AGE, CITY)), expected)


@given(some(12), some(5))
def test_it_makes_what_scikit_learns_own_parts_make(train, new):
    train, new = rows(train), rows(new)
    learned = Preparation.learn(train, (AGE, CITY))
    imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    theirs = [imputer.fit(train[:, :1]).transform(new[:, :1])]
    seen = train[~np.isnan(train[:, 1]), 1:]
    if len(seen):
        encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(seen)
        theirs.append(encoder.transform(new[:, 1:]))
    if len(seen) < len(train):
        theirs.append(np.isnan(new[:, 1:]))
    np.testing.assert_array_equal(
        learned.apply(new, (AGE, CITY)), np.concatenate(theirs, axis=1).astype(np.float32)
    )


@given(some(12))
def test_what_is_stored_makes_the_same_again(values):
    x = rows(values)
    learned = Preparation.learn(x, (AGE, CITY), {"when": "holds dates"})
    again = Preparation.from_json(json.loads(json.dumps(learned.to_json())))
    assert again == learned
    np.testing.assert_array_equal(again.apply(x, (AGE, CITY)), learned.apply(x, (AGE, CITY)))


def test_categories_are_taken_by_their_texts_not_their_places():
    learned = Preparation.learn(rows([[0], [2]]), (CITY,))
    other = Column("city", "category", ("C", "D"))
    np.testing.assert_array_equal(
        learned.apply(rows([[0], [1], [nan]]), (other,)), [[0, 1], [0, 0], [0, 0]]
    )
    told = learned.unknown(rows([[0], [1], [nan]]), (other,))
    assert told == [
        "column 'city': 1 row holds 'D', unknown to the model; each counts as none of its "
        "categories",
        "column 'city': 1 row holds nothing, as no row did in training; each becomes none of its "
        "categories",
    ]


def test_gaps_where_training_had_none_are_told_and_become_the_median():
    learned = Preparation.learn(rows([[1], [2], [9]]), (AGE,))
    x = rows([[nan], [nan], [4]])
    np.testing.assert_array_equal(learned.apply(x, (AGE,)), [[2], [2], [4]])
    assert learned.unknown(x, (AGE,)) == [
        "column 'age': 2 rows hold nothing, as no row did in training; each becomes the median 2"
    ]


def test_a_column_that_is_empty_in_all_training_rows_is_zeros():
    learned = Preparation.learn(rows([[nan, nan], [nan, nan]]), (AGE, CITY))
    assert learned.features == ("age", "age=(empty)", "city=(empty)")
    np.testing.assert_array_equal(
        learned.apply(rows([[nan, 1], [5, nan]]), (AGE, CITY)), [[0, 1, 0], [5, 0, 1]]
    )


def test_numbers_without_gaps_pass_bit_by_bit():
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    two = (AGE, Column("size", "number"))
    learned = Preparation.learn(x, two)
    assert learned.plain
    assert learned.apply(x, two).tobytes() == x.tobytes()


def test_the_table_has_a_row_for_each_column_of_the_source():
    x = rows([[1, 0, 5, 1], [nan, nan, 5, 0], [3, 2, 5, 1]])
    columns = (AGE, CITY, Column("same", "number"), Column("smokes", "boolean"))
    learned = Preparation.learn(x, columns, {"when": "holds dates, such as '2020-01-01'"})
    assert learned.table() == [
        ("age", "number", "as it is; empty cells become the median 2, and a column marks them"),
        ("city", "category", "one of 2: A, C; empty cells a category of their own"),
        ("same", "number", "as it is; the same in every training row, so it tells nothing"),
        ("smokes", "boolean", "0 or 1"),
        ("when", "left out", "holds dates, such as '2020-01-01'"),
    ]


def test_long_categories_are_cut_in_the_table():
    long = Column("note", "category", ("x" * 500, "y"))
    (row,) = Preparation.learn(rows([[0], [1]]), (long,)).table()
    assert row[2] == f"one of 2: {'x' * 27}..., y"


def parts_of(x):
    y = np.arange(len(x)) % 2
    held = [dataset(x[a:b], y[a:b], columns=(AGE, CITY)) for a, b in ((0, 8), (8, 10), (10, 12))]
    return Splits(*held)


def test_it_is_learned_from_the_training_part_alone():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=12), rng.integers(0, 2, 12)], axis=1).astype(np.float32)
    before = parts_of(x)
    x[8:] = [[1e9, 2], [nan, nan], [-1e9, 2], [nan, 2]]
    after = parts_of(x)
    assert after.preparation == before.preparation
    torch.testing.assert_close(after.train.x, before.train.x, rtol=0, atol=0)
    assert after.scaling.to_json() == before.scaling.to_json()
    assert after.test.x[1].tolist()[1:] == [0.0] * (after.input_shape[0] - 1)  # C is unknown


def test_each_seeds_cut_learns_its_own(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,k\n" + "".join(f"{i if i % 7 else ''},{'xy'[i % 2]}\n" for i in range(60)))
    medians = {
        truenorm.load(str(path), target="k", seed=s).preparation.columns[0].fill for s in range(6)
    }
    assert len(medians) > 1


@pytest.mark.parametrize("kind", ["number", "boolean", "category"])
def test_a_stored_preparation_without_later_fields_still_loads(kind):
    stored = {
        "columns": [
            {"name": "a", "kind": kind, "fill": 1.0, "indicator": False, "categories": ["u"]}
        ],
        "left_out": {},
    }
    assert Preparation.from_json(stored).columns[0].constant is False
