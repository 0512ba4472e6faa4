"""What changes nothing about a model's health changes no verdict."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import patients
import truenorm as tn
from patients import HEALTHY, PATIENTS, batches


def patient(code, which):
    def make():
        ill = PATIENTS[code][which](code)
        return ill.model, ill.data or batches(ill.name)

    return make


def untracked_in_training():
    model, data = patient("TN304", 2)()
    return model.train(), data


MODELS = {
    "shifted statistics": patient("TN103", 5),
    "no statistics": untracked_in_training,
    "a layer in the wrong mode": patient("TN201", 2),
    "not finite": patient("TN102", 2),
    "mixed batches": patient("TN305", 0),
    "healthy": HEALTHY["trained resnet"],
    "healthy in training": HEALTHY["trained convnet in train mode"],
}
PREFIXES = ("module.", "_orig_mod.", "zz.")


def verdicts(model, data, *, without=()):
    """(code, severity, layer) of all findings; the layer by its name inside of wrappers."""
    found = []
    for finding in tn.examine(model, data).findings:
        layer = finding.layer
        assert layer is None or layer in dict(model.named_modules())
        for prefix in PREFIXES:
            layer = layer and layer.removeprefix(prefix)
        found.append((finding.code, finding.severity, layer))
    return sorted((row for row in found if row[0] not in without), key=str)


class Zz(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.zz = inner
        self.training = inner.training

    def forward(self, x):
        return self.zz(x)


class Same(nn.Module):
    def forward(self, weight):
        return weight * 1.0


def parametrized(model):
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    parametrize.register_parametrization(first, "weight", Same())
    return model


def parallel(model):
    wrapped = nn.DataParallel(model)
    assert wrapped.training  # whatever the model's mode
    return wrapped


WAYS = {
    "renamed": Zz,
    "DataParallel": parallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "parametrized": parametrized,
}


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_changes_no_verdict(name, way):
    model, data = MODELS[name]()
    expected = verdicts(copy.deepcopy(model), data)
    assert verdicts(WAYS[way](model), data) == expected


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_changes_no_verdict(name, alone):
    model, data = MODELS[name]()
    expected = verdicts(copy.deepcopy(model), data)
    assert verdicts(DistributedDataParallel(model), data) == expected
    why = {s.code: s.why for s in tn.examine(model, data).skipped}
    assert why["TN501"] == "one process, on one device"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_changes_no_verdict(name, dtype):
    model, data = MODELS[name]()
    without = {"TN105"} if dtype == torch.bfloat16 else ()  # which is about it
    if dtype == torch.bfloat16 and name == "no statistics":
        without |= {"TN304"}  # the difference drowns in rounding; TN205 stays
    expected = verdicts(copy.deepcopy(model), data, without=without)
    data = [(x.to(dtype), y) for x, y in data]
    assert verdicts(model.to(dtype), data, without=without) == expected


def test_the_models_tell_verdicts_apart():
    codes = {name: {row[0] for row in verdicts(*make())} for name, make in MODELS.items()}
    assert "TN103" in codes["shifted statistics"]
    assert codes["no statistics"] >= {"TN205", "TN304"}
    assert "TN201" in codes["a layer in the wrong mode"]
    assert "TN102" in codes["not finite"]
    assert "TN305" in codes["mixed batches"]


def test_under_data_parallel_values_are_counted_by_device():
    images = batches("mlp", size=96)
    assert not tn.examine(patients.on_devices(patients.trained("mlp"), 1).train(), images).of(
        "TN501"
    )
    found = tn.examine(patients.on_devices(patients.trained("mlp"), 2).train(), images).of("TN501")
    assert [f.severity for f in found] == ["warning"] * 2
    assert found[0].evidence == {"devices": 2, "values per channel on a device": 48}
    assert "DistributedDataParallel" in found[0].advice
    model = patients.on_devices(patients.trained("mlp"), 2).eval()
    assert {f.severity for f in tn.examine(model, images).of("TN501")} == {"note"}
