"""Measurements that a plain training run does not make, each a function of model, config, data.

A probe is deterministic by ``config.seed``, but for times; its figures are floats, NaN where
undefined. Accuracies are from 0 to 1, losses cross entropies in nats. It runs on
``config.threads`` threads, or as many as torch has now, and gives torch's generators back.
"""

from __future__ import annotations

from collections.abc import Callable

from truenorm.data.datasets import Splits
from truenorm.models import ModelSpec
from truenorm.studies.probes.cost import cost
from truenorm.studies.probes.modes import modes, train_part
from truenorm.studies.probes.noise import noisy
from truenorm.studies.probes.online import online, online_running
from truenorm.studies.probes.shift import shift
from truenorm.training.config import TrainConfig

Probe = Callable[[ModelSpec, TrainConfig, Splits], dict[str, float]]

PROBES: dict[str, Probe] = {
    "train_part": train_part,
    "shift": shift,
    "noisy": noisy,
    "modes": modes,
    "online": online,
    "online_running": online_running,
    "cost": cost,
}
