"""Architectures in real use: trained, they must be called healthy, and be left as they were."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import numpy as np
import pytest
import torch

import truenorm as tn
import zoo
from truenorm.doctor.diagnosis import Diagnosis

BATCHES = 4  # the fewest by which distributions can be compared

# What is said of them and is not true.
FALSE_ALARMS: dict[str, set[str]] = {
    # Four batches of 8 clips: exact statistics of so few are off by chance as far as TN103 warns
    # of where only answers, not accuracy, tell of harm.
    "video": {"TN103"},
    "mobilevit segmentation": {"TN103"},  # likewise, of batches of 6
}


def traces(model: torch.nn.Module) -> dict[str, Any]:
    """All that an examination must give back."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
        ],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }  # fmt: skip


@functools.cache
def examined(name: str) -> tuple[Diagnosis, dict[str, Any], dict[str, Any]]:
    """The diagnosis of a trained one, and its traces before and after."""
    model, data = zoo.trained(name), zoo.batches(name, BATCHES)
    before = traces(model)
    diagnosis = tn.examine(model, data)
    return diagnosis, before, traces(model)


def _marked(name: str) -> Any:
    marks = [pytest.mark.zoo] * (name not in zoo.FEW)
    return pytest.param(name, marks=marks)


EVERY = [_marked(name) for name in zoo.NAMES]


@pytest.mark.parametrize("name", EVERY)
def test_a_trained_architecture_is_called_healthy(name):
    diagnosis = examined(name)[0]
    found = {f.code for f in diagnosis.findings if f.severity != "note"}
    excused = zoo.EXPECTED.get(name, set()) | FALSE_ALARMS.get(name, set())
    assert found <= excused, str(diagnosis)


@pytest.mark.parametrize("name", EVERY)
def test_an_examination_leaves_an_architecture_as_it_was(name):
    _, before, after = examined(name)
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key]), key
    for what in before.keys() - {"state"}:
        assert before[what] == after[what], what


@pytest.mark.parametrize("name", ["bert", "resnet", "wav2vec2 conformer"])
def test_a_model_that_returns_its_loss_first_is_examined(name):
    diagnosis = tn.examine(zoo.trained(name), zoo.batches(name, BATCHES))
    assert diagnosis.healthy, str(diagnosis)


@pytest.mark.parametrize("name", EVERY)
def test_an_architecture_has_as_many_batch_norms_as_are_noted(name):
    assert len(zoo.batch_norms(zoo.build(name))) == zoo.ZOO[name].norms


def test_random_statistics_change_the_answers_and_are_those_of_the_seed():
    model, (x, _) = zoo.build("torchvision resnet").eval(), zoo.batches("torchvision resnet")[0]
    plain = model(x)
    changed = zoo.with_random_statistics(copy.deepcopy(model), 1)(x)
    again = zoo.with_random_statistics(copy.deepcopy(model), 1)(x)
    assert torch.isfinite(changed).all()
    assert not torch.allclose(plain, changed, atol=0.1)
    assert torch.equal(changed, again)
