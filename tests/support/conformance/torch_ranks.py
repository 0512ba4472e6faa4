"""torch's ``distributed_test.py``: its tests of SyncBatchNorm, run as they are, over gloo on CPUs.

The tests are in torch's wheel (torch/testing/_internal/distributed/distributed_test.py) and ask for
a GPU a rank. Here their module sees a torch whose devices are the CPU and whose ``SyncBatchNorm``
is TrueNorm's batch norm with ``sync``; their bodies are torch's own.
"""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
import warnings
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import truenorm
from conformance.cases import need, need_close
from conformance.gloo import Ranked
from conformance.pooled import need_pooled, parts_of
from conformance.process import process_left_alone

SUITE = "torch distributed_test"
# What else tests it, under other names; and what can be run only with packages that are not here.
ALSO = ("test_ddp_inference", "test_ddp_uneven_inputs_stop_iteration_sync_bn")
NEEDS_TORCHVISION = "test_SyncBatchNorm_process_group"
WORLDS = (2, 3)
FOR_TWO = "Single_Input_Per_Process"


class _Seen:
    """A module with some names replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class SyncBatchNorm:
    """In the place of torch.nn.SyncBatchNorm."""

    def __new__(cls, *args: Any, process_group: Any = None, **kwargs: Any) -> Any:
        return truenorm.BatchNorm(*args, **kwargs, sync=process_group or True)

    @staticmethod
    def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
        return truenorm.convert(module, to="sync", group=process_group or True).model


def _parallel(
    module: nn.Module, device_ids: Any = None, output_device: Any = None, **more: Any
) -> Any:
    return DistributedDataParallel(module, **more)


def _on_cpu(make: Any) -> Any:
    """A function of torch that makes a tensor, without its device."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    return made


def _torch() -> _Seen:
    parallel = _Seen(nn.parallel, DistributedDataParallel=_parallel)
    modules = _Seen(nn, SyncBatchNorm=SyncBatchNorm, parallel=parallel)
    cuda = _Seen(torch.cuda, set_device=lambda device: None, current_device=lambda: "cpu")
    made = {name: _on_cpu(getattr(torch, name)) for name in ("randn", "ones")}
    return _Seen(torch, nn=modules, cuda=cuda, device=lambda *_: torch.get_default_device(), **made)


@functools.cache
def _tests() -> Any:
    """torch's module, imported as for gloo."""
    with process_left_alone(), tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": "2", "TEMP_DIR": folder}
        from torch.testing._internal.distributed import distributed_test
    return distributed_test


def _stay(held: Any, *_: Any, **__: Any) -> Any:
    return held


def _run_torchs(name: str) -> None:
    """One test of torch's, without its decorators, which look for GPUs."""
    tests = _tests()
    from torch.testing._internal.common_utils import TestCase

    class OnCpu(tests.DistributedTest._DistTestBase, TestCase):
        rank = dist.get_rank()

        def _barrier(self, *args: Any, **kwargs: Any) -> None:
            dist.barrier()

        def runTest(self) -> None:
            inspect.unwrap(getattr(type(self), name))(self)

    seen = _torch()
    with (
        mock.patch.object(tests, "torch", seen),
        mock.patch.object(tests, "nn", seen.nn),
        mock.patch.object(Tensor, "cuda", _stay),
        mock.patch.object(nn.Module, "cuda", _stay),
        warnings.catch_warnings(),
    ):
        # One of the tests sums over ranks in its own forward, without a gradient.
        warnings.filterwarnings("ignore", message="c10d::allreduce_: an autograd kernel was not")
        OnCpu().runTest()


def _torchs_names() -> list[str]:
    found = [n for n in dir(_tests().DistributedTest._DistTestBase) if n.startswith("test_")]
    return [n for n in found if "SyncBatchNorm" in n or n in ALSO]


def _the_group_reaches_nested_layers() -> None:
    """As ``test_SyncBatchNorm_process_group`` asks of a ResNet of torchvision."""
    group = dist.new_group([0])
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    SyncBatchNorm.convert_sync_batchnorm(nested, group)
    layer: Any = nested[0][1]
    need(layer.options.sync.group is group, "the group did not reach the layer")


# -- what its documentation says, beyond its tests -----------------------------------------------

_OPTIONS: dict[str, dict[str, Any]] = {
    "no affine map": {"affine": False},
    "momentum None": {"momentum": None},
    "momentum 1": {"momentum": 1.0},
}
_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "rows": ((4, 3), (2, 3), (1, 3)),
    "sequences": ((4, 3, 5), (2, 3, 5), (0, 3, 5)),
    "images": ((2, 3, 4, 4), (1, 3, 4, 4), (3, 3, 4, 4)),
    "volumes": ((1, 3, 2, 3, 4), (2, 3, 2, 3, 4), (1, 3, 2, 3, 4)),
    "unlike images": ((2, 3, 4, 4), (1, 3, 2, 7), (3, 3, 1, 5)),
}


def _is_as_one_process(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    """Outputs, gradients and statistics are those of torch's layer on the batch as one."""
    world = dist.get_world_size()
    layer = truenorm.BatchNorm(3, **options, sync=True, dtype=torch.float64)
    need_pooled(layer, parts_of(shapes[:world]), range(world))


def _half_on_one_rank() -> None:
    """Mixed precision on one rank alone: all pool the same statistics."""
    first, *others = parts_of([(4, 3, 5, 5)] * dist.get_world_size())
    parts = [first.half(), *(p.float() for p in others)]
    layer = truenorm.BatchNorm2d(3, momentum=1.0, sync=True)
    x = parts[dist.get_rank()].requires_grad_()
    out = layer(x)
    out.sum().backward()
    need(out.dtype == x.dtype, f"gives {out.dtype} for {x.dtype}")
    whole = torch.cat([p.double() for p in parts])
    need_close(layer.running_mean.double(), whole.mean((0, 2, 3)), "mean", rtol=1e-5, atol=1e-5)
    need_close(layer.running_var.double(), whole.var((0, 2, 3)), "variance", rtol=1e-5, atol=1e-5)


def _evaluation_waits_for_nobody() -> None:
    """One rank evaluates alone, by its running statistics."""
    layer = truenorm.BatchNorm2d(3, sync=True, dtype=torch.float64).eval()
    if dist.get_rank() == 0:
        x = parts_of([(2, 3, 4, 4)])[0]
        need_close(layer(x), x / (1 + layer.eps) ** 0.5, "evaluation", rtol=1e-10, atol=1e-10)


def _own() -> list[Ranked]:
    """Of every shape on two and three ranks, of every option on two."""
    subject = "SyncBatchNorm, as one process"
    made = [
        Ranked(SUITE, subject, shape, world, partial(_is_as_one_process, shapes, {}))
        for shape, shapes in _SHAPES.items()
        for world in WORLDS
    ]
    made += [
        Ranked(SUITE, subject, f"{shape}, {told}", 2, partial(_is_as_one_process, shapes, options))
        for shape, shapes in _SHAPES.items()
        for told, options in _OPTIONS.items()
    ]
    made += [Ranked(SUITE, subject, "half on one rank", w, _half_on_one_rank) for w in WORLDS]
    made.append(Ranked(SUITE, subject, "one evaluates", 2, _evaluation_waits_for_nobody))
    return made


def ranked() -> list[Ranked]:
    """Every test that names SyncBatchNorm, on two and three ranks; and cases of our own."""
    made = _own()
    for name in _torchs_names():
        work = partial(_run_torchs, name)
        if name == NEEDS_TORCHVISION:
            work = partial(_the_group_reaches_nested_layers)
        for world in WORLDS[:1] if FOR_TWO in name else WORLDS:
            made.append(Ranked(SUITE, "SyncBatchNorm", name.removeprefix("test_"), world, work))
    return made
