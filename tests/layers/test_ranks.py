from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ranks
import reference
import truenorm as tn
from ranks import CASES
from truenorm.layers import functional

DEADLOCK = 120  # seconds; the process groups give up far sooner
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
TOLERANCE = {torch.float64: TIGHT, torch.float32: {"rtol": 1e-5, "atol": 2e-5}}

# How the ranks' shares are put together.
JOINED = ("out", "grad", "second")
SUMMED = ("grad affine", "second affine")
STATISTICS = ("mean", "var", "n")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What each rank of each world gave: (world, rank) -> name of the case -> quantities."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, ranks.__file__, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, timeout=DEADLOCK, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)  # pytest shows it where a test fails
    return {
        (world, rank): torch.load(file)
        for world in ranks.WORLDS
        for rank in range(world)
        if (file := folder / f"{world}-{rank}.pt").exists()
    }


def of_ranks(given, world, name):
    """What the case gave on each rank of ``world``."""
    found = [given.get((world, rank), {}).get(name, "has ended before") for rank in range(world)]
    wrong = [f"rank {rank}: {it}" for rank, it in enumerate(found) if isinstance(it, str)]
    assert not wrong, "\n".join(wrong)
    return found


def pools(case):
    """The ranks that pool with each other."""
    return case.groups or (tuple(range(len(case.counts))),)


def compare(case, found, layer):
    """Hold what the ranks gave against ``layer``, made for each pool, on the joined batch."""
    for members in pools(case):
        alone = ranks.observed(layer(), case, members)
        for key, steps in alone.items():
            for step, expected in enumerate(steps):
                parts = [found[rank][key][step] for rank in members]
                if key in JOINED:
                    parts = [torch.cat(parts)]
                elif key in SUMMED:
                    parts = [sum(parts)]
                for part in parts:
                    where = f"{key}, step {step}, ranks {members}"
                    assert_close(
                        part, expected, **TOLERANCE[case.dtype], msg=f"{where}: {{}}".format
                    )


# -- every case ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does_on_the_joined_batch(name, given):
    case = CASES[name]
    compare(case, of_ranks(given, len(case.counts), name), lambda: ranks.layer_of(case))


@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case.plain and n != "all ranks empty"]
)
def test_without_options_they_compute_what_torchs_layer_does_on_the_joined_batch(name, given):
    case = replace(CASES[name], recomputed=False)  # torch's layer would track it twice
    found = of_ranks(given, len(case.counts), name)
    compare(case, found, lambda: ranks.layer_of(case, ours=False))


def slow(case, layer):
    options = {k: v for k, v in case.options.items() if k in ("momentum", "ghost", "min_count")}
    made = reference.BatchNorm(ranks.CHANNELS, **options)
    made.mean, made.var = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    return made


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in CASES.items()
        if case.options.get("commit") is None and case.dtype == torch.float64
    ],
)
def test_outputs_and_statistics_are_those_of_the_reference(name, given):
    case = CASES[name]
    layer = ranks.layer_of(case)
    found = of_ranks(given, len(case.counts), name)
    renorm = case.options.get("renorm")
    for members in pools(case):
        numpy = slow(case, layer)
        for step, (x, _, mask) in enumerate(ranks.batches(case, members)):
            if renorm is not None:  # its schedule ends after one batch
                numpy.renorm = (renorm.rmax, renorm.dmax) if numpy.batches else (1.0, 0.0)
            valid = None if mask is None else functional.valid(mask, x).expand(x.shape).numpy()
            expected = numpy.forward(x.numpy(), valid)
            if layer.weight is not None:
                channels = (-1, *(1,) * len(case.positions))
                weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
                expected = expected * weight.reshape(channels) + bias.reshape(channels)
            expected = expected if valid is None else np.where(valid, expected, 0)
            out = torch.cat([found[rank]["out"][step] for rank in members])
            assert_close(out, torch.from_numpy(expected), **TIGHT)
            for rank in members:
                assert_close(found[rank]["mean"][step], torch.from_numpy(numpy.mean), **TIGHT)
                assert_close(found[rank]["var"][step], torch.from_numpy(numpy.var), **TIGHT)
                assert int(found[rank]["n"][step]) == numpy.batches


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_equal_to_the_bit_on_all_ranks(name, given):
    case = CASES[name]
    found = of_ranks(given, len(case.counts), name)
    for first, *others in pools(case):
        for key in STATISTICS:
            for other in others:
                for mine, theirs in zip(found[first][key], found[other][key], strict=True):
                    assert torch.equal(mine, theirs)


def test_the_cases_have_gradients_of_both_orders_that_are_not_nearly_zero():
    case = CASES["unequal counts"]
    alone = ranks.observed(ranks.layer_of(case), case, (0, 1, 2))
    for key in (*JOINED, *SUMMED):
        assert all((part.abs() > 1e-3).float().mean() > 0.4 for part in alone[key]), key


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "commit" in case.options])
def test_statistics_move_at_the_commit_and_not_before(name, given):
    for found in of_ranks(given, len(CASES[name].counts), name):
        *before, after = found["mean"]
        assert all(torch.equal(mean, before[0]) for mean in before)
        assert not torch.equal(after, before[0])
        assert [int(n) for n in found["n"]] == [0, 0, 1]


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, c in CASES.items()
        if "commit" in c.options and not (c.masked or "ghost" in c.options)
    ],
)
def test_committed_statistics_are_those_of_the_micro_batches_as_one(name, given):
    case = CASES[name]
    found = of_ranks(given, len(case.counts), name)
    numpy = slow(case, ranks.layer_of(case))
    batches = [x for x, _, _ in ranks.batches(case, pools(case)[0])]
    numpy.forward(torch.cat(batches).numpy())
    for rank in found:
        assert_close(rank["mean"][-1], torch.from_numpy(numpy.mean), **TIGHT)
        assert_close(rank["var"][-1], torch.from_numpy(numpy.var), **TIGHT)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.recomputed])
def test_a_batch_recomputed_in_the_backward_pass_is_tracked_once(name, given):
    for found in of_ranks(given, len(CASES[name].counts), name):
        assert [int(n) for n in found["n"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "sizes"), [("one value is left", (2, 3)), ("more are left", (2, 2, 1))]
)
def test_ranks_of_other_positions_agree_on_the_ghosts(name, sizes, given):
    found = [rank[name] for rank in of_ranks(given, 2, "unlike positions")]
    examples = [
        (e.numpy(), out.numpy()) for f in found for e, out in zip(f["x"], f["out"], strict=True)
    ]
    for size in sizes:
        group, examples = examples[:size], examples[size:]
        values, outs = (np.concatenate(part, axis=1) for part in zip(*group, strict=True))
        centred = values - values.mean(1, keepdims=True)
        exact = centred / np.sqrt(values.var(1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(outs, exact, rtol=1e-10, atol=1e-10)
    assert not examples
    assert torch.equal(found[0]["var"], found[1]["var"])


def test_a_rank_outside_of_the_group_normalizes_by_itself(given):
    case = ranks.Case((3, 2, 4), groups=((0, 1), (2,)))
    compare(case, of_ranks(given, 3, "outsider"), lambda: ranks.layer_of(case))


# -- what torch gets wrong or refuses ------------------------------------------------------------


def test_torchs_sync_batch_norm_refuses_these_ranks(given):
    for found in of_ranks(given, 2, "torch's sync"):
        assert "SyncBatchNorm expected input tensor to be on GPU" in found["raised"]


def test_a_mean_of_1e4_costs_no_precision_over_ranks(given):
    found = of_ranks(given, 3, "far from zero")
    x = torch.cat([rank["x"] for rank in found]).double().transpose(0, 1).flatten(1)
    exact = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    out = torch.cat([rank["out"] for rank in found]).double().transpose(0, 1).flatten(1)
    for rank in found:
        assert_close(rank["var"].double(), x.var(1), rtol=1e-2, atol=0)
        assert_close(rank["mean"].double(), x.mean(1), rtol=1e-7, atol=0)
    assert (out - exact).abs().max() < 0.02  # half a unit in the last place of 1e4, over 0.1


# -- faults --------------------------------------------------------------------------------------


def test_one_value_over_all_ranks_is_refused_on_all_of_them(given):
    for found in of_ranks(given, 2, "one value in all"):
        assert found["raised"].startswith("InputError")
        assert found["n"] == 0


def test_a_value_that_is_not_finite_on_one_rank_leaves_the_statistics_of_all_alone(given):
    for found in of_ranks(given, 2, "not finite on one"):
        assert found == {"kept": True, "skipped": 1, "n": 0}


# -- models --------------------------------------------------------------------------------------


def test_evaluation_waits_for_no_other_rank(given):
    plain, other, frozen = of_ranks(given, 2, "evaluated alone")[0]["out"]
    layer = ranks.begun(nn.BatchNorm1d(ranks.CHANNELS, dtype=torch.float64)).eval()
    x = torch.linspace(-1, 1, 4 * ranks.CHANNELS, dtype=torch.float64).view(4, ranks.CHANNELS)
    for out in (plain, other, frozen):
        assert_close(out, layer(x).detach())


def test_evaluation_in_data_parallel_waits_for_no_other_rank_either(given):
    assert all(found["done"] for found in of_ranks(given, 2, "evaluated alone in data parallel"))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, tn.BatchNorm1d])
def test_data_parallel_training_is_training_in_one_process(norm, given):
    model = ranks.net(norm)
    ranks.trained(model, (0, 1, 2))
    start = ranks.net(norm).state_dict()
    expected = model.state_dict()
    for found in of_ranks(given, 3, "data parallel"):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value, **TIGHT)
            if name != "4.bias":  # in front of a norm it has no gradient but rounding
                assert not torch.equal(found[name], start[name])
