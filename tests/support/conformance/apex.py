"""What apex tests of its SyncBatchNorm, in our words (NVIDIA/apex).

From tests/distributed/synced_batchnorm/ (single_gpu_unit_test.py, two_gpu_unit_test.py,
two_gpu_test_different_batch_size.py, test_groups.py, test_batchnorm1d.py) and
apex/parallel/optimized_sync_batchnorm.py, whose layer takes channels-last memory, a residual and a
fused ReLU. Its tests run on GPUs with NCCL; these on CPUs with gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import truenorm
from conformance.cases import Case, need, need_close
from conformance.gloo import Ranked
from conformance.pooled import need_pooled, parts_of

SUITE = "apex"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def _input(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)


def _formulas(
    x: Tensor, cotangent: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> list[Tensor]:
    """Output and gradients by the formulas of Ioffe and Szegedy 2015, section 3."""
    axes = [0, *range(2, x.ndim)]

    def along(values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (x.ndim - 2))

    mean, var = x.mean(axes), x.var(axes, correction=0)
    normed = (x - along(mean)) * along(torch.rsqrt(var + eps))
    through = cotangent * along(weight)
    middle = through.mean(axes), (through * normed).mean(axes)
    grad = along(torch.rsqrt(var + eps)) * (through - along(middle[0]) - normed * along(middle[1]))
    out = normed * along(weight) + along(bias)
    return [out, grad, (cotangent * normed).sum(axes), cotangent.sum(axes)]


def one_process_is_the_formulas(*, dtype: torch.dtype, last: bool, rows: bool) -> None:
    x = _input(8, 4, dtype=dtype) if rows else _input(8, 4, 5, 5, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = truenorm.BatchNorm(4, momentum=1.0, sync=True).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, 4))
        layer.bias.copy_(torch.linspace(-1, 1, 4))
    given, cotangent = x.clone().requires_grad_(), torch.cos(x)
    out = layer(given)
    got = [out, *torch.autograd.grad(out, [given, layer.weight, layer.bias], cotangent)]
    affine = layer.weight.detach().double(), layer.bias.detach().double()
    wanted = _formulas(x.double(), cotangent.double(), *affine, layer.eps)
    loose = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    for what, a, b in zip(("output", "grad", "grad weight", "grad bias"), got, wanted, strict=True):
        need_close(a.double(), b, what, rtol=loose, atol=loose * float(b.detach().abs().max()))
    axes = [0, *range(2, x.ndim)]
    loose = max(loose, 1e-6) if dtype != torch.float64 else loose
    need_close(layer.running_mean.double(), x.double().mean(axes), "mean", rtol=loose, atol=loose)
    need_close(layer.running_var.double(), x.double().var(axes), "variance", rtol=loose, atol=loose)
    need(not last or out.is_contiguous(memory_format=torch.channels_last), "another memory format")


def relu_with_a_residual(*, last: bool) -> None:
    """y = relu(bn(x) + z), with the gradients of all of them."""
    layer = truenorm.BatchNorm2d(4, act="relu").double()
    plain = nn.BatchNorm2d(4).double()
    x, z = (_input(4, 4, 3, 3) * f for f in (1.0, -0.7))
    if last:
        x, z = (t.contiguous(memory_format=torch.channels_last) for t in (x, z))
    ours = [t.clone().requires_grad_() for t in (x, z)]
    theirs = [t.clone().requires_grad_() for t in (x, z)]
    out = layer(ours[0], residual=ours[1])
    wanted = torch.relu(plain(theirs[0]) + theirs[1])
    need_close(out, wanted, "output", **TIGHT)
    cotangent = torch.cos(x)
    got = torch.autograd.grad(out, [*ours, *layer.parameters()], cotangent)
    right = torch.autograd.grad(wanted, [*theirs, *plain.parameters()], cotangent)
    need_close(list(got), list(right), "gradients", **TIGHT)


def relu_without_a_residual() -> None:
    layer, plain = truenorm.BatchNorm2d(4, act="relu").double(), nn.BatchNorm2d(4).double()
    x = _input(4, 4, 3, 3)
    need_close(layer(x), torch.relu(plain(x)), "output", **TIGHT)


def cases() -> Iterator[Case]:
    """In one process."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        for name, options in (
            ("images", {"last": False, "rows": False}),
            ("images, channels last", {"last": True, "rows": False}),
            ("rows", {"last": False, "rows": True}),
        ):
            run = partial(one_process_is_the_formulas, dtype=dtype, **options)
            yield Case(SUITE, "BatchNorm", f"formulas, {name}", str(dtype).split(".")[1], run)
    for last in (False, True):
        run = partial(relu_with_a_residual, last=last)
        yield Case(SUITE, "BatchNorm2d", "relu, residual", "channels last" if last else "", run)
    yield Case(SUITE, "BatchNorm2d", "relu", "", relu_without_a_residual)


# -- over ranks ----------------------------------------------------------------------------------


def _layer(channels: int = 4, **options: object) -> truenorm.BatchNorm:
    return truenorm.BatchNorm(channels, momentum=1.0, dtype=torch.float64, **options)  # type: ignore[arg-type]


def halves() -> None:
    need_pooled(_layer(sync=True), parts_of([(4, 4, 5, 5)] * 2), (0, 1))


def halves_channels_last() -> None:
    parts = parts_of([(4, 4, 5, 5)] * 2)
    last = [p.contiguous(memory_format=torch.channels_last) for p in parts]
    need_pooled(_layer(sync=True), last, (0, 1))


def different_batch_sizes() -> None:
    """16 and 8 examples, one rank's values fifty times the other's."""
    first, second = parts_of([(16, 4, 8, 8), (8, 4, 8, 8)])
    need_pooled(_layer(sync=True), [first * 50, second], (0, 1), rtol=1e-9, atol=1e-9)


def different_batch_sizes_behind_a_convolution() -> None:
    """Trained by DDP with each example's share of the loss, as one process on all of them."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), truenorm.BatchNorm2d(6, sync=True)
    ).double()
    alone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)).double()
    alone.load_state_dict(model.state_dict())
    parts = parts_of([(16, 3, 8, 8), (8, 3, 8, 8)])
    rank, total = dist.get_rank(), sum(len(p) for p in parts)
    parallel = DistributedDataParallel(model)
    out = parallel(parts[rank])
    out.backward(torch.cos(out.detach()) * dist.get_world_size() / total)  # DDP takes the mean
    wanted = alone(torch.cat(parts))
    wanted.backward(torch.cos(wanted.detach()) / total)
    need_close(out, wanted.split([16, 8])[rank], "output", **TIGHT)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        need_close(p.grad, q.grad, f"gradient of {name}", **TIGHT)
    need_close(dict(model.state_dict()), dict(alone.state_dict()), "state", **TIGHT)


def groups_of_two() -> None:
    """Four ranks in two groups: each group is one batch."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    parts = parts_of([(3, 4, 5, 5)] * 4)[2 * pair : 2 * pair + 2]
    members = (2 * pair, 2 * pair + 1)
    need_pooled(_layer(sync=groups[pair]), parts, members, group=groups[pair])


def half_precision() -> None:
    """Statistics are those of the half-precision values, pooled in float32 or wider."""
    parts = [p.half() for p in parts_of([(4, 4, 5, 5)] * 2)]
    layer = truenorm.BatchNorm2d(4, momentum=1.0, sync=True).half()
    out = layer(parts[dist.get_rank()])
    whole = torch.cat(parts).double()
    need(out.dtype == torch.float16, f"gives {out.dtype}")
    need_close(layer.running_mean.double(), whole.mean((0, 2, 3)), "mean", rtol=1e-6, atol=1e-6)
    need_close(layer.running_var.double(), whole.var((0, 2, 3)), "variance", rtol=1e-6, atol=1e-6)


_RANKED: dict[str, tuple[int, Callable[[], None]]] = {
    "halves of a batch": (2, halves),
    "halves, channels last": (2, halves_channels_last),
    "16 and 8 examples": (2, different_batch_sizes),
    "16 and 8 examples, convolution, DDP": (2, different_batch_sizes_behind_a_convolution),
    "half precision": (2, half_precision),
    "groups of two": (4, groups_of_two),
}


def ranked() -> list[Ranked]:
    """Over ranks."""
    return [Ranked(SUITE, "BatchNorm, sync", n, world, w) for n, (world, w) in _RANKED.items()]
