from __future__ import annotations

import dataclasses

import pytest

from rows import timeless
from samples import blobs
from truenorm import InputError, compare
from truenorm.cli.study import PlanOptions
from truenorm.studies.plan import StudyPlan

TINY = {"norms": ("none", "batch"), "batch_sizes": (16,), "changes": {"epochs": 1, "widths": (8,)}}


def test_keywords_make_the_plan_or_replace_fields_of_one():
    data = blobs(150)
    asked = compare(data, **TINY, seeds=2, processes=0)
    planned = compare(data, StudyPlan(**TINY, seeds=2), processes=0)
    replaced = compare(data, StudyPlan(**TINY, seeds=1), seeds=2, processes=0)
    assert timeless(planned.rows) == timeless(replaced.rows) == timeless(asked.rows)
    with pytest.raises(InputError, match="sedes"):
        compare(data, sedes=2)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"metric": "speed"}, "unknown metric 'speed'"),
        ({"margin": 0}, "margin must be above 0, got 0"),
        ({"against": "second"}, "unknown against 'second'"),
        ({"lr": "fast"}, "lr must be recipe, tune or a number, got 'fast'"),
        ({"lr": -1.0}, "lr must be a finite number above 0, got -1.0"),
        ({"lr": "tune", "grid": ()}, "at least one learning rate"),
        ({"seeds": [1, 1]}, "seeds must be at least one, and all different"),
        ({"seeds": [1_000_000]}, "beyond which tuning has its own"),
        ({"tuner": "luck"}, "unknown tuner 'luck'"),
        ({"trials": 3}, "trials are the tuner optuna's, got 3"),
        ({"until": "done"}, "unknown until 'done'"),
        ({"until": "decided", "max_seeds": 1}, "max_seeds must lie in"),
        ({"until": "decided", "seeds": [1, 2]}, "seeds must be a number from 2 to max_seeds"),
    ],
)
def test_a_plan_refuses_what_cannot_be(fields, text):
    with pytest.raises(InputError, match=text):
        StudyPlan(**fields)


def test_every_field_has_its_help_and_all_but_changes_an_option():
    fields = {f.name: f for f in dataclasses.fields(StudyPlan)}
    assert all(f.metadata["help"].endswith(".") for f in fields.values())
    assert {f.name for f in dataclasses.fields(PlanOptions)} == fields.keys() - {"changes"}


@pytest.mark.parametrize(
    ("fields", "seeds"),
    [
        ({}, 8),
        ({"seeds": 3}, 3),
        ({"until": "decided", "max_seeds": 20}, 20),
        ({"until": "decided", "max_seeds": 20, "seeds": 4}, 20),
    ],
)
def test_a_plan_says_how_many_seeds_may_be_judged(fields, seeds):
    assert StudyPlan(**fields).judged_seeds(5) == tuple(range(seeds))
    assert StudyPlan().judged_seeds(9) == tuple(range(10))
