"""What a confusion matrix says class by class, and what accuracy alone hides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassScore:
    """How one class fares, each figure from 0 to 1; 0 where it would be 0/0.

    Attributes:
        precision: of the examples taken for it, the share that are of it.
        recall: of its examples, the share taken for it.
        f1: harmonic mean of the two.
        support: its examples.
        predicted: the examples taken for it.
    """

    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True)
class ClassScores:
    """Scores of all K classes, by the usual definitions, as scikit-learn's.

    Attributes:
        of: K scores, in the order of the classes.
    """

    of: tuple[ClassScore, ...]

    @classmethod
    def from_confusion(cls, confusion: Tensor) -> ClassScores:
        """Of (K, K) counts: row the true class, column the predicted one."""
        right = confusion.diag().double()
        support, predicted = confusion.sum(1), confusion.sum(0)
        zero = torch.zeros_like(right)
        recall = torch.where(support > 0, right / support.clamp_min(1), zero)
        precision = torch.where(predicted > 0, right / predicted.clamp_min(1), zero)
        f1 = 2 * right / (support + predicted).clamp_min(1)
        rows = zip(*(t.tolist() for t in (precision, recall, f1, support, predicted)), strict=True)
        return cls(tuple(ClassScore(*row) for row in rows))

    @property
    def majority(self) -> int:
        """The class that most examples are of."""
        return max(range(len(self.of)), key=lambda i: self.of[i].support)

    @property
    def majority_share(self) -> float:
        """The accuracy of always answering the majority."""
        return self.of[self.majority].support / max(1, sum(c.support for c in self.of))

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have examples: every class counts alike.

        Source: Brodersen et al., "The balanced accuracy and its posterior distribution", 2010.
        """
        present = [c.recall for c in self.of if c.support]
        return sum(present) / max(1, len(present))

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur, among the true or the predicted ones."""
        occurring = [c.f1 for c in self.of if c.support or c.predicted]
        return sum(occurring) / max(1, len(occurring))
