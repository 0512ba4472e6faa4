"""Tools of torch's that go by exact types or compile the source: they refuse, or see torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.testing import assert_close

import truenorm as tn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")


def images(seed=0):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), tn.BatchNorm2d(4, **options), nn.ReLU())
    model(images() + 1)
    return model


NORMS = [
    tn.BatchNorm2d(4),
    tn.BatchNorm(4),
    tn.LazyBatchNorm2d(),
    tn.GroupNorm(2, 4),
    tn.InstanceNorm2d(4),
    tn.LayerNorm(4),
    tn.RMSNorm(4),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("inside", [False, True])
def test_scripting_says_what_can_be_done_instead(norm, inside):
    model = nn.Sequential(nn.Identity(), nn.Sequential(norm)) if inside else norm
    with pytest.raises(tn.InputError, match=f"script cannot compile {type(norm).__name__}.*export"):
        torch.jit.script(model)
    assert not inside or model[1][0] is norm


def test_what_scripting_says_can_be_done_is_done():
    model = net().eval()
    expected = model(images())
    plain = copy.deepcopy(model)
    assert not tn.convert(plain, to="torch").left
    assert_close(torch.jit.script(plain)(images()), expected)
    assert_close(torch.export.export(model, (images(),)).module()(images()), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantizations_fusing_sees_what_convert_makes_torchs():
    model = net().eval()
    expected = model(images())
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    tn.convert(model, to="torch")
    fused = fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_close(fused(images()), expected)
    trained = fuse_modules_qat(copy.deepcopy(model).train(), [["0", "1", "2"]])
    assert_close(trained.eval()(images()), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")  # torch's own
def test_quantization_aware_training_by_fx_sees_what_convert_makes_torchs():
    """Ours are passed by: in the graph they stand beside the convolution, not in it."""
    norms = []
    for convert in (False, True):
        model = net().train()
        if convert:
            tn.convert(model, to="torch")
        prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (images(),))
        names = [n for n, m in prepared.named_modules() if isinstance(m, nn.BatchNorm2d)]
        norms.append(names)
    assert norms == [["1"], ["0.bn"]]
