"""TrueNorm: batch normalization you can trust, for PyTorch.

The public names. Each is imported from its file when first used, so that ``import truenorm``
and ``truenorm --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from truenorm.claims import Findings as Findings
    from truenorm.config import TrainConfig as TrainConfig
    from truenorm.config import recipe as recipe
    from truenorm.conversion import Conversion as Conversion
    from truenorm.conversion import assert_frozen as assert_frozen
    from truenorm.conversion import convert as convert
    from truenorm.data import Dataset as Dataset
    from truenorm.data import Scaling as Scaling
    from truenorm.data import Splits as Splits
    from truenorm.data import dataset as dataset
    from truenorm.data import split as split
    from truenorm.doctor.diagnosis import Diagnosis as Diagnosis
    from truenorm.doctor.diagnosis import Finding as Finding
    from truenorm.doctor.diagnosis import assert_healthy as assert_healthy
    from truenorm.doctor.diagnosis import examine as examine
    from truenorm.doctor.ledger import Ledger as Ledger
    from truenorm.doctor.ledger import watch as watch
    from truenorm.errors import InputError as InputError
    from truenorm.estimator import NormClassifier as NormClassifier
    from truenorm.evaluate import logits_of as logits_of
    from truenorm.evaluate import score as score
    from truenorm.exporting import Exported as Exported
    from truenorm.exporting import export as export
    from truenorm.exporting import load_program as load_program
    from truenorm.folding.fold import Folded as Folded
    from truenorm.folding.fold import fold as fold
    from truenorm.layers import BatchNorm as BatchNorm
    from truenorm.layers import BatchNorm1d as BatchNorm1d
    from truenorm.layers import BatchNorm2d as BatchNorm2d
    from truenorm.layers import BatchNorm3d as BatchNorm3d
    from truenorm.layers import LazyBatchNorm1d as LazyBatchNorm1d
    from truenorm.layers import LazyBatchNorm2d as LazyBatchNorm2d
    from truenorm.layers import LazyBatchNorm3d as LazyBatchNorm3d
    from truenorm.layers import Renorm as Renorm
    from truenorm.models import ModelSpec as ModelSpec
    from truenorm.models import build as build
    from truenorm.norms import GroupNorm as GroupNorm
    from truenorm.norms import InstanceNorm1d as InstanceNorm1d
    from truenorm.norms import InstanceNorm2d as InstanceNorm2d
    from truenorm.norms import InstanceNorm3d as InstanceNorm3d
    from truenorm.norms import LayerNorm as LayerNorm
    from truenorm.norms import RMSNorm as RMSNorm
    from truenorm.norms import weight_standardization as weight_standardization
    from truenorm.recalibration import Recalibration as Recalibration
    from truenorm.recalibration import recalibrate as recalibrate
    from truenorm.run import Run as Run
    from truenorm.run import load_model as load_model
    from truenorm.shipping import load_folded as load_folded
    from truenorm.sources import load as load
    from truenorm.study import Study as Study
    from truenorm.study import compare as compare
    from truenorm.train import EarlyStopping as EarlyStopping
    from truenorm.train import History as History
    from truenorm.train import fit as fit
    from truenorm.transaction import attach as attach
    from truenorm.transaction import commit as commit
    from truenorm.transaction import rollback as rollback

_HOMES = {
    "BatchNorm": "layers",
    "BatchNorm1d": "layers",
    "BatchNorm2d": "layers",
    "BatchNorm3d": "layers",
    "Conversion": "conversion",
    "Dataset": "data",
    "Diagnosis": "doctor.diagnosis",
    "EarlyStopping": "train",
    "Exported": "exporting",
    "Finding": "doctor.diagnosis",
    "Findings": "claims",
    "Folded": "folding.fold",
    "GroupNorm": "norms",
    "History": "train",
    "InputError": "errors",
    "InstanceNorm1d": "norms",
    "InstanceNorm2d": "norms",
    "InstanceNorm3d": "norms",
    "LayerNorm": "norms",
    "LazyBatchNorm1d": "layers",
    "LazyBatchNorm2d": "layers",
    "LazyBatchNorm3d": "layers",
    "Ledger": "doctor.ledger",
    "ModelSpec": "models",
    "NormClassifier": "estimator",
    "RMSNorm": "norms",
    "Recalibration": "recalibration",
    "Renorm": "layers",
    "Run": "run",
    "Scaling": "data",
    "Splits": "data",
    "Study": "study",
    "TrainConfig": "config",
    "assert_frozen": "conversion",
    "assert_healthy": "doctor.diagnosis",
    "attach": "transaction",
    "build": "models",
    "commit": "transaction",
    "compare": "study",
    "convert": "conversion",
    "dataset": "data",
    "examine": "doctor.diagnosis",
    "export": "exporting",
    "fit": "train",
    "fold": "folding.fold",
    "load": "sources",
    "load_folded": "shipping",
    "load_model": "run",
    "load_program": "exporting",
    "logits_of": "evaluate",
    "recalibrate": "recalibration",
    "recipe": "config",
    "rollback": "transaction",
    "score": "evaluate",
    "split": "data",
    "watch": "doctor.ledger",
    "weight_standardization": "norms",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'truenorm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"truenorm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
