"""Where trials are run, one after another, on the parts of the last seed."""

from __future__ import annotations

import math
import time

from truenorm.data.datasets import Dataset, Splits, Uncut, split
from truenorm.errors import one_line
from truenorm.models import build
from truenorm.studies.probes import PROBES
from truenorm.studies.trial import Row, Trial, failed
from truenorm.training.devices import threads
from truenorm.training.evaluate import Scores, logits_of, score
from truenorm.training.fit import fit
from truenorm.training.history import History

VALIDATED = 2_000  # examples at most to validate by, where a trial takes fewer than all


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
