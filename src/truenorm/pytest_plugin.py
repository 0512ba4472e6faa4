"""pytest: a fixture that examines a model, so that a team keeps it healthy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_healthy() -> Callable[..., Any]:
    """``assert_healthy(model, data)``: fail the test if the model's normalization is at fault.

    It is ``truenorm.assert_healthy``; ``fail_on`` and ``ignore`` say what may stand.
    """
    import truenorm  # here: collecting tests does not wait for torch

    return truenorm.assert_healthy
