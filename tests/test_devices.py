"""What the layers, the fold, the recalibration, the doctor and the loop promise, on each device.

On a machine without a GPU that is the processor alone.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import reference
import truenorm as tn
from foldable import images, lively, resnet
from samples import blobs
from truenorm.data.datasets import Splits, dataset

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS = [
    {},
    {"ghost": 4},
    {"momentum": None},
    {"min_count": 3},
    {"act": "silu"},
    {"affine": False},
    {"ghost": 3, "min_count": 2},
]


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def full_precision():
    """float32 is float32: no TF32 in convolutions."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def drawn(*shape, device, seed=0, mean=0.0, std=1.0, dtype=torch.float32, rows=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x * std + mean).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if rows else x


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("rows", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_follows_the_reference(device, options, rows):
    layer = tn.BatchNorm2d(5, device=device, **options)
    kept = {k: v for k, v in options.items() if k in {"momentum", "ghost", "min_count"}}
    slow = reference.BatchNorm(5, **kept)
    for step in range(3):
        x = drawn(10, 5, 6, 4, device=device, seed=step, mean=2, std=3, rows=rows)
        expected = slow.forward(x.double().cpu().numpy())
        if layer.act:
            expected = silu(expected)
        assert_close(layer(x).detach().double().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert_close(layer.running_mean.double().cpu().numpy(), slow.mean, rtol=1e-5, atol=1e-5)
    assert_close(layer.running_var.double().cpu().numpy(), slow.var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", ["examples", "positions"])
def test_a_mask_follows_the_reference(device, masked):
    layer, slow = tn.BatchNorm2d(3, device=device), reference.BatchNorm(3)
    x = drawn(8, 3, 5, 4, device=device, mean=100)
    mask = drawn(8, *((5, 4) if masked == "positions" else ()), device=device, seed=1) > -0.5
    cells = mask.cpu().numpy()[:, None] if masked == "positions" else mask.cpu().numpy()
    cells = cells.reshape(8, 1, *((5, 4) if masked == "positions" else (1, 1)))
    expected = slow.forward(x.double().cpu().numpy(), cells)
    assert_close(layer(x, mask).detach().double().cpu().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert_close(layer.running_var.double().cpu().numpy(), slow.var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((4096, 8), False),
        ((32, 4, 32, 32), False),
        ((32, 4, 32, 32), True),
        ((64, 8, 16, 16), True),
    ],
    ids=str,
)
@pytest.mark.parametrize(("mean", "std"), [(1e4, 0.1), (1e6, 1.0), (0.0, 1.0)])
def test_large_means_cost_the_statistics_no_precision(device, shape, rows, mean, std):
    kind = tn.BatchNorm1d if len(shape) == 2 else tn.BatchNorm2d
    layer = kind(shape[1], momentum=1.0, device=device)
    x = drawn(*shape, device=device, mean=mean, std=std, rows=rows)
    layer(x)
    exact = x.double().movedim(1, 0).flatten(1)
    rtol = 1e-3 if device.type == "cpu" else 2e-2  # on a GPU it is torch's kernel
    assert_close(layer.running_var.double(), exact.var(1), rtol=rtol, atol=0)
    assert_close(layer.running_mean.double(), exact.mean(1), rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_are_those_of_float64_to_its_precision(device, dtype):
    layer = tn.BatchNorm2d(4, device=device)
    wide = copy.deepcopy(layer).double()
    x = drawn(6, 4, 5, 5, device=device, dtype=dtype, mean=1).requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = drawn(6, 4, 5, 5, device=device, seed=1, dtype=dtype)
    layer(x).backward(grad)
    wide(exact).backward(grad.double())
    assert_close(x.grad.double(), exact.grad, rtol=3e-2, atol=3e-2)
    assert_close(layer.weight.grad.double(), wide.weight.grad, rtol=3e-2, atol=3e-2)


def test_a_batch_that_is_not_finite_is_left_out_and_counted(device):
    layer = tn.BatchNorm2d(3, device=device)
    layer(drawn(4, 3, 5, 5, device=device))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    poisoned = drawn(4, 3, 5, 5, device=device)
    poisoned[1, 2, 0, 0] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(poisoned)
    assert layer.skipped_batches == 1
    for key, value in layer.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own
@pytest.mark.parametrize("options", [{}, {"ghost": 2}, {"act": "relu"}], ids=str)
def test_compiled_without_a_break_it_is_the_same_layer(device, options):
    torch.compiler.reset()
    layer = tn.BatchNorm2d(4, device=device, **options)
    eager = copy.deepcopy(layer)
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # no compiler is needed there
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for step in range(2):
        x = drawn(8, 4, 6, 6, device=device, seed=step, mean=5)
        assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
    assert_close(layer.running_var, eager.running_var, rtol=1e-4, atol=1e-5)


def test_a_step_that_the_scaler_skips_leaves_the_statistics_alone(device):
    model = nn.Sequential(nn.Linear(6, 5), tn.BatchNorm1d(5, commit="step"), nn.Linear(5, 1))
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tn.attach(optimizer, model)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0, growth_interval=1)
    for broken in (False, True):
        optimizer.zero_grad()
        loss = model(drawn(16, 6, device=device)).square().mean()
        scaler.scale(loss * (float("inf") if broken else 1.0)).backward()
        before = model[1].running_mean.clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[1].running_mean, before) == broken


@GPU
def test_a_training_step_can_be_captured_and_replayed():
    layer = tn.BatchNorm2d(4, device="cuda")
    eager = copy.deepcopy(layer)
    x = drawn(8, 4, 6, 6, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copy.deepcopy(layer)(x)  # the first call chooses kernels, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        out = layer(given)
    for step in range(3):
        given.copy_(drawn(8, 4, 6, 6, device="cuda", seed=step, mean=3))
        graph.replay()
        assert_close(out, eager(given))
    assert_close(layer.running_mean, eager.running_mean)
    assert int(layer.num_batches_tracked) == 3


@GPU
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_forward_waits_for_no_gpu():
    layer = tn.BatchNorm2d(4, device="cuda")
    x = drawn(8, 4, 6, 6, device="cuda").requires_grad_()
    layer(x).sum().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("torchs", "ours", "shape"),
    [
        (nn.GroupNorm(2, 4), tn.GroupNorm(2, 4), (3, 4, 5, 5)),
        (nn.LayerNorm(6), tn.LayerNorm(6), (3, 4, 6)),
        (nn.InstanceNorm2d(4), tn.InstanceNorm2d(4), (3, 4, 5, 5)),
    ],
    ids=["group", "layer", "instance"],
)
def test_other_norms_are_torchs(device, torchs, ours, shape):
    x = drawn(*shape, device=device, mean=3)
    assert_close(ours.to(device)(x), torchs.to(device)(x), rtol=1e-5, atol=1e-5)


def test_a_fold_computes_the_same_function(device, full_precision):
    model = lively(resnet()).to(device).eval()
    example = images(2, 3, 16, 16).to(device)
    folded = tn.fold(model, example)
    assert folded.pairs
    assert_close(folded.model(example), model(example), rtol=1e-3, atol=1e-3)
    assert {p.device.type for p in folded.model.parameters()} == {device.type}


def test_recalibration_gives_the_statistics_of_the_data(device, full_precision):
    model = nn.Sequential(nn.Linear(6, 5), tn.BatchNorm1d(5)).to(device)
    x = drawn(64, 6, device=device, mean=4)
    tn.recalibrate(model, x.split(16))
    inputs = model[0](x).double()
    assert_close(model[1].running_mean.double(), inputs.mean(0), rtol=1e-5, atol=1e-5)
    assert_close(model[1].running_var.double(), inputs.var(0), rtol=1e-4, atol=1e-5)


def test_an_examination_finds_nan_and_leaves_the_model_as_it_was(device):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(device)
    model[1].running_var[2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    found = tn.examine(model, [(drawn(8, 6, device=device), torch.zeros(8, dtype=torch.long))])
    assert {f.layer for f in found.findings} >= {"1"}
    for key, value in model.state_dict().items():
        assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


def test_a_training_is_one_on_any_device(device, full_precision):
    x, y = blobs(90)
    splits = Splits(dataset(x[:60], y[:60]), dataset(x[60:], y[60:]))
    model = tn.build(tn.ModelSpec(widths=(8,)), (6,), 3, seed=0)
    config = tn.TrainConfig(epochs=3, device=device.type)
    history = tn.fit(model, splits, config)
    alone = tn.build(tn.ModelSpec(widths=(8,)), (6,), 3, seed=0)
    on_cpu = tn.fit(alone, splits, tn.TrainConfig(epochs=3, device="cpu"))
    losses = [epoch.train_loss for epoch in history.epochs]
    assert_close(losses, [epoch.train_loss for epoch in on_cpu.epochs], rtol=1e-3, atol=1e-4)
    assert next(model.parameters()).device.type == device.type
