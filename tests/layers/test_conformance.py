"""The quick part of ``make conformance``: what takes a second or a few of the suites of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import truenorm
from conformance import (
    apex,
    cases,
    detectron2,
    equinox,
    flax,
    fvcore,
    keras,
    torch_modules,
    torch_nn,
    torch_ops,
    torch_systems,
)
from conformance.expected import BY_DESIGN, OPEN
from conformance.suites import SUITES

QUICK = {
    # Of derivatives the tests of torch's cases have their own.
    torch_modules.SUITE: lambda: torch_modules.cases(
        torch_modules.BATCH, without=torch_modules.DERIVATIVES
    ),
    torch_ops.SUITE: torch_ops.cases,
    torch_ops.OPCHECK: torch_ops.operators,
    torch_nn.SUITE: torch_nn.cases,
    torch_systems.SUITE: lambda: torch_systems.cases(slow=False),
    keras.SUITE: keras.cases,
    flax.SUITE: flax.cases,
    equinox.SUITE: equinox.cases,
    fvcore.SUITE: fvcore.cases,
    detectron2.SUITE: detectron2.cases,
    apex.SUITE: apex.cases,
}


def said(outcomes):
    return "\n".join(f"{it.case.name}: {it.reason}" for it in outcomes)


@pytest.mark.parametrize("suite", QUICK)
def test_layers_are_what_others_test_theirs_for(suite):
    outcomes = cases.run(QUICK[suite](), BY_DESIGN)
    assert {it.case.suite for it in outcomes} == {suite}
    failed = [it for it in outcomes if it.state == "failed"]
    wrong = [it for it in failed if not any(fault.fits(it.case) for fault in OPEN)]
    assert not wrong, said(wrong)
    mended = [e.pattern for e in (*BY_DESIGN, *OPEN) if states(e, outcomes) == {"passed"}]
    assert not mended, f"all of these pass: delete {mended} from expected.py"


def states(expected, outcomes):
    """Of the cases that are expected to fail."""
    return {it.state for it in outcomes if expected.fits(it.case)}


class Biased(truenorm.BatchNorm2d):
    """Tracks the biased variance, as some frameworks do."""

    def forward(self, input, *args, **kwargs):
        before = None if self.running_var is None else self.running_var.clone()
        out = super().forward(input, *args, **kwargs)
        count = input.numel() // max(1, input.shape[1])
        if before is not None and count:
            share = (count - 1) / count
            self.running_var.copy_(before + (self.running_var - before) * share)
        return out


@pytest.mark.parametrize(
    ("suite", "fails"),
    [
        (torch_nn, "BatchNorm / momentum / 2D"),
        (torch_modules, "BatchNorm2d / torch's numbers / momentum, training"),
    ],
)
def test_another_layer_in_their_place_fails(suite, fails, monkeypatch):
    monkeypatch.setattr(truenorm, "BatchNorm2d", Biased)
    found = {it.name: it for it in suite.cases() if it.name == fails}
    assert cases.outcome(found[fails]).state == "failed"


def test_a_case_that_torchs_layer_fails_too_is_told_apart():
    def fail():
        raise cases.Wanting("so it is")

    case = cases.Case("suite", "layer", "check", "example", fail, fail)
    assert cases.outcome(case) == cases.Outcome(case, "torch's, too", "so it is")
    design = cases.ByDesign("suite", "layer / .*", "it is meant so")
    assert cases.outcome(case, [design]) == cases.Outcome(case, "by design", "it is meant so")
    assert not list(cases.unused([design], [cases.outcome(case, [design])]))
    assert list(cases.unused([design], [cases.outcome(case)])) == [design]


def test_a_warning_is_a_failure_and_draws_are_always_the_same():
    drawn = []

    def warn():
        drawn.append(torch.rand(2))
        truenorm.BatchNorm1d(2)(torch.full((3, 2), float("nan")))

    case = cases.Case("suite", "layer", "check", "", warn)
    outcomes = [cases.outcome(case) for _ in range(2)]
    assert "non-finite" in outcomes[0].reason
    assert torch.equal(*drawn)


def test_reasons_name_no_folder_address_or_port():
    text = 'File "/home/me/x/norms.py", pair.cc: [127.0.0.1]:3703 at 0x7f, a / b, channels/groups'
    assert cases.scrubbed(text) == (
        'File "norms.py", pair.cc: [... at 0x..., a / b, channels/groups'
    )


def test_the_page_has_every_suite():
    page = Path(__file__).parents[2] / "docs" / "conformance.md"
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if "|" in line]
    assert [suite.name for suite in SUITES] == [row for row in rows if row][2:-1]
