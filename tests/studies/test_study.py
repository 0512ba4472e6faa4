from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import truenorm
from children import heed_ctrl_c
from rows import timeless
from samples import blobs
from truenorm import InputError, ModelSpec, Splits, TrainConfig, build, compare, dataset
from truenorm.data.datasets import Uncut
from truenorm.data.sources import uncut
from truenorm.report import study as report
from truenorm.studies.bench import Bench
from truenorm.studies.trial import Row, failed
from truenorm.studies.tuning import tuning_loss
from truenorm.studies.variants import Variant
from truenorm.studies.workers import WorkerPool, map_data, write_data

TINY = {"epochs": 2, "widths": (8,)}


def small(data=None, **options):
    """Two norms, two batch sizes, two seeds on 150 rows, in this process unless told otherwise."""
    chosen = {
        "norms": ("none", "batch"), "batch_sizes": (16, 32), "seeds": 2, "processes": 0,
        "changes": TINY, **options,
    }  # fmt: skip
    return compare(blobs(150) if data is None else data, **chosen)


def all_rows(study):
    return timeless(study.rows + study.tuning)


def key_of(row):
    return (row.part, row.variant, row.lr, row.seed)


# What the variants of a seed share ------------------------------------------------------------

MATRICES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


def weights(spec, shape):
    model = build(spec, shape, 3, seed=7)
    return [
        p for m in model.modules() if isinstance(m, MATRICES)
        for n, p in m.named_parameters(recurse=False) if "bias" not in n
    ]  # fmt: skip


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("norm", ["batch", "layer", "group", "instance", "rms"])
@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "transformer"])
def test_the_initial_weights_of_a_seed_do_not_depend_on_the_norm(name, norm, position):
    plain = weights(ModelSpec(name=name, norm="none"), (1, 12, 12))
    normed = weights(ModelSpec(name=name, norm=norm, norm_position=position), (1, 12, 12))
    assert len(plain) == len(normed) > 1
    for a, b in zip(plain, normed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_convolutions_without_a_norm_have_biases_as_torch_draws_them(name):
    model = build(ModelSpec(name=name, norm="none"), (1, 12, 12), 3, seed=7)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:
        bound = conv.weight[0].numel() ** -0.5
        assert conv.bias.abs().max() <= bound
        assert conv.bias.std() > bound / 4


def test_one_seed_has_one_split_and_another_seed_another():
    data = Uncut(dataset(*blobs(90)))
    assert data.cut(3).fingerprint() == data.cut(3).fingerprint()
    assert data.cut(3).fingerprint() != data.cut(4).fingerprint()
    assert truenorm.load(blobs(90), seed=3).fingerprint() == data.cut(3).fingerprint()


def test_a_row_is_what_the_same_training_gives_alone():
    row = small(norms=("batch",), batch_sizes=(16,), seeds=[5], lr=0.01).rows[0]
    splits = truenorm.load(blobs(150), seed=5)
    model = build(ModelSpec(widths=(8,)), (6,), 3, seed=5)
    chosen = {"batch_size": 16, "lr": 0.01, "epochs": 2, "seed": 5, "threads": 1}
    config = truenorm.recipe("default", "mlp", 96, **chosen)
    history = truenorm.fit(model, splits, config)
    tested = truenorm.score(
        truenorm.logits_of(model, splits.test, splits.scaling, torch.device("cpu")), splits.test
    )
    assert (row.test_accuracy, row.test_loss) == (tested.accuracy, tested.loss)
    assert (row.valid_loss, row.epochs) == (history.best.valid_loss, 2)
    assert [loss for loss, _, _ in row.curve] == [e.valid_loss for e in history.epochs]


# Rows ------------------------------------------------------------------------------------------


def test_rows_depend_neither_on_the_number_of_processes_nor_on_the_order():
    options = {"lr": "tune", "grid": (0.01, 0.1), "tuning_seeds": 1}
    here = small("digits", **options)
    assert len(here.rows) == 8
    assert len(here.tuning) == 8
    for processes in (1, 2):
        assert all_rows(small("digits", **options, processes=processes)) == all_rows(here)
    back = small("digits", **options, norms=("batch", "none"), batch_sizes=(32, 16), seeds=[1, 0])
    assert sorted(all_rows(back), key=key_of) == sorted(all_rows(here), key=key_of)


def test_workers_see_the_data_to_the_bit(tmp_path):
    x, y = blobs(30)
    part = dataset(x, y, weight=np.linspace(0.5, 2, 30))
    whole = Uncut(part, test=part, valid=part, scaling=truenorm.Scaling.of(part.x))
    for data in (whole, Uncut(part), uncut("digits")):
        write_data(data, tmp_path / "data.safetensors")
        assert map_data(tmp_path / "data.safetensors").fingerprint() == data.fingerprint()


def test_more_seeds_or_variants_run_only_what_is_missing(tmp_path):
    seen = []
    options = {
        "store": tmp_path / "s.sqlite",
        "observe": lambda told: told.note or seen.append(told.row),
    }
    first = small(**options)
    ran = [row for row in seen if row is not None]
    assert len(ran) == len(first.rows) == 8

    seen.clear()
    assert all_rows(small(**options)) == all_rows(first)
    assert seen == [None]

    seen.clear()
    more = small(**options, seeds=3, norms=("none", "batch", "layer"))
    new = {(row.variant, row.seed) for row in seen if row is not None}
    assert new == {(r.variant, r.seed) for r in more.rows} - {(r.variant, r.seed) for r in ran}
    assert set(first.rows) <= set(more.rows)


@pytest.mark.parametrize(
    "change", [{"changes": {**TINY, "epochs": 3}}, {"lr": 0.02}, {"recipe": "classic"},
               {"data": blobs(150, seed=1)}, {"changes": {**TINY, "dropout": 0.1}}],
)  # fmt: skip
def test_another_config_or_other_data_are_other_runs(tmp_path, change):
    seen = []
    small(store=tmp_path / "s.sqlite")
    small(**change, store=tmp_path / "s.sqlite", observe=lambda told: seen.append(told.row))
    assert sum(row is not None for row in seen) == 8


def test_a_failed_run_is_a_row_with_its_error_and_is_run_again_only_when_asked(
    tmp_path, monkeypatch
):
    def broken(self, trial):
        if trial.config.seed == 1:
            raise RuntimeError("no luck\nat all")
        return Row(variant=trial.variant, part=trial.part, seed=0, lr=0.1, test_accuracy=0.5)

    store = tmp_path / "s.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_perform", broken)
        study = small(store=store)
    errors = {row.seed: row.error for row in study.rows}
    assert errors == {0: None, 1: "RuntimeError: no luck at all"}
    assert [s.failed for s in study.summaries()] == [1, 1, 1, 1]
    assert all(pair.comparison.n == 1 and pair.decision == "cannot tell" for pair in study.verdicts)

    assert {r.error for r in small(store=store).rows} == set(errors.values())
    again = small(store=store, retry=True)
    assert {r.error for r in again.rows} == {None}
    assert small(store=store).rows == again.rows


def test_a_batch_that_cannot_be_normalized_fails_its_own_runs_alone():
    study = small(batch_sizes=(1,), seeds=1)
    assert [row.error is None for row in study.rows] == [True, False]
    assert study.rows[1].error.startswith("InputError: batch norm cannot normalize a batch of 1")


def test_a_diverged_run_is_counted_and_judged_by_what_it_left():
    splits = truenorm.load(blobs(150))
    far = Splits(splits.train, splits.valid, splits.test, splits.scaling)
    study = small(far, norms=("none",), batch_sizes=(16,), lr=1e30, seeds=1)
    row = study.rows[0]
    assert row.diverged
    assert row.stopped == "nan"
    assert row.error is None
    assert 0 <= row.test_accuracy <= 1
    assert study.summaries()[0].diverged == 1


def test_the_way_to_a_goal_ends_at_the_first_epoch_that_reaches_it():
    curve = ((1.0, 0.5, 0.1), (0.9, 0.8, 0.2), (0.8, 0.7, 0.3), (0.7, 0.9, 0.4))
    row = Row(variant="v", part="judged", seed=0, lr=0.1, curve=curve)
    assert row.reaches(0.8) == (2, 0.2)
    assert row.reaches(0.85) == (4, 0.4)
    assert row.reaches(0.95) is None


# Tuning ----------------------------------------------------------------------------------------


def test_each_variant_takes_the_rate_of_least_validation_loss_from_as_many_trials_as_any():
    study = small(lr="tune", grid=(1e-5, 0.03), tuning_seeds=2)
    counts = {(v.label, lr): 0 for v in study.variants for lr in (1e-5, 0.03)}
    for row in study.tuning:
        counts[row.variant, row.lr] += 1
    assert set(counts.values()) == {2}
    assert set(study.lrs.values()) == {0.03}
    assert {row.lr for row in study.rows} == {0.03}
    assert all(loss[1] < loss[0] for loss in (
        [loss for _, loss in study.tried(v.label)] for v in study.variants
    ))  # fmt: skip


def test_tuning_runs_have_seeds_of_their_own_and_never_see_the_test_part():
    study = small(lr="tune", grid=(0.01, 0.03))
    assert {r.seed for r in study.tuning}.isdisjoint({r.seed for r in study.rows})
    assert all(r.test_accuracy is None and r.test_loss is None for r in study.tuning)


def test_a_rate_that_diverges_once_is_out():
    good = Row(variant="v", part="tuning", seed=0, lr=1, valid_loss=0.1, stopped="finished")
    bad = Row(variant="v", part="tuning", seed=1, lr=1, valid_loss=0.01, stopped="nan")
    assert tuning_loss([good]) == 0.1
    assert tuning_loss([good, bad]) == float("inf")
    assert tuning_loss([good, Row(variant="v", part="tuning", seed=1, lr=1)]) == float("inf")


def test_a_rate_chosen_at_the_grids_end_is_said():
    study = small(lr="tune", grid=(1e-5, 0.03), tuning_seeds=1)
    assert study.sentences()[-1] == (
        "The learning rate chosen for none/16, batch/16, none/32, batch/32, 0.03, is the largest "
        "that was tried; a wider grid may do better."
    )
    assert sum("that was tried" in text for text in study.sentences()) == 1
    assert "largest" not in str(small())


def test_progress_runs_over_tuning_and_judged_runs_together():
    told = []
    small(
        lr="tune", grid=(0.01, 0.03), tuning_seeds=1,
        observe=lambda t: t.note or told.append(t),
    )  # fmt: skip
    assert [t.runs for t in told if t.row is not None] == list(range(1, 17))
    assert {t.total_runs for t in told} == {16}
    assert len({t.total_steps for t in told}) == 1
    assert [t.steps for t in told] == sorted(t.steps for t in told)
    assert told[-1].steps == told[-1].total_steps


# Killing ---------------------------------------------------------------------------------------


def test_killing_workers_at_random_loses_no_run():
    straight = small(seeds=4)
    draw = np.random.default_rng(0)
    trials = [v.trial(seed, straight.lrs[v.label]) for v in straight.variants for seed in range(4)]
    rows = {}
    with WorkerPool(Uncut(dataset(*blobs(150))), 2) as pool:
        for trial, row in pool.run(trials):
            rows[trial] = row
            if len(rows) in (2, 5, 9, 12):
                pool.workers[draw.integers(len(pool.workers))].process.kill()
        left = list(pool.workers)
    assert timeless(rows[trial] for trial in trials) == timeless(straight.rows)
    assert all(worker.process.poll() is not None for worker in left)


def test_a_run_whose_worker_dies_three_times_is_a_row_with_the_error(monkeypatch):
    from truenorm.studies import workers

    asked = []
    ask = workers._Worker.ask

    def deadly(worker, trial, attempt):
        if trial.config.seed == 1:
            asked.append(attempt)
            worker.process.kill()
        ask(worker, trial, attempt)

    monkeypatch.setattr(workers._Worker, "ask", deadly)
    study = small(norms=("none",), batch_sizes=(16,), processes=1)
    assert asked == [1, 2, 3]
    assert study.rows[0].error is None
    assert "died 3 times (status -9" in study.rows[1].error


def test_a_script_without_a_main_guard_starts_studies_from_wherever_it_imports(tmp_path):
    script = tmp_path / "script.py"
    folder = str(Path(truenorm.__file__).parents[1])
    script.write_text(
        f"import sys; sys.path.insert(0, {folder!r})\nimport truenorm\n"
        "study = truenorm.compare('iris', norms=['none'], seeds=1, changes={'epochs': 1},"
        " processes=1)\nprint(study.rows[0].error, study.rows[0].epochs)\n"
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script],
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None 1\n"


def test_workers_that_cannot_start_end_the_study(monkeypatch):
    monkeypatch.setattr(
        "truenorm.studies.workers.write_data", lambda data, path: path.write_text("no")
    )
    with pytest.raises(RuntimeError, match="do not start"):
        small(processes=1)


# Ray -------------------------------------------------------------------------------------------


class StandIn:
    """As much of ray's interface as the engine uses, in this process; some calls' actors die."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, deaths=()):
        self.deaths, self.calls, self.up, self.killed = set(deaths), 0, False, 0

    def is_initialized(self):
        return self.up

    def init(self, **_):
        self.up = True

    def shutdown(self):
        self.up = False

    def cluster_resources(self):
        return {"CPU": 2.0}

    def put(self, value):
        return value

    def kill(self, actor):
        self.killed += 1

    def remote(self, **_):
        def hire(kind):
            def create(*args):
                held = kind(*args)
                return SimpleNamespace(
                    perform=SimpleNamespace(remote=lambda t: (id(object()), self._call(held, t)))
                )

            return SimpleNamespace(remote=create)

        return hire

    def _call(self, held, trial):
        self.calls += 1
        return None if self.calls in self.deaths else held.perform(trial)

    def wait(self, refs, num_returns):
        return refs[-num_returns:], refs[:-num_returns]

    def get(self, ref):
        if ref[1] is None:
            raise self.exceptions.RayError("died")
        return ref[1]


def test_the_ray_engine_gives_the_same_rows_though_actors_die(monkeypatch):
    ray = StandIn(deaths={2, 5})
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert all_rows(small(engine="ray", processes=None)) == all_rows(small())
    assert (ray.calls, ray.up) == (10, False)


def test_the_ray_engine_gives_up_a_run_after_three_deaths(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", StandIn(deaths={1, 2, 3}))
    study = small(engine="ray", processes=1, norms=("none",), batch_sizes=(16,))
    assert [row.error for row in study.rows] == ["its worker process died 3 times (RayError)", None]


def test_a_cluster_that_was_there_before_stays(monkeypatch):
    ray = StandIn()
    ray.init()
    monkeypatch.setitem(sys.modules, "ray", ray)
    small(engine="ray", processes=None)
    assert ray.up
    assert ray.killed == 2


def test_a_ray_address_that_ray_refuses_is_named(monkeypatch):
    def refuse(**_):
        raise ConnectionError("could not find\nany running instance")

    ray = StandIn()
    ray.init = refuse
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(InputError, match=r"find any running.*RAY_ADDRESS is 'auto'"):
        small(engine="ray")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://localhost:{}", "[::1]:{}", "a..b:{}0000"]
)
def test_a_ray_address_where_nobody_answers_is_named_at_once(monkeypatch, address):
    with socket.socket() as held:  # bound and not listening, so that nobody else takes it
        held.bind(("127.0.0.1", 0))
        address = address.format(held.getsockname()[1])
        ray = StandIn()
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InputError, match=r"no cluster \(.+\); RAY_ADDRESS is .*: start that"):
            small(engine="ray")
        assert not ray.up


def test_without_ray_its_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'truenorm\[cluster\]'"):
        small(engine="ray")


def benches():
    """The processes of a study's actors."""
    names = {int(p.name): (p / "cmdline").read_text("utf-8", "replace")
             for p in Path("/proc").iterdir() if p.name.isdigit()}  # fmt: skip
    return [pid for pid, name in names.items() if name.startswith("ray::Bench")]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_real_cluster_gives_the_same_rows_though_actors_are_killed_and_is_ended(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    killed = []

    def kill(told):
        if told.row is not None and told.runs in (2, 9):
            killed.append(benches()[0])
            os.kill(killed[-1], signal.SIGKILL)

    options = {"seeds": 4, "lr": "tune", "grid": (0.01, 0.1), "tuning_seeds": 1}
    study = small("digits", **options, engine="ray", processes=2, observe=kill)
    assert len(set(killed)) == 2
    assert all_rows(study) == all_rows(small("digits", **options, processes=2))
    assert not ray.is_initialized()


COMMAND = [
    "compare", "--data", "digits", "--norm", "none,batch", "--batch-size", "8,32",
    "--epochs", "6", "--widths", "16", "--store", "s.sqlite",
]  # fmt: skip


def started(folder, seeds=4):
    return subprocess.Popen(
        [sys.executable, "-m", "truenorm", *COMMAND, "--seeds", str(seeds), "--processes", "2",
         "--json"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509
    )  # fmt: skip


def follow(process, until):
    """The runs that ``process`` told of, until there are so many."""
    told = []
    while len(told) < until and (line := process.stderr.readline()):
        if line.startswith("run "):
            told.append(line.split()[2] + " " + line.split()[6])
    return told


def gone(process):
    """Wait for the end of a process and of all that hold its pipes."""
    out, err = process.communicate()
    return out, err


def test_kill_9_of_a_study_loses_no_row_and_repeats_none(tmp_path):
    first = started(tmp_path)
    told = follow(first, 5)
    first.kill()
    gone(first)
    with sqlite3.connect(tmp_path / "s.sqlite") as file:
        kept = file.execute("SELECT variant, seed, row FROM runs").fetchall()
    file.close()
    assert len(told) == 5
    assert len(kept) >= 5

    second = started(tmp_path)
    out, err = gone(second)
    assert second.returncode == 0
    runs = [line for line in err.splitlines() if line.startswith("run ")]
    assert len(runs) == 16 - len(kept)
    rows = {(r["variant"], r["seed"]): r for r in json.loads(out)["rows"]}
    assert len(rows) == 16
    for variant, seed, row in kept:
        assert rows[variant, seed]["seconds"] == json.loads(row)["seconds"]  # the very same run


def test_ctrl_c_ends_a_study_with_130_and_keeps_what_was_done(tmp_path):
    process = started(tmp_path, seeds=400)  # far from its end when the signal comes
    follow(process, 3)
    process.send_signal(signal.SIGINT)
    out, err = gone(process)
    assert process.returncode == 130
    assert "runs are in s.sqlite; the same command goes on" in err
    assert "Traceback" not in err
    assert json.loads(out) == {"error": "interrupted."}
    with sqlite3.connect(tmp_path / "s.sqlite") as file:
        assert file.execute("SELECT count(*) FROM runs").fetchone()[0] >= 3
    file.close()


# Verdicts --------------------------------------------------------------------------------------


def study_of(scores, **options):
    """A study with the given test accuracies by variant."""
    from truenorm.studies.question import Question

    variants = [
        Variant(label, "batch size 16", ModelSpec(norm=label), TrainConfig(batch_size=16))
        for label in scores
    ]
    rows = [
        Row(variant=label, part="judged", seed=i, lr=0.1, test_accuracy=value, stopped="finished")
        for label, values in scores.items()
        for i, value in enumerate(values)
    ]
    settings = {"metric": "test_accuracy", "margin": None, "against": "first", **options}
    question = Question(tuple(variants), **settings)
    return question.answer(
        rows, question.judge(rows), tuning=[], lrs=dict.fromkeys(scores, 0.1), goal=0.9,
        provenance={},
    )  # fmt: skip


FIRST = [("batch", "none"), ("layer", "none")]


@pytest.mark.parametrize(
    ("against", "judged"), [("first", FIRST), ("all", [*FIRST, ("layer", "batch")])]
)
def test_verdicts_are_beside_the_first_norm_or_all_and_pairs_are_all(against, judged):
    same = [0.9, 0.91, 0.92, 0.93]
    study = study_of({"none": same, "batch": same, "layer": same}, against=against)
    assert [(p.variant, p.reference) for p in study.verdicts] == judged
    assert [(p.variant, p.reference) for p in study.pairs] == [*FIRST, ("layer", "batch")]
    assert {p.comparison.family for p in study.verdicts} == {len(judged)}


SMALL = [0.001, -0.001, 0.0005, 0.0, -0.0005, 0.001, -0.001, 0.0]


@pytest.mark.parametrize(
    ("differences", "margin", "decision"),
    [
        ([0.02, 0.021, 0.019, 0.022, 0.02, 0.018], None, "better"),
        ([-0.02, -0.021, -0.019, -0.022, -0.02, -0.018], None, "worse"),
        (SMALL, 0.005, "equivalent"),
        ([0.02, -0.03, 0.01, 0.0, 0.01, -0.02], 0.005, "cannot tell"),
        (SMALL, None, "cannot tell"),
        ([0.02, 0.021, 0.019, 0.022, 0.02], None, "cannot tell"),  # 2 / 2^5 is over 5 %
    ],
)
def test_a_verdict_follows_the_paired_differences(differences, margin, decision):
    base = np.array([0.5, 0.7, 0.6, 0.9, 0.5, 0.8, 0.6, 0.9])[: len(differences)]
    study = study_of({"none": base, "batch": base + differences}, margin=margin)
    assert study.verdicts[0].decision == decision
    assert decision in study.sentences()[0]
    assert study.sentences()[0].startswith("batch size 16: ")


def test_a_study_without_a_common_seed_cannot_tell():
    study = study_of({"none": [0.9, None], "batch": [None, 0.9]})
    assert study.verdicts[0].decision == "cannot tell"
    assert "no seed has both scores" in study.sentences()[0]


def test_seeds_that_can_tell_nothing_are_told_of_before_anything_runs():
    told = []
    study = small(observe=told.append)
    assert told[0].note == (
        "2 seeds cannot tell anything among 2 verdicts at 5 %: at least 7 are needed."
    )
    assert [t.note for t in told[1:]] == [""] * (len(told) - 1)
    assert "fewer than 7 seeds can tell nothing among 2 pairs" in study.sentences()[0]


def test_a_study_that_asks_for_no_verdict_is_not_told_of_too_few_seeds():
    told = []
    study = small(norms=("batch",), observe=told.append)
    assert {t.note for t in told} == {""}
    assert study.verdicts == ()


@pytest.mark.parametrize(("norms", "seeds"), [(2, 8), (6, 12)])
def test_by_default_there_are_seeds_enough_to_tell(norms, seeds, monkeypatch):
    def planted(self, trial):
        return Row(variant=trial.variant, part="judged", seed=trial.config.seed, lr=0.1,
                   test_accuracy=0.5 + 0.1 * (trial.spec.norm == "batch"))  # fmt: skip

    monkeypatch.setattr(Bench, "perform", planted)
    chosen = ("none", "batch", "group", "layer", "rms", "instance")[:norms]
    study = small(norms=chosen, seeds=None, against="all")
    assert study.provenance["seeds"] == list(range(seeds))
    decisions = {p.variant.split("/")[0]: p.decision for p in study.verdicts[: norms - 1]}
    assert decisions.pop("batch") == "better"
    assert set(decisions.values()) <= {"cannot tell"}


# Until decided ---------------------------------------------------------------------------------


def planting(monkeypatch, means, sd=0.005, runs=None):
    """Trials give the means of their norm, with noise by norm and seed, and train nothing."""

    def planted(self, trial):
        if runs is not None:
            runs.append((trial.spec.norm, trial.config.seed))
        norm, seed = trial.spec.norm, trial.config.seed
        noise = np.random.default_rng([len(norm), ord(norm[0]), seed]).normal(0, sd)
        return Row(variant=trial.variant, part="judged", seed=seed, lr=0.1,
                   test_accuracy=means[norm] + noise)  # fmt: skip

    monkeypatch.setattr(Bench, "perform", planted)


def sequential(**options):
    chosen = {"norms": ("none", "batch", "layer"), "batch_sizes": (16,), "seeds": None,
              "until": "decided", "max_seeds": 32, **options}  # fmt: skip
    return small(**chosen)


def test_variants_stop_when_they_are_decided_and_the_others_go_on(monkeypatch):
    planting(monkeypatch, {"none": 0.8, "batch": 0.9, "layer": 0.802})
    study = sequential()
    batch, layer = study.verdicts
    assert batch.decision == "better"
    assert batch.comparison.n < layer.comparison.n <= 32
    counts = {v.label: len(study.of(v.label)) for v in study.variants}
    assert counts == {
        "none/16": layer.comparison.n, "batch/16": batch.comparison.n,
        "layer/16": layer.comparison.n,
    }  # fmt: skip
    assert f"told at {batch.comparison.n} of at most 32 seeds" in batch.sentence


def test_hopeless_variants_are_given_up_and_say_so(monkeypatch):
    planting(monkeypatch, {"none": 0.8, "batch": 0.8, "layer": 0.8})
    study = sequential()
    assert {p.decision for p in study.verdicts} == {"cannot tell"}
    hopeless = [p for p in study.verdicts if p.watched.hopeless]
    assert hopeless
    assert all("given up" in p.sentence and p.comparison.n < 32 for p in hopeless)


def test_a_study_until_decided_goes_on_where_it_stopped_and_ends_the_same(tmp_path, monkeypatch):
    runs = []
    means = {"none": 0.8, "batch": 0.81, "layer": 0.804}
    planting(monkeypatch, means, runs=runs)
    straight = sequential()
    whole = list(runs)

    def stop(told):
        if told.runs == len(whole) // 2:
            raise KeyboardInterrupt

    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        sequential(store=tmp_path / "s.sqlite", observe=stop)
    resumed = sequential(store=tmp_path / "s.sqlite")
    assert resumed.rows == straight.rows
    assert resumed.verdicts == straight.verdicts
    assert sorted(runs) == sorted(whole)


def test_progress_of_a_study_until_decided_never_goes_back(monkeypatch):
    told = []
    planting(monkeypatch, {"none": 0.8, "batch": 0.9, "layer": 0.804})
    study = sequential(observe=told.append)
    assert [t.runs for t in told] == sorted(t.runs for t in told)
    assert told[-1].runs == len(study.rows)
    assert all(t.runs <= t.total_runs <= 96 and t.steps <= t.total_steps for t in told)


def test_a_watched_verdict_claims_no_interval_and_no_p(monkeypatch):
    planting(monkeypatch, {"none": 0.8, "batch": 0.9, "layer": 0.804})
    told = sequential().to_json()["verdicts"][0]
    assert told["n"] >= 2
    assert not {"low", "high", "p", "p_holm", "seeds_needed"} & told.keys()
    assert told["hopeless"] is False


# The command -----------------------------------------------------------------------------------


def quick(**options):
    """Tokens of a command that takes a second."""
    chosen = {
        "data": "iris", "norm": "none,batch", "batch_size": "8,16", "seeds": 2, "epochs": 2,
        "widths": 8, "processes": 0, **options,
    }  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in chosen.items()]
    return ("compare", *(token for pair in pairs for token in pair))


def test_json_is_one_object_with_rows_pairs_and_verdicts(cli, tmp_path):
    code, out, _ = cli(*quick(margin=0.01), "--json")
    told = json.loads(out)
    assert code == 0
    assert len(told["rows"]) == 8
    assert [(p["variant"], p["reference"]) for p in told["verdicts"]] == [
        ("batch/8", "none/8"), ("batch/16", "none/16"),
    ]  # fmt: skip
    assert len(told["pairs"]) == 2
    assert (tmp_path / "study.sqlite").exists()


def test_the_table_has_a_line_for_each_variant_and_verdicts_follow(cli):
    code, out, err = cli(*quick(), "--quiet")
    assert code == 0
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["variant", "n", "mean"]
    assert [line.split()[0] for line in lines[1:5]] == ["none/8", "batch/8", "none/16", "batch/16"]
    assert sum(line.startswith("batch size ") for line in lines) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm": "none,bach"}, "unknown norm 'bach'; choose one of"),
        ({"norm": "none,none"}, "norms must be at least one, and all different"),
        ({"norm": ""}, "norms must be at least one"),
        ({"batch_size": "4,x"}, "batch_size must be integers"),
        ({"batch_size": "0"}, "batch_size must be an integer of at least 1"),
        ({"batch_size": "8,8"}, "batch_size must be at least one, and all different"),
        ({"seeds": "0"}, "seeds must be at least one"),
        ({"lr": "fast"}, "lr must be recipe, tune or a number, got 'fast'"),
        ({"lr": "-1"}, "lr must be a finite number above 0"),
        ({"lr": "tune", "grid": "a"}, "grid must be numbers"),
        ({"lr": "tune", "tuning_seeds": 0}, "one tuning seed"),
        ({"margin": "0"}, "margin must be above 0"),
        ({"metric": "speed"}, "unknown metric 'speed'"),
        ({"data": "nowhere"}, "'nowhere' is neither"),
        ({"model": "convnet"}, "convnet needs images"),
        ({"processes": "-1"}, "processes must be at least 0"),
        ({"out": "report.pdf"}, "--out must end in .html, .md, .csv, .json"),
        ({"store": "."}, "cannot serve as a study's store"),
        ({"engine": "spark"}, "unknown engine 'spark'"),
        ({"seed": "3"}, "--seed"),
        ({"until": "decided", "norm": "batch"}, "until needs two norms at least, got batch"),
        ({"until": "decided", "max_seeds": 1}, "max_seeds must lie in [2, 1000], got 1"),
        ({"until": "decided", "seeds": 65}, "from 2 to max_seeds (64)"),
        ({"until": "done"}, "--until"),
        ({"against": "second"}, "--against"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(cli, options, text):
    code, out, err = cli(*quick(**options))
    assert code == 2
    assert text in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(cli, tmp_path):
    (tmp_path / "notes.txt").write_text("these are notes, " * 100)
    code, _, err = cli(*quick(store="notes.txt"))
    assert code == 2
    assert "notes.txt: cannot serve as a study's store" in err
    assert (tmp_path / "notes.txt").read_text().startswith("these are notes")


def test_values_that_are_several_make_variants(cli):
    tokens = quick(dropout="0,0.5", norm_position="before,after", batch_size=8, seeds=1)
    _, out, _ = cli(*tokens, "--json")
    told = json.loads(out)
    assert [s["variant"] for s in told["summaries"]] == [
        f"{norm}/8/{position}/{dropout}" for position in ("before", "after")
        for dropout in (0.0, 0.5) for norm in ("none", "batch")
    ]  # fmt: skip
    assert all(p["variant"].split("/")[1:] == p["reference"].split("/")[1:] for p in told["pairs"])


# Reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    return small(lr="tune", grid=(0.01, 0.1), tuning_seeds=1, margin=0.01)


def test_the_page_stands_alone_and_says_the_verdicts_first(study, tmp_path):
    report.write(study, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "http-equiv" not in page
    assert "src=" not in page
    assert "<link" not in page
    assert page.index("batch size 16: ") < page.index("<svg")
    assert page.count("<svg") == 2 + 2 + 2
    assert "differences within &plusmn;1 point count as none" in page
    assert "prefers-color-scheme: dark" in page
    assert not [c for c in ("#010203", "#1a2b3", ">nan") if c in page]


def test_csv_has_a_line_for_each_run_and_markdown_the_table(study, tmp_path):
    report.write(study, tmp_path / "r.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert len(rows) == 8 + 8
    assert [float(r["test_accuracy"]) for r in rows[:8]] == [r.test_accuracy for r in study.rows]
    report.write(study, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 4
    assert "- batch size 16: " in text


def test_a_study_of_nothing_but_failures_still_has_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "perform", lambda self, trial: failed(trial, "no <luck>"))
    study = small()
    for name in ("r.html", "r.md", "r.csv", "r.json"):
        report.write(study, tmp_path / name)
    assert "no &lt;luck&gt;" in (tmp_path / "r.html").read_text()
    assert [s.mean for s in study.summaries()] == [None] * 4


@pytest.mark.parametrize(
    ("name", "told"), [("epochs", r"changes=\{'epochs': \.\.\.\}"), ("sedes", "one of against, ")]
)
def test_keywords_that_are_no_fields_of_a_plan_are_told_where_they_go(name, told):
    with pytest.raises(InputError, match=f"compare takes no {name}, got 2; give {told}"):
        truenorm.compare("iris", **{name: 2})
