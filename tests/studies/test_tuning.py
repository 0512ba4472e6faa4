from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys

import pytest

from rows import timeless
from samples import blobs
from truenorm import InputError, ModelSpec, TrainConfig, compare
from truenorm.studies.plan import trials_of
from truenorm.studies.trial import Row
from truenorm.studies.tuning import ROUND, tuned
from truenorm.studies.variants import Variant

GRID = (1e-4, 1e-2, 1.0)
VARIANTS = [
    Variant(label, "batch size 16", ModelSpec(norm=label), TrainConfig(batch_size=16))
    for label in ("none", "batch")
]


def optuna(**options):
    pytest.importorskip("optuna", reason="tuner 'optuna' needs the extra tune")
    chosen = {
        "norms": ("none", "batch"), "batch_sizes": (16,), "seeds": 1, "processes": 0, "lr": "tune",
        "grid": (0.001, 0.1), "tuner": "optuna", "trials": ROUND + 2, "tuning_seeds": 2,
        "changes": {"epochs": 1, "widths": (8,)}, **options,
    }  # fmt: skip
    return compare(blobs(150), **chosen)


def planted(best, asked=None):
    """Rows whose validation loss is least at a variant's own ``best`` rate, plus 1 by seed."""

    def run(trials, ahead):
        if asked is not None:
            asked.append((list(trials), list(ahead)))
        return [
            Row(
                variant=t.variant, part=t.part, seed=t.config.seed, lr=t.config.lr,
                valid_loss=math.log(t.config.lr / best[t.variant]) ** 2 + t.config.seed % 2,
            )
            for t in trials
        ]  # fmt: skip

    return run


@pytest.mark.parametrize("best", [{"none": 3e-3, "batch": 0.2}, {"none": 0.05, "batch": 4e-4}])
def test_optuna_finds_each_variants_planted_rate(best):
    pytest.importorskip("optuna")
    rows, lrs = tuned(VARIANTS, GRID, 2, planted(best), [], tuner="optuna", trials=30)
    for label, rate in best.items():
        assert abs(math.log10(lrs[label] / rate)) < 0.15
    assert [row.variant for row in rows] == ["none"] * 60 + ["batch"] * 60
    assert all(GRID[0] <= row.lr <= GRID[-1] for row in rows)


def test_what_is_told_early_steers_what_is_asked_later():
    pytest.importorskip("optuna")
    for rate in (1e-3, 0.1):
        asked = []
        best = {"none": rate, "batch": rate}
        tuned(VARIANTS, GRID, 1, planted(best, asked), [], tuner="optuna", trials=30)
        off = [[abs(math.log10(t.config.lr / rate)) for t in trials] for trials, _ in asked]
        assert sum(off[-1]) < sum(off[0]) / 2
        firsts = [[t.config.lr for t in asked[0][0] if t.variant == v.label] for v in VARIANTS]
        assert firsts[0] == firsts[1]
        assert [len(trials) for trials, _ in asked] == [2 * ROUND] * 6
        assert [len(ahead) for _, ahead in asked] == [2 * (30 - ROUND * k) for k in range(1, 7)]


@pytest.mark.parametrize("tuner", ["grid", "optuna"])
def test_a_rate_with_a_diverged_run_is_never_chosen(tuner):
    if tuner == "optuna":
        pytest.importorskip("optuna")

    def run(trials, ahead):
        rows = planted({"none": 1.0, "batch": 1.0})(trials, ahead)
        return [dataclasses.replace(r, stopped="nan") if r.lr > 0.1 else r for r in rows]

    _, lrs = tuned(VARIANTS, GRID, 2, run, [], tuner=tuner, trials=12)
    assert all(lr <= 0.1 for lr in lrs.values())


def test_the_grid_is_tried_whole_in_one_go():
    asked = []
    best = {"none": 9e-3, "batch": 0.5}
    rows, lrs = tuned(VARIANTS, GRID, 2, planted(best, asked), ["next"])
    assert lrs == {"none": 1e-2, "batch": 1.0}
    assert len(asked) == 1
    assert asked[0][1] == ["next"]
    assert [(r.variant, r.lr, r.seed) for r in rows] == [
        (v.label, lr, 1_000_000 + s) for v in VARIANTS for lr in GRID for s in (0, 1)
    ]


def test_every_variant_has_the_same_number_of_runs_on_validation_alone():
    study = optuna()
    rates = {v.label: {r.lr for r in study.tuning if r.variant == v.label} for v in study.variants}
    counts = [sum(r.variant == v.label for r in study.tuning) for v in study.variants]
    assert [len(own) for own in rates.values()] == [ROUND + 2] * 2
    assert counts == [2 * (ROUND + 2)] * 2
    assert all(r.test_accuracy is None for r in study.tuning)
    assert {r.seed for r in study.tuning}.isdisjoint({r.seed for r in study.rows})
    assert all(row.lr == study.lrs[row.variant] for row in study.rows)
    assert all(study.lrs[label] in own for label, own in rates.items())


def test_rates_and_rows_do_not_depend_on_the_number_of_processes():
    told = [
        timeless(study.rows + study.tuning)
        for study in (optuna(), optuna(processes=1), optuna(processes=2))
    ]
    assert told[0] == told[1] == told[2]


def test_a_second_time_all_is_in_the_store_and_more_trials_go_on(tmp_path):
    seen = []
    options = {"store": tmp_path / "s.sqlite", "observe": seen.append}
    first = optuna(**options, trials=ROUND)
    ran = [t for t in seen if t.row is not None]
    assert len(ran) == 2 * 2 * ROUND + 2
    assert [t.runs for t in ran] == list(range(1, len(ran) + 1))
    assert {t.total_runs for t in seen} == {len(ran)}
    seen.clear()
    assert optuna(**options, trials=ROUND).tuning == first.tuning
    assert all(t.row is None for t in seen)
    more = optuna(**options, trials=2 * ROUND)
    assert set(first.tuning) < set(more.tuning)
    assert sum(t.row is not None and t.row.part == "tuning" for t in seen) == 2 * 2 * ROUND


def test_optuna_leaves_its_logging_as_it_was():
    theirs = pytest.importorskip("optuna").logging
    before = theirs.get_verbosity()
    optuna()
    assert theirs.get_verbosity() == before != logging.ERROR


def test_the_command_tunes_by_optuna_which_says_nothing(tmp_path):
    pytest.importorskip("optuna")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "truenorm", "compare", "--data", "iris"),
            *("--norm", "none,batch", "--batch-size", "8", "--seeds", "1", "--epochs", "1"),
            *("--widths", "8", "--processes", "0", "--lr", "tune", "--tuner", "optuna"),
            *("--trials", "6", "--tuning-seeds", "1", "--quiet", "--json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert len({row["lr"] for row in json.loads(done.stdout)["tuning"]}) >= 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tuner": "luck"}, "unknown tuner 'luck'"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"lr": 0.1}, "tuner 'optuna' needs lr 'tune'.*got 0"),
        ({"grid": (0.1, 0.1)}, "a grid of two rates or more, got 1"),
        ({"tuner": "grid"}, "trials are the tuner optuna's, got 7"),
    ],
)
def test_a_tuner_that_cannot_work_is_refused_before_anything_runs(options, text):
    seen = []
    with pytest.raises(InputError, match=text):
        optuna(**options, observe=seen.append)
    assert not seen


def test_without_optuna_its_tuner_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'truenorm\[tune\]'"):
        trials_of("optuna", None, GRID)
    assert trials_of("grid", None, GRID) == 3
