"""What changes in a training from one epoch to the next; a checkpoint holds it whole."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from truenorm.errors import InputError, one_line
from truenorm.training.history import Epoch
from truenorm.training.steps import Stepper
from truenorm.training.stopping import EarlyStopping


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, which by itself only refers to the live tensors."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class TrainingState:
    """Model and optimizer, the epochs so far, and the best of them.

    Attributes:
        epochs: the record of each.
        best: the best epoch and the model's state at its end; 0 is before any.
        stopping: what judges them.
        since: the epoch after which the training was asked to go on longer than before.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._model, self._optimizer, config = stepper.model, stepper.optimizer, stepper.config
        self._feed, self.since = stepper.feed, 0
        self._most = config.epochs
        self.stopping = EarlyStopping(config.patience, config.min_delta)
        self.epochs: list[Epoch] = []
        self.best = (0, snapshot(self._model))

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out, which counts anew where a training was made longer."""
        done = len(self.epochs)
        return self.stopping.exhausted(done) and done - self.since >= self.stopping.patience

    @property
    def ended(self) -> bool:
        """Whether no epoch is to follow."""
        return len(self.epochs) == self._most or self.exhausted

    def add(self, record: Epoch) -> None:
        """Take in an epoch's record, and the model's state if it is the best."""
        # In this order, and the pair at once, so that Ctrl-C finds them consistent anywhere.
        self.epochs.append(record)
        if record.best:
            self.best = (record.epoch, snapshot(self._model))

    def restore_best(self) -> None:
        """Put the model back to its best epoch."""
        self._model.load_state_dict(self.best[1])

    def to_dict(self) -> dict[str, Any]:
        """All that continuing needs: tensors, numbers and text only."""
        return {
            "model": self._model.state_dict(),
            "best": self.best,
            "best_loss": self.stopping.best,
            "optimizer": self._optimizer.state(),
            "epochs": [asdict(e) for e in self.epochs],
            "feed": self._feed.state(),
            "asked": self._most,
            "since": self.since,
        }

    def load(self, stored: dict[str, Any]) -> None:
        """Take over what :meth:`to_dict` gave.

        Raises:
            InputError: it is of another model; this one is as it was.
        """
        try:
            self._model.load_state_dict(stored["model"])
        except RuntimeError as error:
            self.restore_best()  # what does fit has been written
            raise InputError(
                f"the run's checkpoint does not fit the model ({one_line(error)}); give the model "
                "that it was begun with, or begin a new run."
            ) from error
        try:
            self._optimizer.load(stored["optimizer"])
            self._feed.load(stored.get("feed", []))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self.restore_best()
            raise InputError(
                f"the run's checkpoint is of another optimizer, scheduler or loader "
                f"({one_line(error)}); give those that it was begun with, or begin a new run."
            ) from error
        self.best = stored["best"]
        self.stopping.best, self.stopping.best_epoch = stored["best_loss"], self.best[0]
        self.epochs = [Epoch(**e) for e in stored["epochs"]]
        longer = self._most > stored["asked"]
        self.since = len(self.epochs) if longer else stored.get("since", 0)
