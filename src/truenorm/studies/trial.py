"""One run of a study: what it is asked, what comes of it, and the doing of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import torch

from truenorm.data.datasets import Dataset, Splits, split
from truenorm.data.sources import Uncut
from truenorm.errors import one_line
from truenorm.models import ModelSpec, build
from truenorm.studies.probes import PROBES
from truenorm.training.config import TrainConfig
from truenorm.training.evaluate import Scores, logits_of, score
from truenorm.training.fit import History, fit, threads

Part = Literal["judged", "tuning"]
VALIDATED = 2_000
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
    part: Part = "judged"
    probe: str = ""
    examples: int = 0

    def key(self, fingerprint: str) -> str:
        """A digest of all that determines the row; the variant's label does not."""
        asked = {
            "data": fingerprint,
            "spec": self.spec.to_json(),
            "config": dataclasses.asdict(self.config),
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
    part: Part
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

    def timeless(self) -> Row:
        """The row without its seconds: equal runs give equal ones."""
        curve = tuple((loss, accuracy, 0.0) for loss, accuracy, _ in self.curve)
        return dataclasses.replace(self, seconds=0.0, curve=curve)


def failed(trial: Trial, error: str) -> Row:
    """The row of a run that came to nothing."""
    config = trial.config
    return Row(variant=trial.variant, part=trial.part, seed=config.seed, lr=config.lr, error=error)


class Bench:
    """Data, and the last seed's parts of it, on which trials are run one after another."""

    def __init__(self, data: Uncut) -> None:
        self.data = data
        self._cut: tuple[int, int] | None = None
        self._splits: Splits | None = None

    def perform(self, trial: Trial) -> Row:
        """Run ``trial`` on one thread. What goes wrong becomes the row's error.

        Raises:
            KeyboardInterrupt: Ctrl-C; there is no row then.
        """
        try:
            with threads(1):
                return self._perform(trial)
        except Exception as error:  # whatever it is, the study goes on
            return failed(trial, f"{type(error).__name__}: {one_line(error)}")

    def splits(self, seed: int, examples: int = 0) -> Splits:
        """The parts that ``seed`` cuts, with so many training examples (0: all)."""
        if self._splits is None or self._cut != (seed, examples):
            self._splits, self._cut = _fewer(self.data.cut(seed), examples, seed), (seed, examples)
        return self._splits

    def _perform(self, trial: Trial) -> Row:
        config, splits = trial.config, self.splits(trial.config.seed, trial.examples)
        if trial.probe:
            return _probed(trial, splits)
        model = build(trial.spec, splits.input_shape, len(splits.classes), seed=config.seed)
        history = fit(model, splits, config)
        if history.stopped == "interrupted":
            raise KeyboardInterrupt
        tested = None
        if trial.part == "judged" and splits.test is not None:
            device = next(model.parameters()).device
            tested = score(logits_of(model, splits.test, splits.scaling, device), splits.test)
        return _row(trial, history, tested)


def _probed(trial: Trial, splits: Splits) -> Row:
    start = time.perf_counter()
    found = PROBES[trial.probe](trial.spec, trial.config, splits)
    figures = {name: value for name, value in found.items() if math.isfinite(value)}
    return Row(
        variant=trial.variant,
        part=trial.part,
        seed=trial.config.seed,
        lr=trial.config.lr,
        test_accuracy=figures.get("test_accuracy", figures.get("eval_accuracy")),
        seconds=time.perf_counter() - start,
        stopped="nan" if figures.get("diverged") else "finished",
        figures=figures,
    )


def _fewer(splits: Splits, examples: int, seed: int) -> Splits:
    """``splits`` with so many examples to learn from, and at most 2,000 to validate by."""

    def drawn(part: Dataset, count: int) -> Dataset:
        if count >= len(part):
            return part
        share = 1 - count / len(part)
        return split(part, test=None, valid=share, seed=seed).train

    if not examples:
        return splits
    valid = drawn(splits.valid, min(examples, VALIDATED))
    return Splits(drawn(splits.train, examples), valid, splits.test)


def _row(trial: Trial, history: History, tested: Scores | None) -> Row:
    best = history.best
    return Row(
        variant=trial.variant,
        part=trial.part,
        seed=trial.config.seed,
        lr=trial.config.lr,
        test_accuracy=tested.accuracy if tested else None,
        test_loss=_finite(tested.loss) if tested else None,
        valid_loss=best.valid_loss if best else None,
        valid_accuracy=best.valid_accuracy if best else None,
        epochs=len(history.epochs),
        best_epoch=history.best_epoch,
        seconds=history.seconds,
        stopped=history.stopped,
        curve=tuple((e.valid_loss, e.valid_accuracy, e.seconds) for e in history.epochs),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
