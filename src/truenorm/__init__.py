"""TrueNorm: batch normalization you can trust, for PyTorch.

The public names. Each is imported from its file when first used, so that ``import truenorm``
and ``truenorm --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from truenorm.cores import share_cores as share_cores
    from truenorm.data.datasets import Dataset as Dataset
    from truenorm.data.datasets import Scaling as Scaling
    from truenorm.data.datasets import Splits as Splits
    from truenorm.data.datasets import dataset as dataset
    from truenorm.data.datasets import split as split
    from truenorm.data.sources import load as load
    from truenorm.doctor.diagnosis import Diagnosis as Diagnosis
    from truenorm.doctor.diagnosis import assert_healthy as assert_healthy
    from truenorm.doctor.diagnosis import examine as examine
    from truenorm.doctor.finding import Finding as Finding
    from truenorm.doctor.ledger.ledger import Ledger as Ledger
    from truenorm.doctor.ledger.ledger import watch as watch
    from truenorm.errors import InputError as InputError
    from truenorm.folding.export import Exported as Exported
    from truenorm.folding.export import export as export
    from truenorm.folding.export import load_program as load_program
    from truenorm.folding.fold import Folded as Folded
    from truenorm.folding.fold import fold as fold
    from truenorm.kernels.ops import accelerate as accelerate
    from truenorm.layers.batch_norm import BatchNorm as BatchNorm
    from truenorm.layers.batch_norm import BatchNorm1d as BatchNorm1d
    from truenorm.layers.batch_norm import BatchNorm2d as BatchNorm2d
    from truenorm.layers.batch_norm import BatchNorm3d as BatchNorm3d
    from truenorm.layers.batch_norm import LazyBatchNorm1d as LazyBatchNorm1d
    from truenorm.layers.batch_norm import LazyBatchNorm2d as LazyBatchNorm2d
    from truenorm.layers.batch_norm import LazyBatchNorm3d as LazyBatchNorm3d
    from truenorm.layers.conversion import Conversion as Conversion
    from truenorm.layers.conversion import ConversionWarning as ConversionWarning
    from truenorm.layers.conversion import assert_frozen as assert_frozen
    from truenorm.layers.conversion import convert as convert
    from truenorm.layers.norms import GroupNorm as GroupNorm
    from truenorm.layers.norms import InstanceNorm1d as InstanceNorm1d
    from truenorm.layers.norms import InstanceNorm2d as InstanceNorm2d
    from truenorm.layers.norms import InstanceNorm3d as InstanceNorm3d
    from truenorm.layers.norms import LayerNorm as LayerNorm
    from truenorm.layers.norms import LazyInstanceNorm1d as LazyInstanceNorm1d
    from truenorm.layers.norms import LazyInstanceNorm2d as LazyInstanceNorm2d
    from truenorm.layers.norms import LazyInstanceNorm3d as LazyInstanceNorm3d
    from truenorm.layers.norms import RMSNorm as RMSNorm
    from truenorm.layers.norms import weight_standardization as weight_standardization
    from truenorm.layers.recalibration import Recalibration as Recalibration
    from truenorm.layers.recalibration import recalibrate as recalibrate
    from truenorm.layers.renorm import Renorm as Renorm
    from truenorm.layers.transaction import attach as attach
    from truenorm.layers.transaction import commit as commit
    from truenorm.layers.transaction import rollback as rollback
    from truenorm.models import ModelSpec as ModelSpec
    from truenorm.models import build as build
    from truenorm.report.run_page import report as report
    from truenorm.studies.claims.claim import Findings as Findings
    from truenorm.studies.compare import compare as compare
    from truenorm.studies.plan import StudyPlan as StudyPlan
    from truenorm.studies.study import Study as Study
    from truenorm.training.config import TrainConfig as TrainConfig
    from truenorm.training.config import recipe as recipe
    from truenorm.training.estimator import NormClassifier as NormClassifier
    from truenorm.training.evaluate import logits_of as logits_of
    from truenorm.training.evaluate import score as score
    from truenorm.training.fit import fit as fit
    from truenorm.training.history import History as History
    from truenorm.training.run import Run as Run
    from truenorm.training.saved import load_folded as load_folded
    from truenorm.training.saved import load_model as load_model
    from truenorm.training.scoring import evaluate as evaluate
    from truenorm.training.stopping import EarlyStopping as EarlyStopping

_HOMES = {
    "BatchNorm": "layers.batch_norm",
    "BatchNorm1d": "layers.batch_norm",
    "BatchNorm2d": "layers.batch_norm",
    "BatchNorm3d": "layers.batch_norm",
    "Conversion": "layers.conversion",
    "ConversionWarning": "layers.conversion",
    "Dataset": "data.datasets",
    "Diagnosis": "doctor.diagnosis",
    "EarlyStopping": "training.stopping",
    "Exported": "folding.export",
    "Finding": "doctor.finding",
    "Findings": "studies.claims.claim",
    "Folded": "folding.fold",
    "GroupNorm": "layers.norms",
    "History": "training.history",
    "InputError": "errors",
    "InstanceNorm1d": "layers.norms",
    "InstanceNorm2d": "layers.norms",
    "InstanceNorm3d": "layers.norms",
    "LayerNorm": "layers.norms",
    "LazyBatchNorm1d": "layers.batch_norm",
    "LazyBatchNorm2d": "layers.batch_norm",
    "LazyBatchNorm3d": "layers.batch_norm",
    "LazyInstanceNorm1d": "layers.norms",
    "LazyInstanceNorm2d": "layers.norms",
    "LazyInstanceNorm3d": "layers.norms",
    "Ledger": "doctor.ledger.ledger",
    "ModelSpec": "models",
    "NormClassifier": "training.estimator",
    "RMSNorm": "layers.norms",
    "Recalibration": "layers.recalibration",
    "Renorm": "layers.renorm",
    "Run": "training.run",
    "Scaling": "data.datasets",
    "Splits": "data.datasets",
    "Study": "studies.study",
    "StudyPlan": "studies.plan",
    "TrainConfig": "training.config",
    "accelerate": "kernels.ops",
    "assert_frozen": "layers.conversion",
    "assert_healthy": "doctor.diagnosis",
    "attach": "layers.transaction",
    "build": "models",
    "commit": "layers.transaction",
    "compare": "studies.compare",
    "convert": "layers.conversion",
    "dataset": "data.datasets",
    "evaluate": "training.scoring",
    "examine": "doctor.diagnosis",
    "export": "folding.export",
    "fit": "training.fit",
    "fold": "folding.fold",
    "load": "data.sources",
    "load_folded": "training.saved",
    "load_model": "training.saved",
    "load_program": "folding.export",
    "logits_of": "training.evaluate",
    "recalibrate": "layers.recalibration",
    "recipe": "training.config",
    "report": "report.run_page",
    "rollback": "layers.transaction",
    "score": "training.evaluate",
    "share_cores": "cores",
    "split": "data.datasets",
    "watch": "doctor.ledger.ledger",
    "weight_standardization": "layers.norms",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from truenorm.moved import MOVED

        if name in MOVED:
            return importlib.import_module(f"truenorm.{name}")
        raise AttributeError(f"module 'truenorm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"truenorm.{_HOMES[name]}"), name)


class _Moved:
    """Finds what no file has: a module of before, which a pickle or an import may name."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith("truenorm."):
            return None
        from truenorm.moved import find_spec

        return find_spec(name)


sys.meta_path.append(_Moved)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
