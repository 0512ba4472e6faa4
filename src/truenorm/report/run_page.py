"""A finished training -> report.html: one page that opens offline, in light and in dark."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.calling.borrowing import unwrapped
from truenorm.data.datasets import Splits
from truenorm.data.preparation import Preparation
from truenorm.errors import InputError
from truenorm.files import write_atomically
from truenorm.provenance import environment
from truenorm.report.pages import page
from truenorm.report.run_plots import accuracy_curve, distributions, loss_curves, per_channel
from truenorm.training.config import TrainConfig
from truenorm.training.history import History
from truenorm.training.job import Job, Outcome, result_of
from truenorm.training.judgement import Judgement, NormView, judge

_MOST_CLASSES = 40  # a larger confusion matrix is not legible; its worst cells are listed


def render(job: Job, outcome: Outcome) -> str:
    """The report page of a job that learned something."""
    assert outcome.judgement is not None, "a report needs a judged model"
    asked = job.request.to_json()
    return _page(
        outcome.result,
        {**asked["train"], **asked["spec"], "data fingerprint": job.request.fingerprint},
        json.loads((job.run.folder / "environment.json").read_text("utf-8")),
        outcome.history,
        outcome.judgement,
        preparation=job.splits.preparation,
    )


def report(
    model: nn.Module,
    history: History,
    splits: Splits,
    path: Path | str,
    *,
    config: TrainConfig | None = None,
) -> None:
    """Judge ``model`` on the test part, and write the page that ``truenorm train`` writes.

    Args:
        model: any model that :func:`truenorm.fit` trained, where it lies.
        history: what fit returned.
        splits: the data; without a test part the validation part is judged.
        path: the file, like report.html; one that exists is replaced.
        config: what it was trained with, for the page's settings.

    Raises:
        InputError: the model cannot classify the data, or the file cannot be written.
    """
    if not isinstance(splits, Splits):
        raise InputError(
            f"a report needs Splits, with their examples and classes, got {type(splits).__name__};"
            " truenorm.load makes them, and truenorm.evaluate scores a model on other data."
        )
    judged = judge(model, splits)
    about = {
        "run": None,
        "data": splits.train.name,
        "model": type(unwrapped(model)).__name__,
        "norm": None,
        "recipe": None,
        "seed": None if config is None else config.seed,
    }
    settings = {} if config is None else dataclasses.asdict(config)
    settings["data fingerprint"] = splits.fingerprint()
    result = result_of(model, history, judged, splits, about)
    html = _page(result, settings, environment(), history, judged, preparation=splits.preparation)
    write_atomically(Path(path), lambda place: place.write_text(html, "utf-8"))


def _page(
    result: dict[str, Any],
    settings: dict[str, Any],
    environment: dict[str, Any],
    history: History,
    judged: Judgement,
    *,
    preparation: Preparation | None,
) -> str:
    classified = any(not math.isnan(e.valid_accuracy) for e in history.epochs)
    return page(
        "run.html",
        result=result,
        settings=settings,
        environment=environment,
        history=history,
        judged=judged,
        loss_svg=loss_curves(history),
        accuracy_svg=accuracy_curve(history) if classified else None,
        confusion=_confusion(judged),
        heat=_heat(judged) if len(judged.data.classes) > _MOST_CLASSES else None,
        by_class=list(zip(judged.data.classes, judged.by_class.of, strict=True)),
        preparation=None if preparation is None else preparation.table(),
        confused=_most_confused(judged),
        mistakes=_mistakes(judged),
        norms=[_norm(n) for n in judged.norms],
    )


def _confusion(judged: Judgement) -> list[dict[str, Any]] | None:
    """Rows of cells, each with its count and its share of the row, for shading."""
    if len(judged.data.classes) > _MOST_CLASSES:
        return None
    rows = []
    for i, counts in enumerate(judged.confusion.tolist()):
        total = max(1, sum(counts))
        cells = [
            # The root lifts rare confusions into sight beside the diagonal.
            {"count": c, "shade": round(100 * (c / total) ** 0.5), "right": i == j}
            for j, c in enumerate(counts)
        ]
        rows.append({"label": judged.data.classes[i], "cells": cells})
    return rows


def _heat(judged: Judgement) -> str:
    """The confusion matrix as a picture, a pixel a cell, for more classes than cells can name."""
    counts = judged.confusion.double()
    shade = (counts / counts.sum(1, keepdim=True).clamp_min(1)).sqrt()
    return _picture((255 * (1 - shade)).to(torch.uint8)[None])


def _most_confused(judged: Judgement, most: int = 8) -> list[dict[str, Any]]:
    wrong = judged.confusion.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().topk(min(most, wrong.numel()))
    classes, width = judged.data.classes, wrong.shape[1]
    return [
        {"true": classes[cell // width], "predicted": classes[cell % width], "count": count}
        for count, cell in zip(counts.tolist(), cells.tolist(), strict=True)
        if count
    ]


def _mistakes(judged: Judgement) -> list[dict[str, Any]]:
    classes, x = judged.data.classes, judged.data.x
    return [
        {
            "name": m.name,
            "true": classes[m.true],
            "predicted": classes[m.predicted],
            "confidence": m.confidence,
            "image": _picture(x[m.number]) if x.ndim == 4 else None,
        }
        for m in judged.mistakes
    ]


def _picture(image: Tensor) -> str:
    """A (C, H, W) example as a PNG data address; floats are stretched to their own range."""
    from PIL import Image

    if image.dtype != torch.uint8:
        low, high = image.min(), image.max()
        image = ((image - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8)
    channels = image[:3] if len(image) >= 3 else image[:1]
    array = (
        channels.permute(1, 2, 0).squeeze(2) if len(channels) == 1 else channels.permute(1, 2, 0)
    )
    file = io.BytesIO()
    Image.fromarray(array.contiguous().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _norm(view: NormView) -> dict[str, Any]:
    return {
        "name": view.name,
        "kind": view.kind,
        "distributions_svg": distributions(view),
        "channels_svg": per_channel(view),
    }
