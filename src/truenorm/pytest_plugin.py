"""pytest: a fixture that examines a model, so that a team keeps it healthy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def assert_healthy() -> Callable[..., Any]:
    """``truenorm.assert_healthy``: fails the test with the findings of an unhealthy model."""
    import truenorm

    return truenorm.assert_healthy
