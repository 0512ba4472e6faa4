"""Torch's and ONNX's test material change the process that imports it; here it is changed back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_FLAG = "__allow_nonbracketed_mutation_flag"
_BACKENDS = torch.backends.disable_global_flags.__globals__


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Undo what importing and building the cases does to the process."""
    environment, flag = dict(os.environ), _BACKENDS[_FLAG]
    numpys = np.random.get_state()  # noqa: NPY002  the one that onnx seeds
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        _BACKENDS[_FLAG] = flag
        for added in os.environ.keys() - environment.keys():
            del os.environ[added]
        os.environ.update(environment)
