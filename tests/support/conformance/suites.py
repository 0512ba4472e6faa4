"""The suites, where each is from, and how each is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from conformance import (
    apex,
    detectron2,
    equinox,
    flax,
    fvcore,
    gloo,
    keras,
    torch_modules,
    torch_nn,
    torch_ops,
    torch_ranks,
    torch_systems,
)
from conformance.cases import Case


@dataclass(frozen=True)
class Suite:
    """Attributes:
    name: as in its cases.
    source: the files that ask, and whose they are.
    how: whether the suite itself is run, or what it asks is asked again.
    cases: all of them, in one process.
    """

    name: str
    source: str
    how: str
    cases: Callable[[], Iterable[Case]]


_DATA = "its examples, checks in our words"
_WORDS = "in our words"
SUITES = (
    Suite(
        torch_modules.SUITE,
        "torch/testing/_internal/common_modules.py (installed), test/test_modules.py",
        _DATA,
        torch_modules.cases,
    ),
    Suite(
        torch_ops.SUITE,
        "torch/testing/_internal/common_methods_invocations.py (installed), test/test_ops.py",
        _DATA,
        torch_ops.cases,
    ),
    Suite(
        torch_ops.OPCHECK,
        "torch/testing/_internal/optests (installed)",
        "TrueNorm registers no operators so far; that there is none is the one case",
        torch_ops.operators,
    ),
    Suite(
        torch_nn.SUITE,
        "pytorch/pytorch test/test_nn.py, test/nn/test_lazy_modules.py",
        _WORDS,
        torch_nn.cases,
    ),
    Suite(
        torch_systems.SUITE,
        "pytorch/pytorch test/dynamo, functorch, export, test_fx.py, nn/test_parametrization.py, "
        "nn/test_pruning.py, test_stateless.py, nn/test_module_hooks.py, test_jit.py, quantization",
        _WORDS,
        torch_systems.cases,
    ),
    Suite(
        torch_ranks.SUITE,
        "torch/testing/_internal/distributed/distributed_test.py (installed)",
        "its own test bodies, over gloo on CPUs",
        tuple,
    ),
    Suite(
        keras.SUITE,
        "keras-team/keras keras/src/layers/normalization/batch_normalization_test.py",
        _WORDS,
        keras.cases,
    ),
    Suite(
        flax.SUITE,
        "google/flax tests/linen/linen_test.py, tests/nnx/nn/normalization_test.py",
        _WORDS,
        flax.cases,
    ),
    Suite(equinox.SUITE, "patrick-kidger/equinox tests/test_nn.py", _WORDS, equinox.cases),
    Suite(
        fvcore.SUITE,
        "facebookresearch/fvcore tests/test_precise_bn.py, fvcore/nn/precise_bn.py",
        _WORDS,
        fvcore.cases,
    ),
    Suite(
        detectron2.SUITE,
        "facebookresearch/detectron2 detectron2/layers/batch_norm.py, tests/layers/test_blocks.py",
        _WORDS,
        detectron2.cases,
    ),
    Suite(
        apex.SUITE,
        "NVIDIA/apex tests/distributed/synced_batchnorm, apex/parallel/optimized_sync_batchnorm.py",
        _WORDS,
        apex.cases,
    ),
)


def every_case() -> list[Case]:
    """Of all suites, those over ranks at the end."""
    alone = [case for suite in SUITES for case in suite.cases()]
    return [*alone, *gloo.cases()]
