"""truenorm train and truenorm predict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from truenorm.cli.options import DONE, OUTCOMES, Json, Settings, widths_of
from truenorm.errors import InputError


def train(
    *,
    data: str = "mnist",
    target: str | None = None,
    model: str = "mlp",
    norm: str = "batch",
    norm_position: str = "before",
    widths: str | None = None,
    dropout: float = 0.0,
    recipe: str = "default",
    run_dir: Path | None = None,
    resume: Path | None = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    settings: Annotated[Settings, Parameter(name="*", group="Training")] = Settings(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a classifier, stop it at the right epoch, restore it, and test it.

    Parameters
    ----------
    data
        mnist, digits, breast_cancer, wine, iris; a folder of IDX files or of images per
        class; a .npz, .csv or .parquet file.
    target
        The label's column of a .csv or .parquet file.
    model
        mlp, convnet, resnet or transformer.
    norm
        none, batch, layer, group, instance or rms.
    norm_position
        before or after the activation (transformer: pre-norm or post-norm).
    widths
        Hidden units or channels, like 256,128.
    dropout
        Probability of dropping a hidden unit.
    recipe
        default, or classic: the textbook protocol. Training options given below win over it.
    run_dir
        The run's own folder; by default a new one in runs/.
    resume
        Continue the run in this folder; takes no other choice.
    quiet
        Print nothing but the result.
    """
    from truenorm.models import ModelSpec
    from truenorm.report import run, run_page
    from truenorm.training import job

    given = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    if resume is not None:
        others = (data, target, model, norm, norm_position, widths, dropout, recipe, run_dir)
        if given or others != ("mnist", None, "mlp", "batch", "before", None, 0.0, "default", None):
            raise InputError(
                "--resume takes every choice from the run; leave out all but --quiet and --json."
            )
        work = job.resume(resume)
    else:
        spec = ModelSpec(
            name=model,  # type: ignore[arg-type]  # checked there
            norm=norm,  # type: ignore[arg-type]
            norm_position=norm_position,  # type: ignore[arg-type]
            widths=widths_of(widths),
            dropout=dropout,
        )
        work = job.start(data, spec, target=target, recipe=recipe, changes=given, folder=run_dir)
    ended = work.run.result()
    if ended is not None:
        run.result(ended, as_json=json)
        return OUTCOMES.get(ended["stopped"], DONE)
    with run.following(work, quiet=quiet, as_json=json) as observe:
        outcome = work.execute(observe)
    work.save(outcome, run_page.render(work, outcome) if outcome.judgement is not None else None)
    run.result(outcome.result, as_json=json)
    return OUTCOMES.get(outcome.history.stopped, DONE)


def predict(
    run: Path,
    data: str,
    *,
    target: str | None = None,
    out: Path | None = None,
    json: Json = False,
) -> int:
    """Write each example's class and class probabilities, as CSV.

    Parameters
    ----------
    run
        A run folder, or a file that fold or export wrote from one.
    data
        A data source like those of train, labels or not. One with a test set of its own
        gives that.
    target
        The label's column, to state the accuracy; by default the run's.
    out
        The file to write; by default the standard output.
    """
    from truenorm.report import prediction as report
    from truenorm.training import predict as prediction

    predicted = prediction.predict(run, data, target=target)
    report.predictions(predicted, out, as_json=json)
    return DONE
