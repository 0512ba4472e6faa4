"""When training has gone on long enough."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Stop when the validation loss has not fallen by ``min_delta`` for ``patience`` epochs."""

    patience: int
    min_delta: float  # absolute, so that it means the same at every scale of the loss
    best: float = math.inf
    best_epoch: int = 0

    def improved(self, epoch: int, loss: float) -> bool:
        """Record ``loss``; True if it is the new best. NaN never is."""
        if not loss < self.best - self.min_delta:
            return False
        self.best, self.best_epoch = loss, epoch
        return True

    def exhausted(self, epoch: int) -> bool:
        """Whether ``patience`` epochs have passed since the best."""
        return epoch - self.best_epoch >= self.patience
