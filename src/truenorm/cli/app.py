"""The command line: one thin function per command that parses, calls and prints.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

import truenorm
from truenorm.errors import InputError
from truenorm.training.config import TrainConfig, config_help

DONE, FOUND, MENDABLE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
OUTCOMES = {"interrupted": INTERRUPTED, "nan": MENDABLE}


def _settings(*without: str) -> type[Any]:
    """TrainConfig with every field optional: what is not said is the recipe's choice."""
    hints, help_of = typing.get_type_hints(TrainConfig), config_help()
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(TrainConfig):
        if f.name in without:
            continue
        kind = hints[f.name]
        optional: Any = kind if isinstance(kind, types.UnionType) else kind | None
        negative: dict[str, Any] = {} if kind is bool else {"negative": ""}
        told = Annotated[optional, Parameter(help=help_of[f.name], **negative)]
        fields.append((f.name, told, dataclasses.field(default=None)))
    name = "StudySettings" if without else "Settings"
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    made.__module__ = __name__  # else "types", whose classes cyclopts takes for plain values
    return made


Settings = _settings()
# Of a study these are variants, seeds and the tuner's; each of its runs has one thread.
StudySettings = _settings("batch_size", "lr", "seed", "threads")
Json = Annotated[bool, Parameter(help="Print one JSON object on stdout.", negative="")]

app = App(
    name="truenorm",
    help="Batch normalization you can trust, for PyTorch.",
    version=truenorm.__version__,
    version_flags=["--version"],
)


@app.command
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
    from truenorm.report import run as console
    from truenorm.report import run_page as html
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
            widths=_widths(widths),
            dropout=dropout,
        )
        work = job.start(data, spec, target=target, recipe=recipe, changes=given, folder=run_dir)
    ended = work.run.result()
    if ended is not None:
        console.result(ended, as_json=json)
        return OUTCOMES.get(ended["stopped"], DONE)
    with console.following(work, quiet=quiet, as_json=json) as observe:
        outcome = work.execute(observe)
    work.save(outcome, html.render(work, outcome) if outcome.judgement is not None else None)
    console.result(outcome.result, as_json=json)
    return OUTCOMES.get(outcome.history.stopped, DONE)


@app.command
def compare(
    *,
    data: str = "mnist",
    target: str | None = None,
    model: str = "mlp",
    norm: str = "none,batch,group,layer",
    batch_size: str | None = None,
    norm_position: str = "before",
    widths: str | None = None,
    dropout: str = "0",
    seeds: int | None = None,
    until: Literal["decided"] | None = None,
    max_seeds: int = 64,
    against: Literal["first", "all"] = "first",
    lr: str = "recipe",
    grid: str = "0.001,0.003,0.01,0.03,0.1",
    tuner: Literal["grid", "optuna"] = "grid",
    trials: int | None = None,
    tuning_seeds: int = 2,
    metric: str = "test_accuracy",
    margin: float | None = None,
    goal: float | None = None,
    recipe: str = "default",
    processes: int | None = None,
    engine: str = "local",
    store: Path = Path("study.sqlite"),
    retry: Annotated[bool, Parameter(negative="")] = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    settings: Annotated[StudySettings, Parameter(name="*", group="Training")] = StudySettings(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Compare norms over batch sizes with paired seeds. "Cannot tell" is an answer.

    Finished runs are kept in the store: the same command goes on after a stop, and one with
    more seeds or variants runs only what is missing.

    Parameters
    ----------
    data
        A data source as for train.
    target
        The label's column of a .csv or .parquet file.
    model
        mlp, convnet, resnet or transformer; several are compared norm by norm in each.
    norm
        Norms to compare; the first is the reference.
    batch_size
        Batch sizes, like 4,16,64; by default the recipe's own.
    norm_position
        before, after, or before,after.
    widths
        Hidden units or channels, like 256,128.
    dropout
        Probabilities, like 0,0.2.
    seeds
        Runs of each variant; by default 8, or as many as it takes to tell anything. With --until,
        those before the first look.
    until
        decided: look at the verdicts as runs come in, and stop each variant when all that is asked
        of it is told, or hopeless. The rate of errors holds over all looks.
    max_seeds
        The most runs of a variant with --until.
    against
        first: judge each norm beside the first one; all: judge every pair.
    lr
        recipe; tune, on validation data, with as many trials for each variant; or a number.
    grid
        The learning rates that tune tries.
    tuner
        grid, or optuna, which tries rates between the grid's ends and needs the extra tune.
    trials
        How many rates optuna tries for each variant; by default as many as the grid has.
    tuning_seeds
        Seeds for each of them; they are not judged.
    metric
        test_accuracy, test_loss, valid_accuracy or valid_loss.
    margin
        Differences up to this count as none, like 0.005 for half a point of accuracy.
    goal
        Validation accuracy to which epochs and seconds are counted; by default 0.99 of the best
        variant's.
    processes
        Worker processes, each on one thread; by default one for each core.
    engine
        local, or ray: a Ray cluster, which needs the extra cluster.
    store
        The SQLite file of finished runs.
    retry
        Run again what failed.
    out
        A report: .html, .md, .csv (of all runs) or .json.
    quiet
        Print nothing but the result.
    """
    _check_file(out)
    from truenorm.report import study as report

    report.kind_of(out)
    from truenorm.studies import study as studies

    given = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    changes = {
        "norm_position": _listed(norm_position),
        "widths": _widths(widths),
        "dropout": _numbers("dropout", dropout),
        **given,
    }
    with report.following(store, quiet=quiet, as_json=json) as observe:
        study = studies.compare(
            data,
            norms=_listed(norm),
            batch_sizes=None if batch_size is None else _integers("batch_size", batch_size),
            seeds=seeds,
            until=until,
            max_seeds=max_seeds,
            against=against,
            model=_listed(model),
            lr=_rate(lr),
            metric=metric,
            margin=margin,
            recipe=recipe,
            changes=changes,
            target=target,
            grid=_numbers("grid", grid),
            tuner=tuner,
            trials=trials,
            tuning_seeds=tuning_seeds,
            goal=goal,
            processes=processes,
            engine=engine,
            store=store,
            retry=retry,
            observe=observe,
        )
    if out is not None:
        report.write(study, out)
    report.result(study, out, as_json=json)
    return DONE


@app.command
def claims(
    *names: str,
    quick: Annotated[bool, Parameter(negative="")] = False,
    list: Annotated[bool, Parameter(negative="")] = False,
    data: str = "mnist",
    target: str | None = None,
    seeds: int | None = None,
    processes: int | None = None,
    store: Path = Path("claims.sqlite"),
    retry: Annotated[bool, Parameter(negative="")] = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Put the claims made for batch norm to the test: supported, refuted, or cannot tell.

    Parameters
    ----------
    names
        Claims, as --list names them; by default all.
    quick
        Fewer seeds, examples and settings; what was given up is printed.
    list
        Print all claims and end.
    data
        A data source as for train; the claims on convolutions need images.
    target
        The label's column of a .csv or .parquet file.
    seeds
        Runs of each variant, in place of each claim's own number.
    processes
        Worker processes, each on one thread; by default one for each core.
    store
        The SQLite file of finished runs; the same command goes on after a stop.
    retry
        Run again what failed.
    out
        A report: .html, .md or .json.
    quiet
        Print nothing but the findings.
    """
    from truenorm.report import claims as report

    if list:
        report.listed(as_json=json)
        return DONE
    _check_file(out)
    report.kind_of(out)
    from truenorm.studies.claims import catalogue as tests

    with report.following(store, quiet=quiet, as_json=json) as observe:
        found = tests.claims(
            names,
            data=data,
            target=target,
            quick=quick,
            seeds=seeds,
            processes=processes,
            store=store,
            retry=retry,
            observe=observe,
            found=None if json else report.finding,
        )
    if out is not None:
        report.write(found, out)
    if json:
        from truenorm.training.run import to_json

        print(to_json(found.to_json()))
        return DONE
    report.left_out(found)
    if out is not None:
        print(out)
    return DONE


@app.command
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
    from truenorm.report import run as console
    from truenorm.training import predict as prediction

    predicted = prediction.predict(run, data, target=target)
    console.predictions(predicted, out, as_json=json)
    return DONE


@app.command
def doctor(
    target: str | None = None,
    *,
    data: str | None = None,
    label: str | None = None,
    format: Literal["text", "json", "sarif", "html"] | None = None,
    fail_on: Literal["error", "warning", "note"] = "warning",
    baseline: Path | None = None,
    fix: Annotated[bool, Parameter(negative="")] = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    list: Annotated[bool, Parameter(negative="")] = False,
    explain: str | None = None,
    json: Json = False,
) -> int:
    """Say what is wrong with a model's normalization. Exit status 0: healthy, 1: findings.

    Parameters
    ----------
    target
        A run folder; package.module:factory, a function that returns a model, or a model and
        its batches; or a .safetensors, .pt, .pth, .bin or .ckpt checkpoint, of which the tensors
        alone are examined.
    data
        A data source as for train; by default the run's own. Without data only structure and
        buffers are looked at.
    label
        The label's column of a .csv or .parquet file.
    format
        How to print the diagnosis; by default as --out's suffix says (.json, .sarif or .html),
        else text.
    fail_on
        The least severity that makes the exit status 1.
    baseline
        An earlier diagnosis as JSON: what it holds already does not fail.
    fix
        Apply the remedies that can be applied, and write the mended model to --out; the
        diagnosis, and the exit status, are then those of the mended model.
    out
        Where to write: the mended model with --fix (its state dict; safetensors, or torch.save's
        format for .pt and .pth), else the diagnosis. A file that exists is replaced.
    list
        Print all codes and end.
    explain
        Print the page of one code and end.
    """
    if list or explain is not None:
        from truenorm.report import codes

        if list:
            codes.listed(as_json=json)
        else:
            codes.explained(explain or "", as_json=json)
        return DONE
    if target is None:
        raise InputError("doctor needs a target: a run folder, package.module:factory or a file.")
    if json and format not in (None, "json"):
        raise InputError(f"--json and --format {format} contradict each other; choose one.")
    if fix and out is None:
        raise InputError("--fix needs --out FILE, where the mended model goes.")
    _check_file(out)

    from truenorm.cli import target as targets
    from truenorm.report import diagnosis as report

    known = targets.known(baseline) if baseline is not None else set()
    opened = targets.open_target(target, data, label)
    kind = "json" if json else format or ("text" if fix else report.format_of(out))
    applied = None
    with targets.foreign(f"{target} could not be examined"):
        diagnosis = truenorm.examine(opened.model, opened.batches)
        if fix:
            applied = diagnosis.fix()
            diagnosis = truenorm.examine(opened.model, opened.batches)
    if fix and out is not None:
        opened.save(out)
        report.mended(applied or (), out)
    report.deliver(diagnosis, opened, kind, None if fix else out, applied)
    if baseline is not None:
        report.forgiven(diagnosis, known, baseline)
    return FOUND if diagnosis.worse_than(fail_on, known) else DONE


@app.command
def recalibrate(
    target: str,
    *,
    data: str | None = None,
    label: str | None = None,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    one_pass: Annotated[bool, Parameter(negative="")] = False,
    keep_worse: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Give batch norms the exact running statistics of data, and write the model.

    Exit status 1 and no file if it would be worse on held-out data.

    Parameters
    ----------
    target
        A run folder, or package.module:factory.
    data
        A data source as for train; by default the run's own training part.
    label
        The label's column of a .csv or .parquet file.
    out
        The file for the model's state dict: safetensors, or torch.save's format for .pt and .pth.
        One that exists is replaced.
    one_pass
        One pass over the data: exact for the first layer alone.
    keep_worse
        Write the model even if its loss on held-out data is higher.
    """
    from truenorm.cli import target as targets
    from truenorm.report import diagnosis as report

    _check_file(out)
    if targets.is_checkpoint(target):
        raise InputError(
            f"{target}: a checkpoint has no model to run data through; give a run folder or "
            "package.module:factory."
        )
    opened = targets.open_target(target, data, label, most=None)
    if opened.batches is None:
        raise InputError("recalibrate needs data; name a source with --data.")
    with targets.foreign(f"{target} could not be recalibrated"):
        result = truenorm.recalibrate(
            opened.model,
            opened.batches,
            held_out=opened.held_out,
            exact=not one_pass,
            keep_worse=keep_worse,
        )
    if result.kept:
        opened.save(out)
    report.recalibrated(result, out, as_json=json)
    return DONE if result.kept else FOUND


@app.command
def fold(
    target: str,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    data: str | None = None,
    label: str | None = None,
    shape: str | None = None,
    json: Json = False,
) -> int:
    """Fold batch norms into the weights beside them, for inference; prove each pair.

    Parameters
    ----------
    target
        A run folder, or package.module:factory.
    out
        The .safetensors file for the folded model, which predict and truenorm.load_folded take;
        without it, say what can be folded.
    data
        A data source for a factory that returns no batches.
    label
        The label's column of a .csv or .parquet file.
    shape
        Of one example, like 3,224,224, in place of data.
    """
    from truenorm.cli import opened as shipping
    from truenorm.cli.target import foreign
    from truenorm.report import run as console

    _check_file(out)
    shipping.check_name(out, "fold")
    cargo = shipping.cargo(target, data, label, shape)
    with foreign(f"{target} could not be folded"):
        folded = cargo.fold()
    if out is not None:
        cargo.save(folded, out)
    console.folded(folded, out, as_json=json)
    return DONE


@app.command
def export(
    target: str,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    no_fold: Annotated[bool, Parameter(negative="")] = False,
    data: str | None = None,
    label: str | None = None,
    shape: str | None = None,
    json: Json = False,
) -> int:
    """Write one file that other programs run: .onnx or .pt2; run it and compare.

    Parameters
    ----------
    target
        A run folder, or package.module:factory.
    out
        The file, ending in .onnx or .pt2. A run's takes raw inputs: scaling is inside.
    no_fold
        Keep the batch norms.
    data
        A data source for a factory that returns no batches.
    label
        The label's column of a .csv or .parquet file.
    shape
        Of one example, like 3,224,224, in place of data.
    """
    from truenorm.cli import opened as shipping
    from truenorm.cli.target import foreign
    from truenorm.report import run as console

    _check_file(out)
    shipping.check_name(out, "export")
    cargo = shipping.cargo(target, data, label, shape)
    with foreign(f"{target} could not be exported"):
        exported = cargo.export(out, fold_norms=not no_fold)
    console.exported(exported, as_json=json)
    return DONE


def _check_file(out: Path | None) -> None:
    """Refuse at once what could not be written after the work."""
    if out is not None and out.is_dir():
        raise InputError(f"{out}: is a folder; --out names a file.")


def _widths(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else _integers("widths", text)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _listed(text))
    except ValueError as error:
        raise InputError(f"{name} must be integers like 256,128, got {text!r}.") from error


def _rate(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in _listed(text))
    except ValueError as error:
        raise InputError(f"{name} must be numbers like 0.01,0.1, got {text!r}.") from error
    if not numbers:
        raise InputError(f"{name} must be numbers like 0.01,0.1, got {text!r}.")
    return numbers


def main(tokens: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for what the user must mend, 130 interrupted."""
    tokens = sys.argv[1:] if tokens is None else tokens
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        code = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = UNREAD
    except (InputError, CycloptsError, OSError, MemoryError) as error:
        _refuse(_text_of(error), as_json="--json" in tokens)
        code = MENDABLE
    except KeyboardInterrupt:
        _refuse("interrupted.", as_json="--json" in tokens)
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else DONE)


def _text_of(error: BaseException) -> str:
    if isinstance(error, CycloptsError):
        return f"{error} See truenorm --help."
    return str(error) or type(error).__name__


def _refuse(text: str, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"error": text}))
    print(f"truenorm: {text}", file=sys.stderr)
