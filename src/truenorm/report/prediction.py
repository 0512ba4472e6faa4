"""Predictions as CSV or JSON."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from truenorm.files import to_json, write_atomically
from truenorm.training.predict import Prediction


def predictions(predicted: Prediction, out: Path | None, *, as_json: bool) -> None:
    """Write predictions as CSV to ``out`` or stdout; with ``as_json``, one object on stdout.

    Raises:
        InputError: ``out`` cannot be written.
    """
    if out is not None:
        write_atomically(out, lambda path: path.write_text(_csv(predicted), "utf-8"))
    for note in predicted.notes:
        print(note, file=sys.stderr)
    scores = predicted.scores
    if as_json:
        about: dict[str, Any] = {
            "run": predicted.run,
            "data": predicted.data,
            "examples": len(predicted.predicted),
            "accuracy": scores.accuracy if scores else None,
            "loss": scores.loss if scores else None,
            "classes": list(predicted.classes),
            "out": None if out is None else str(out),
        }
        if out is None:
            about[predicted.called] = predicted.names
            about["predicted"] = predicted.predicted
            about["probabilities"] = predicted.probabilities.tolist()
        print(to_json(about))
        return
    if out is None:
        sys.stdout.write(_csv(predicted))
    count = len(predicted.predicted)
    summary = f"{count:,} example{'s' * (count != 1)}"
    if scores is not None:
        summary += f", accuracy {scores.accuracy:.2%}"
    print(summary if out is None else f"{summary}; {out}", file=sys.stderr)


def _csv(predicted: Prediction) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([predicted.called, "class", *(f"p({c})" for c in predicted.classes)])
    rows = zip(predicted.names, predicted.predicted, predicted.probabilities.tolist(), strict=True)
    for name, label, row in rows:
        writer.writerow([name, label, *(f"{p:.6g}" for p in row)])
    return text.getvalue()
