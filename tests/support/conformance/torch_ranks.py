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
from conformance.cases import need
from conformance.gloo import Ranked
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


def ranked() -> list[Ranked]:
    """Every test that names SyncBatchNorm, on two and three ranks."""
    made = []
    for name in _torchs_names():
        work = partial(_run_torchs, name)
        if name == NEEDS_TORCHVISION:
            work = partial(_the_group_reaches_nested_layers)
        for world in WORLDS[:1] if FOR_TWO in name else WORLDS:
            made.append(Ranked(SUITE, "SyncBatchNorm", name.removeprefix("test_"), world, work))
    return made
