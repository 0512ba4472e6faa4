"""truenorm train and truenorm predict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from truenorm.cli.options import (
    DONE,
    OUT,
    OUTCOMES,
    Flag,
    Json,
    Label,
    ReadingOptions,
    Rereading,
    Settings,
    check_file,
    reading_of,
    widths_of,
)
from truenorm.data.reading import Reading
from truenorm.errors import InputError

if TYPE_CHECKING:
    from truenorm.models import ModelSpec
    from truenorm.training.job import Job


def _help(text: str) -> Parameter:
    return Parameter(help=text)


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """What a new run trains, on which data; a run that is resumed knows all of it."""

    data: Annotated[
        str,
        _help(
            "mnist, digits, breast_cancer, wine, iris; a folder of IDX files or of images per "
            "class; a .npz, .csv, .tsv (or .gz of these) or .parquet file."
        ),
    ] = "mnist"
    target: Label = None
    model: Annotated[
        str,
        _help(
            "mlp, convnet, resnet or transformer; or a function of your own that builds a model, "
            "as package.module:factory."
        ),
    ] = "mlp"
    norm: Annotated[
        str | None,
        _help(
            "none, batch, layer, group, instance, rms, renorm (batch renormalization) or ghost "
            "(batch norm over 16 examples at a time); by default batch, and in a model of your own "
            "what is there."
        ),
    ] = None
    norm_position: Annotated[
        str, _help("before or after the activation (transformer: pre-norm or post-norm).")
    ] = "before"
    widths: Annotated[str | None, _help("Hidden units or channels, like 256,128.")] = None
    dropout: Annotated[float, _help("Probability of dropping a hidden unit.")] = 0.0
    recipe: Annotated[
        str,
        _help(
            "default, or classic: the textbook protocol. Training options given below win over it."
        ),
    ] = "default"
    run_dir: Annotated[
        Path | None, _help("The run's own folder; by default a new one in runs/.")
    ] = None

    def spec(self) -> ModelSpec:
        """The model.

        Raises:
            InputError: there is none such.
        """
        from truenorm.factories import is_factory
        from truenorm.models import ModelSpec

        return ModelSpec(
            name=self.model,  # checked there
            norm=self.norm or ("own" if is_factory(self.model) else "batch"),  # type: ignore[arg-type]
            norm_position=self.norm_position,  # type: ignore[arg-type]
            widths=widths_of(self.widths),
            dropout=self.dropout,
        )


def train(
    *,
    new: Annotated[NewRun, Parameter(name="*")] = NewRun(),
    reading: Annotated[ReadingOptions, Parameter(name="*", group="Reading")] = ReadingOptions(),  # type: ignore[valid-type]  # noqa: B008
    resume: Path | None = None,
    quiet: Flag = False,
    json: Json = False,
    settings: Annotated[Settings, Parameter(name="*", group="Training")] = Settings(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a classifier, stop it at the right epoch, restore it, and test it.

    Parameters
    ----------
    resume
        Continue the run in this folder; takes no other choice but --epochs, more than it was
        asked for: it then goes on even if it has ended.
    quiet
        Print nothing but the result.
    """
    from truenorm.kernels.ops import keep_freed_memory
    from truenorm.report import run, run_page

    changes = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    work = _job(new, reading_of(reading), changes, resume)
    ended = work.run.result()
    if ended is not None and work.longer_than is None:
        run.result(ended, as_json=json)
        return OUTCOMES.get(ended["stopped"], DONE)
    with run.following(work, quiet=quiet, as_json=json) as observe:
        keep_freed_memory()
        outcome = work.execute(observe)
        page = run_page.render(work, outcome) if outcome.judgement is not None else None
        work.save(outcome, page)
    run.result(outcome.result, as_json=json)
    return OUTCOMES.get(outcome.history.stopped, DONE)


def _job(new: NewRun, reading: Reading, changes: dict[str, Any], resume: Path | None) -> Job:
    from truenorm.training import job

    if resume is None:
        return job.start(
            new.data,
            new.spec(),
            target=new.target,
            recipe=new.recipe,
            changes=changes,
            folder=new.run_dir,
            reading=reading,
        )
    if changes.keys() - {"epochs"} or new != NewRun() or reading != Reading():
        raise InputError(
            "--resume takes every choice from the run; leave out all but --epochs, --quiet and "
            "--json."
        )
    return job.resume(resume, epochs=changes.get("epochs"))


def predict(
    run: Path,
    /,
    *data: str,
    target: Label = None,
    reading: Annotated[Rereading, Parameter(name="*", group="Reading")] = Rereading(),  # type: ignore[valid-type]  # noqa: B008
    out: Annotated[Path | None, OUT] = None,
    json: Json = False,
) -> int:
    """Write each example's name, class and class probabilities, as CSV.

    Parameters
    ----------
    run
        A run folder, or a file that fold or export wrote from one.
    data
        A data source like those of train, labels or not, or image files. A source with a test
        set of its own gives that.
    target
        The label's column, to state the accuracy; by default the run's, if it is there.
    out
        The file to write; by default the standard output.
    """
    from truenorm.report import prediction as report
    from truenorm.training import predict as prediction

    check_file(out)
    if not data:
        raise InputError("predict needs data: a data source like those of train, or image files.")
    given = data[0] if len(data) == 1 else list(data)
    predicted = prediction.predict(run, given, target=target, reading=reading_of(reading))
    report.predictions(predicted, out, as_json=json)
    return DONE
