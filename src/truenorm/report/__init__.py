"""What a person sees: terminal, JSON and self-contained pages. Computes nothing."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Report(ModuleType):
    """The package, which is also the public function of its name: an import sets that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        from truenorm.report.run_page import report

        report(*args, **kwargs)


sys.modules[__name__].__class__ = _Report
