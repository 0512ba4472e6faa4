"""TrueNorm: batch normalization you can trust, for PyTorch.

The public names. Each is imported from its file when first used, so that ``import truenorm``
and ``truenorm --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from truenorm.config import TrainConfig as TrainConfig
    from truenorm.config import recipe as recipe
    from truenorm.data import Dataset as Dataset
    from truenorm.data import Scaling as Scaling
    from truenorm.data import Splits as Splits
    from truenorm.data import dataset as dataset
    from truenorm.data import split as split
    from truenorm.errors import InputError as InputError
    from truenorm.estimator import NormClassifier as NormClassifier
    from truenorm.evaluate import logits_of as logits_of
    from truenorm.evaluate import score as score
    from truenorm.models import ModelSpec as ModelSpec
    from truenorm.models import build as build
    from truenorm.run import Run as Run
    from truenorm.run import load_model as load_model
    from truenorm.sources import load as load
    from truenorm.train import EarlyStopping as EarlyStopping
    from truenorm.train import History as History
    from truenorm.train import fit as fit

_HOMES = {
    "Dataset": "data",
    "EarlyStopping": "train",
    "History": "train",
    "InputError": "errors",
    "ModelSpec": "models",
    "NormClassifier": "estimator",
    "Run": "run",
    "Scaling": "data",
    "Splits": "data",
    "TrainConfig": "config",
    "build": "models",
    "dataset": "data",
    "fit": "train",
    "load": "sources",
    "load_model": "run",
    "logits_of": "evaluate",
    "recipe": "config",
    "score": "evaluate",
    "split": "data",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'truenorm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"truenorm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
