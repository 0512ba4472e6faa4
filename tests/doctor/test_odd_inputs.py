"""What examine makes of models and data that are out of the ordinary: a diagnosis, or one error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truenorm as tn
import zoo
from truenorm.doctor.checks.catalogue import CHECKS
from truenorm.doctor.diagnosis import Diagnosis

NAMES = ("resnet", "segresnet", "torchvision resnet", "pointnet", "bert", "byol", "table")
FLOAT_INPUTS = ("resnet", "segresnet", "torchvision resnet", "unet", "monai densenet")


def bits(model: nn.Module) -> list[Any]:
    """Every tensor by identity and by value, every mode, every hook."""
    made: list[Any] = []
    for module in model.modules():
        made += [type(module), module.training, len(module._forward_hooks)]
        made.append(len(module._forward_pre_hooks))
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            there = t is not None and not t.is_meta and not nn.parameter.is_lazy(t)
            made += [name, id(t), str(getattr(t, "dtype", None))]
            made.append(t.detach().clone().view(-1).view(torch.uint8).tolist() if there else None)
    return made


def outcome(model: nn.Module, data: Any, **given: Any) -> Diagnosis | tn.InputError:
    """The diagnosis or the error, of a model that is left bit for bit."""
    before, state = bits(model), torch.get_rng_state()
    result: Diagnosis | tn.InputError
    try:
        result = tn.examine(model, data, **given)
    except tn.InputError as error:
        result = error
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(result, Diagnosis):
        assert all(skipped.why for skipped in result.skipped)
        told = {f.code for f in result.findings} | {s.code for s in result.skipped}
        assert told | set(result.passed) == {check.code for check in CHECKS}
    return result


def diagnosis(model: nn.Module, data: Any, **given: Any) -> Diagnosis:
    made = outcome(model, data, **given)
    assert isinstance(made, Diagnosis), made
    return made


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    return tuple(cast(v, dtype) for v in value)


def given(name: str) -> dict[str, Any]:
    return {"arguments": zoo.arguments_of(name)}


@pytest.mark.parametrize("name", FLOAT_INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_trained_model_is_healthy_in_another_precision(name, dtype):
    data = [cast(batch, dtype) for batch in zoo.batches(name, 4)]
    found = diagnosis(zoo.trained(name).to(dtype), data, **given(name))
    assert found.healthy, str(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_was_never_trained_has_no_fault(name):
    found = diagnosis(zoo.build(name), zoo.batches(name, 4), **given(name))
    assert found.healthy, str(found)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_dataset_is_refused(name):
    for empty in ([], iter(()), torch.utils.data.DataLoader([])):
        error = outcome(zoo.trained(name), empty)
        assert isinstance(error, tn.InputError)
        assert "no batch" in str(error)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_what_the_forward_does_not_take_is_dropped_from_a_batch(name):
    data = [batch | {"path": "a.png", "index": 3} for batch in zoo.batches(name, 4)]
    assert diagnosis(zoo.trained(name), data, **given(name)).healthy


def test_a_batch_with_nothing_that_the_model_takes_is_refused():
    error = outcome(zoo.trained("regressor"), [{"picture": torch.zeros(2, 1, 32, 32)}])
    assert isinstance(error, tn.InputError)
    assert "arguments=" in str(error)


def test_a_model_output_is_read_by_the_name_of_its_scores():
    found = diagnosis(zoo.trained("resnet"), zoo.batches("resnet", 4), **given("resnet"))
    assert "TN103" in found.passed
    assert "TN304" in found.passed


@pytest.mark.parametrize("with_data", [False, True])
def test_a_model_without_a_norm_has_nothing_to_find(with_data):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    data = [torch.randn(8, 6) for _ in range(4)] if with_data else None
    found = diagnosis(model, data)
    assert not found.findings
    assert found.layers == 0
    assert {s.code: s.why for s in found.skipped}["TN101"].startswith("no batch norm")


@pytest.mark.parametrize("name", ["resnet", "segresnet", "torchvision resnet"])
@pytest.mark.parametrize("with_data", [False, True])
def test_a_model_on_the_meta_device_is_refused(name, with_data):
    model = zoo.build(name).to("meta")
    error = outcome(model, zoo.batches(name, 4) if with_data else None, **given(name))
    assert isinstance(error, tn.InputError), str(error)
    assert "meta" in str(error)


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


@pytest.mark.parametrize("with_data", [False, True])
def test_a_lazy_model_is_examined_and_stays_lazy(with_data):
    model = lazy()
    diagnosis(model, zoo.batches("torchvision resnet", 4) if with_data else None)
    assert isinstance(model[1], nn.LazyBatchNorm2d)
    model(zoo.batches("torchvision resnet", 1)[0][0])
    assert diagnosis(model, zoo.batches("torchvision resnet", 4)).layers == 1
