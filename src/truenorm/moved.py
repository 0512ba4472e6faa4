"""The modules that version 0.1.0 had, and where their names stand now.

A pickle (``torch.save(model)``, joblib) names the module of each class. What 0.1.0 pickled loads
by this table, and code that imports from a module of then runs; neither costs anything before.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOVED = {
    "claims": ("studies.claims.testing", "studies.claims.catalogue", "studies.claims.claim"),
    "config": ("training.config",),
    "conversion": ("layers.conversion", "layers.per_call"),
    "data": ("data.datasets", "data.batches"),
    "distributed": ("layers.ranks",),
    "estimator": ("training.estimator",),
    "evaluate": ("training.evaluate", "training.judgement"),
    "exporting": ("folding.export",),
    "functional": ("layers.functional",),
    "layers": ("layers.batch_norm", "layers.options", "layers.renorm", "layers.running"),
    "norms": ("layers.norms",),
    "paired": ("studies.paired", "studies.sequential", "studies.scores"),
    "plan": ("studies.plan", "studies.variants"),
    "predict": ("training.predict",),
    "probes": ("studies.probes",),
    "recalibration": ("layers.recalibration",),
    "run": ("training.run", "training.saved", "files", "provenance"),
    "shipping": ("training.saved",),
    "sources": ("data.sources", "data.datasets", "data.readers.idx"),
    "study": ("studies.compare", "studies.study"),
    "train": (
        "training.fit",
        "training.history",
        "training.state",
        "training.stopping",
        "training.devices",
        "training.steps",
    ),
    "transaction": ("layers.transaction",),
    "trial": ("studies.trial", "studies.bench"),
    "verdicts": ("studies.verdicts",),
}

# What a pickle may name and has another name now: module and name of then, name of today.
RENAMED = {
    ("conversion", "_begin_again"): "restart_calls",
    ("layers", "_Forward"): "Forward",
}


def names_of(old: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds the names which the module ``old`` had."""

    def look_up(name: str) -> Any:
        today = RENAMED.get((old, name), name)
        for home in () if name.startswith("__") else MOVED[old]:
            module = importlib.import_module(f"truenorm.{home}")
            if today in vars(module):
                return vars(module)[today]
        raise AttributeError(f"module 'truenorm.{old}' has no attribute {name!r}")

    return look_up


class _Finder:
    """Makes a module of then when one is imported and no file has its name.

    A finder and loader by its methods alone: importlib.abc would cost every start 10 ms.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        known = package == "truenorm" and old in MOVED
        return ModuleSpec(fullname, self) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, __doc__)
        module.__getattr__ = names_of(spec.name.partition(".")[2])  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


# Last, so that it is asked only for what no file has.
sys.meta_path.append(_Finder())
