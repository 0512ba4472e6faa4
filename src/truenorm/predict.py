"""What a trained run says of new data: classes, probabilities, and the accuracy if known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truenorm.data import dataset
from truenorm.evaluate import Scores, logits_of, score
from truenorm.run import load_model
from truenorm.sources import load_for_prediction


@dataclass(frozen=True)
class Prediction:
    """Predictions for N examples and K classes.

    Attributes:
        run: the run folder.
        data: the data source.
        classes: the K labels.
        predicted: the N predicted labels.
        probabilities: (N, K) float32.
        scores: loss and accuracy, where the data have labels.
    """

    run: str
    data: str
    classes: tuple[Any, ...]
    predicted: list[Any]
    probabilities: Tensor
    scores: Scores | None


def predict(run: Path | str, data: str, *, target: str | None = None) -> Prediction:
    """Classify ``data`` by the best model of ``run``.

    Raises:
        InputError: no such run or data, or the data are not of the kind it was trained on.
    """
    trained = load_model(run)
    grey = trained.input_shape[0] == 1 if len(trained.input_shape) == 3 else None
    x, labels = load_for_prediction(
        data, features=trained.features, target=target or trained.target, grey=grey
    )
    held = trained.accept(x, data)
    known = None if labels is None else dataset(x, labels, classes=trained.classes, name=data)
    logits = logits_of(trained.model, held, trained.scaling, torch.device("cpu"))
    return Prediction(
        str(run),
        data,
        trained.classes,
        [trained.classes[i] for i in logits.argmax(1).tolist()],
        logits.softmax(1),
        None if known is None else score(logits, known),
    )
