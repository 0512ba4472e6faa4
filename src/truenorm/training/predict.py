"""What a trained run says of new data: classes, probabilities, and the accuracy if known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.data.datasets import Scaling, dataset
from truenorm.data.reading import Reading
from truenorm.data.sources import load_for_prediction
from truenorm.errors import InputError
from truenorm.folding.export import FORMATS, Program, load_program
from truenorm.training.evaluate import Scores, logits_of, score
from truenorm.training.saved import Trained, load_model, preparation_of


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
        called: what the examples' names are: "file", the id's column, or "row".
        names: the N names.
        notes: what the user should know of how the data were read.
    """

    run: str
    data: str
    classes: tuple[Any, ...]
    predicted: list[Any]
    probabilities: Tensor
    scores: Scores | None
    called: str
    names: list[Any]
    notes: tuple[str, ...] = ()


def predict(
    run: Path | str,
    data: str | list[str],
    *,
    target: str | None = None,
    reading: Reading | None = None,
) -> Prediction:
    """Classify ``data`` by the best model of ``run``.

    Args:
        run: a run folder, a file that ``truenorm fold`` wrote, or one that ``truenorm export``
            wrote.
        data: a data source, or a list of image files.
        target: the label's column, to score by; by default the run's, if it is there.
        reading: how the data are read; by default as training did, but for the id.

    Raises:
        InputError: no such run or data, or the data are not of the kind it was trained on.
    """
    path = Path(run)
    trained = _exported(path) if path.suffix in FORMATS else load_model(run)
    reading = reading or Reading()
    name = data if isinstance(data, str) else f"{len(data)} images"
    given = load_for_prediction(
        data,
        features=trained.features,
        preparation=trained.preparation,
        target=target,
        label=trained.target,
        image=trained.input_shape if len(trained.input_shape) == 3 else None,
        reading=reading,
    )
    unlabelled = trained.accept(given.x, name)
    known, notes = None, given.notes
    if given.labels is not None:
        try:
            known = dataset(given.x, given.labels, classes=trained.classes, name=name)
        except InputError as error:
            if target is not None:
                raise
            why, _, _ = str(error).partition(";")  # what to do about it is for training's data
            notes = (*notes, f"nothing is scored: {why}")
    logits = logits_of(trained.model, unlabelled, trained.scaling, torch.device("cpu"))
    called = reading.id or ("row" if given.ids is None else "file")
    return Prediction(
        str(run),
        name,
        trained.classes,
        [trained.classes[i] for i in logits.argmax(1).tolist()],
        logits.softmax(1),
        None if known is None else score(logits, known),
        called,
        list(range(len(given.x))) if given.ids is None else given.ids.tolist(),
        notes,
    )


class _Exported(nn.Module):
    """An exported file in a model's place."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        super().__init__()
        self._program, self._dtype = program, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._program.run((x.to(self._dtype),), {})[0]


def _exported(path: Path) -> Trained:
    program = load_program(path)
    about = program.about
    if "classes" not in about or "input_type" not in about:
        raise InputError(
            f"{path}: does not say what its classes are; export it from a run folder, or run it "
            "with truenorm.load_program."
        )
    dtype = getattr(torch, about["input_type"].removeprefix("torch."))
    features = about.get("features")
    return Trained(
        _Exported(program, dtype),
        Scaling(None, torch.ones(1)),  # the file scales
        tuple(about["input_shape"]),
        about["input_type"],
        tuple(about["classes"]),
        None if features is None else tuple(features),
        about.get("target"),
        preparation_of(about),
    )
