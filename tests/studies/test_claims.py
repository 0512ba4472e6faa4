from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from truenorm import InputError, ModelSpec, build
from truenorm.cli import main
from truenorm.report import claims as report
from truenorm.studies.claims.catalogue import CLAIMS, how_busy
from truenorm.studies.claims.claim import Part, answer_of, judge_parts
from truenorm.studies.claims.testing import claims

TINY = {
    name: dataclasses.replace(c.quick, seeds=2, examples=120, epochs=1, tuning=1)
    for name, c in CLAIMS.items()
}  # a study each, too small for any answer but "cannot tell"


def images():
    """Sixteen-pixel images of three classes, each brighter somewhere else."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = rng.normal(size=(300, 1, 16, 16)).astype(np.float32)
    x[np.arange(300), 0, 4 * y] += 2
    return x, y


def part(difference, noise=0.1, n=8, **options):
    rng = np.random.default_rng(1)
    b = rng.normal(size=n)
    a = b + difference + noise * rng.normal(size=n)
    return Part("a", "b", list(a), list(b), 1.0, **options)


@pytest.mark.parametrize(
    ("difference", "options", "answer"),
    [
        (3, {}, "supported"),
        (-3, {}, "refuted"),
        (0, {}, "refuted"),  # equivalent within the margin is no gain
        (0, {"noise": 5}, "cannot tell"),
        (-3, {"higher_is_better": False}, "supported"),
        (3, {"higher_is_better": False}, "refuted"),
        (-3, {"expects": ("worse",)}, "supported"),
        (0, {"expects": ("better", "equivalent")}, "supported"),
        (3, {"n": 3}, "cannot tell"),
    ],
)
def test_a_planted_difference_gives_its_answer(difference, options, answer):
    assert judge_parts([part(difference, **options)])[0].answer == answer


def test_a_claim_is_supported_if_all_parts_are_and_refuted_if_any_is():
    yes, no, open_ = "supported", "refuted", "cannot tell"
    assert answer_of([yes, yes]) == yes
    assert answer_of([yes, no, open_]) == no
    assert answer_of([yes, open_]) == open_
    assert answer_of([]) == open_


def test_parts_of_different_units_are_one_family_and_keep_their_units():
    small = part(3)
    scaled = dataclasses.replace(
        small, scores_a=[v / 100 for v in small.scores_a],
        scores_b=[v / 100 for v in small.scores_b], margin=0.01,
    )  # fmt: skip
    one, two = judge_parts([small, scaled])
    assert one.comparison.family == two.comparison.family == 2
    assert two.comparison.p_holm == one.comparison.p_holm == pytest.approx(2 * 2 / 2**8)
    assert two.comparison.difference == pytest.approx(one.comparison.difference / 100)
    assert two.comparison.margin == 0.01


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_runs_from_end_to_end_and_again_from_the_store(name, tmp_path):
    options = {"data": images(), "sizes": TINY, "processes": 0, "store": tmp_path / "s.sqlite"}
    first = claims([name], **options).findings[0]
    assert first.verdict == "cannot tell"  # two seeds can show nothing
    assert not [row.error for row in first.rows if row.error]
    ran = []
    again = claims([name], observe=lambda told: ran.append(told.row), **options).findings[0]
    assert not [row for row in ran if row is not None]
    assert again.rows == first.rows
    assert report.scores(first.plot).startswith("<svg")


def test_json_has_rows_pairs_and_verdicts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["claims", "init", "--data", "digits", "--quick", "--seeds", "1", "--processes", "0",
              "--json", "--out", "c.html"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    claim = told["claims"][0]
    assert claim["verdict"] == "cannot tell"
    assert len(claim["rows"]) == 8  # two norms at four scales
    assert (claim["pairs"][0]["a"], claim["pairs"][0]["b"]) == ("batch", "none")
    assert "1 seeds instead of 12" in claim["gave_up"]
    assert "cannot tell" in (tmp_path / "c.html").read_text("utf-8")


def test_rows_of_numbers_leave_out_claims_on_images_and_say_so(capsys):
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(120, 4)).astype(np.float32), np.arange(120) % 3)
    found = claims(data=rows, sizes=TINY, processes=0)
    assert {f.claim.name for f in found.findings} | found.left.keys() == set(CLAIMS)
    assert found.left["cnn"] == "needs images, got rows of 4 numbers"
    assert not [row.error for f in found.findings for row in f.rows if row.error]
    report.left_out(found)
    assert "cnn: left out, needs images" in capsys.readouterr().out
    with pytest.raises(InputError, match="cnn needs images, got rows of 4 numbers"):
        claims(["cnn"], data=rows)


def test_an_unknown_claim_is_refused():
    with pytest.raises(InputError, match="claim"):
        claims(["slower"])


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "transformer"])
def test_init_scale_multiplies_weights_and_nothing_else(name):
    one = build(ModelSpec(name=name), (1, 12, 12), 3, seed=1)
    ten = build(ModelSpec(name=name, init_scale=8.0), (1, 12, 12), 3, seed=1)
    scaled = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    for (key, a), b in zip(one.named_parameters(), ten.parameters(), strict=True):
        owner = one.get_submodule(key.rpartition(".")[0])
        weights = isinstance(owner, scaled) and key.endswith("weight")
        assert torch.equal(b, 8 * a if weights else a), key


def test_norm_momentum_reaches_every_batch_norm():
    for norm in ("batch", "renorm", "ghost"):
        model = build(ModelSpec(norm=norm, norm_momentum=0.01), (6,), 3, seed=0)
        assert [m.momentum for m in model.modules() if hasattr(m, "running_var")] == [0.01]


def test_specs_stored_before_the_new_fields_load_and_keep_their_digest():
    stored = {"name": "mlp", "norm": "batch", "norm_position": "before", "widths": [8],
              "dropout": 0.0}  # fmt: skip
    spec = ModelSpec.from_json(stored)
    assert spec == ModelSpec(widths=(8,))
    assert set(spec.to_json()) == set(stored)
    changed = ModelSpec(init_scale=2.0, norm_momentum=0.5)
    assert ModelSpec.from_json(changed.to_json()) == changed


@pytest.mark.parametrize(
    ("away", "said"), [([0.0, 0.1], ""), ([math.nan], ""), ([], ""), ([0.1, 0.63], "up to 63%")]
)
def test_a_claim_of_times_says_that_the_machine_was_busy(away, said):
    note = how_busy(away)
    assert bool(note) == bool(said)
    assert said in note
