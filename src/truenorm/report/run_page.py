"""A finished job -> report.html: one page that opens offline, in light and in dark."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import torch
from torch import Tensor

from truenorm.report.pages import page
from truenorm.report.run_plots import accuracy_curve, distributions, loss_curves, per_channel
from truenorm.training.job import Job, Outcome
from truenorm.training.judgement import Judgement, NormView

_MOST_CLASSES = 40  # a larger confusion matrix is not legible; its worst cells are listed


def render(job: Job, outcome: Outcome) -> str:
    """The report page of a job that learned something."""
    judged, history = outcome.judgement, outcome.history
    assert judged is not None, "a report needs a judged model"
    environment = json.loads((job.run.folder / "environment.json").read_text("utf-8"))
    return page(
        "run.html",
        result=outcome.result,
        request=job.request,
        environment=environment,
        history=history,
        judged=judged,
        loss_svg=loss_curves(history),
        accuracy_svg=accuracy_curve(history),
        confusion=_confusion(judged),
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
        rows.append({"label": judged.data.classes[i], "cells": cells, "recall": counts[i] / total})
    return rows


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
            "number": m.number,
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
