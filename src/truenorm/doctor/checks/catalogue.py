"""All checks, in the order of their codes."""

from __future__ import annotations

from truenorm.doctor.check import Check
from truenorm.doctor.checks import (
    batches,
    dependence,
    deployment,
    gap,
    modes,
    proportion,
    statistics,
    structure,
)

CHECKS: tuple[Check, ...] = (
    statistics.TN101,
    statistics.TN102,
    gap.TN103,
    statistics.TN104,
    statistics.TN105,
    statistics.TN106,
    statistics.TN107,
    proportion.TN108,
    modes.TN201,
    modes.TN202,
    modes.TN203,
    modes.TN204,
    modes.TN205,
    batches.TN301,
    batches.TN302,
    batches.TN303,
    dependence.TN304,
    batches.TN305,
    batches.TN306,
    structure.TN401,
    structure.TN402,
    structure.TN403,
    structure.TN404,
    structure.TN405,
    structure.TN406,
    deployment.TN501,
    deployment.TN502,
    deployment.TN503,
)
