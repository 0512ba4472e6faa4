"""One run of a study: what it is asked, and what comes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import torch

from truenorm.models import ModelSpec
from truenorm.training.config import TrainConfig

Purpose = Literal["judged", "tuning"]  # stored as "part"
ATTEMPTS = 3  # a run is run again twice when its process dies


@dataclass(frozen=True)
class Trial:
    """One run: model, config with its seed and learning rate, and what it serves.

    A ``tuning`` run helps to choose a learning rate and never sees the test part.

    Attributes:
        probe: one of :data:`truenorm.studies.probes.PROBES`, in place of the plain training.
        examples: of the training part, so many that the seed draws, each class in its share,
            and as many to validate by, 2,000 at most; 0 for all.
    """

    variant: str
    spec: ModelSpec
    config: TrainConfig
    part: Purpose = "judged"
    probe: str = ""
    examples: int = 0

    def key(self, fingerprint: str) -> str:
        """A digest of all that determines the row; the variant's label does not."""
        asked = {
            "data": fingerprint,
            "spec": self.spec.to_json(),
            "config": self.config.to_json(),
            "part": self.part,
            "truenorm": metadata.version("truenorm"),
            "torch": torch.__version__,
        }
        # Left out where they say nothing, so that the rows of older stores are found.
        asked |= {k: v for k in ("probe", "examples") if (v := getattr(self, k))}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The fields, for a worker process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Trial:
        """Undo :meth:`to_json`."""
        spec, config = ModelSpec.from_json(stored["spec"]), TrainConfig(**stored["config"])
        return cls(**{**stored, "spec": spec, "config": config})


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a run. A run that failed has an ``error`` and no figures.

    Attributes:
        variant: the variant's label.
        part: what the run served.
        seed: of split, initial weights, order and dropout.
        lr: the learning rate; with a schedule, its peak.
        test_accuracy, test_loss: of the restored best epoch; None for tuning runs, and where
            there is no test part.
        valid_loss, valid_accuracy: of the best epoch; None if none ended with a finite loss.
        epochs, best_epoch: epochs done, and the one that was restored.
        seconds: of fitting; the one figure that differs from repetition to repetition.
        stopped: why training ended; "nan" is divergence.
        curve: of each epoch validation loss, validation accuracy and seconds since the start.
        figures: what a probe measured; what is undefined is not there.
        error: what went wrong.
    """

    variant: str
    part: Purpose
    seed: int
    lr: float
    test_accuracy: float | None = None
    test_loss: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    epochs: int = 0
    best_epoch: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    curve: tuple[tuple[float, float, float], ...] = ()
    figures: dict[str, float] = field(default_factory=dict, hash=False)
    error: str | None = None

    @property
    def diverged(self) -> bool:
        """Whether the training loss ceased to be finite."""
        return self.stopped == "nan"

    def reaches(self, accuracy: float) -> tuple[int, float] | None:
        """Epoch and seconds at which validation accuracy first was ``accuracy``, or None."""
        for epoch, (_, reached, seconds) in enumerate(self.curve, 1):
            if reached >= accuracy:
                return epoch, seconds
        return None

    def to_json(self) -> dict[str, Any]:
        """The fields, for a worker's answer and the store."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Row:
        """Undo :meth:`to_json`."""
        return cls(**{**stored, "curve": tuple(tuple(e) for e in stored["curve"])})


def failed(trial: Trial, error: str) -> Row:
    """The row of a run that came to nothing."""
    config = trial.config
    return Row(variant=trial.variant, part=trial.part, seed=config.seed, lr=config.lr, error=error)
