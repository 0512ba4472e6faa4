"""truenorm doctor and truenorm recalibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import truenorm
from truenorm.cli.options import (
    DONE,
    FOUND,
    OUT,
    UNEXAMINED,
    Flag,
    Json,
    Label,
    Model,
    check_file,
)
from truenorm.errors import InputError


def doctor(
    target: str | None = None,
    /,
    *,
    data: str | None = None,
    label: Label = None,
    format: Literal["text", "json", "sarif", "html"] | None = None,
    fail_on: Literal["error", "warning", "note"] = "warning",
    baseline: Path | None = None,
    require_data: Flag = False,
    fix: Flag = False,
    out: Annotated[Path | None, OUT] = None,
    list: Flag = False,
    explain: str | None = None,
    json: Json = False,
) -> int:
    """Say what is wrong with a model's normalization.

    Exit status 0: no findings, 1: findings, 3: none, but no data with --require-data.

    Parameters
    ----------
    target
        A run folder; package.module:factory, a function that returns a model, or a model and
        its batches; or a .safetensors, .pt, .pth, .bin or .ckpt checkpoint, of which the tensors
        alone are examined.
    data
        A data source as for train; by default the run's own. Without data only structure and
        tensors are looked at: a model without findings is then "not examined with data".
    format
        How to print the diagnosis; by default as --out's suffix says (.json, .sarif or .html),
        else text.
    fail_on
        The least severity that makes the exit status 1.
    baseline
        An earlier diagnosis as JSON: what it holds already does not fail.
    require_data
        Exit with status 3 if there are no findings and nothing was examined with data.
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
    check_file(out)

    from truenorm.cli import target as targets
    from truenorm.factories import foreign
    from truenorm.report import diagnosis as report

    if fix:
        targets.check_saved(out)
    known = report.known(baseline) if baseline is not None else set()
    kind = "json" if json else format or ("text" if fix else report.format_of(out))
    opened = targets.open_target(target, data, label)
    applied, tried = None, 0
    with foreign(f"{target} could not be examined"):
        diagnosis = truenorm.examine(opened.model, opened.batches, held_out=opened.held_out)
        if fix:
            tried = sum(finding.fix is not None for finding in diagnosis.findings)
            applied = diagnosis.fix()
            diagnosis = truenorm.examine(opened.model, opened.batches, held_out=opened.held_out)
    if fix and out is not None:
        opened.save(out)
        report.mended(applied or (), out, tried=tried)
    place = None if fix else out
    report.deliver(diagnosis, kind, place, name=opened.name, file=opened.file, applied=applied)
    if baseline is not None:
        report.forgiven(diagnosis, known, baseline)
    if diagnosis.worse_than(fail_on, known):
        return FOUND
    return UNEXAMINED if require_data and not diagnosis.with_data else DONE


def recalibrate(
    target: Model,
    /,
    *,
    data: str | None = None,
    label: Label = None,
    out: Annotated[Path, OUT],
    one_pass: Flag = False,
    keep_worse: Flag = False,
    json: Json = False,
) -> int:
    """Give batch norms the exact running statistics of data, and write the model.

    Exit status 1 and no file if it would be worse on held-out data.

    Parameters
    ----------
    data
        A data source as for train; by default the run's own training part.
    out
        The file for the model's state dict: safetensors, or torch.save's format for .pt and .pth.
        One that exists is replaced.
    one_pass
        One pass over the data: exact for the first layer alone.
    keep_worse
        Write the model even if its loss on held-out data is higher.
    """
    from truenorm.cli import target as targets
    from truenorm.factories import foreign
    from truenorm.report import diagnosis as report

    check_file(out)
    targets.check_saved(out)
    if targets.is_checkpoint(target):
        raise InputError(
            f"{target}: a checkpoint has no model to run data through; give a run folder or "
            "package.module:factory."
        )
    opened = targets.open_target(target, data, label, most=None)
    if opened.batches is None:
        raise InputError("recalibrate needs data; name a source with --data.")
    with foreign(f"{target} could not be recalibrated"):
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
