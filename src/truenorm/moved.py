"""Where the names stand now that lay in modules before the wings, for those who may name them.

A pickle (``torch.save(model)``, joblib) names the module of each class, and a script may import
from the module that documentation told of. Both find it by this table, which is read only then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "claims": ("studies.claims.testing", "studies.claims.catalogue", "studies.claims.claim"),
    "config": ("training.config",),
    "conversion": ("layers.conversion", "layers.per_call"),
    "data": ("data.datasets", "data.batches"),
    "distributed": ("layers.ranks",),
    "estimator": ("training.estimator",),
    "evaluate": ("training.evaluate", "training.judgement", "training.scoring"),
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
    """A module's ``__getattr__`` that finds what the module ``old`` had and still has its name."""

    def look_up(name: str) -> Any:
        today = RENAMED.get((old, name), name)
        for home in () if name.startswith("__") else MOVED[old]:
            module = importlib.import_module(f"truenorm.{home}")
            if today in vars(module):
                return vars(module)[today]
        raise AttributeError(f"module 'truenorm.{old}' has no attribute {name!r}")

    return look_up


class _OfThen(ModuleType):
    """A module of then; one whose name is a function's today is called as that."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Loader:
    """Makes a module of then."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _OfThen(spec.name, __doc__)
        module.__getattr__ = names_of(spec.name.partition(".")[2])  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def find_spec(name: str) -> ModuleSpec | None:
    """The spec of a module of then by its whole name, or None; the package's finder asks."""
    if name.partition(".")[2] not in MOVED:
        return None
    return ModuleSpec(name, _Loader())  # type: ignore[arg-type]
