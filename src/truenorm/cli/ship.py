"""truenorm fold and truenorm export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from truenorm.cli.options import DONE, Json, check_file


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
    from truenorm.cli import opened
    from truenorm.cli.target import foreign
    from truenorm.report import folding as report

    check_file(out)
    opened.check_name(out, "fold")
    cargo = opened.cargo(target, data, label, shape)
    with foreign(f"{target} could not be folded"):
        folded = cargo.fold()
    if out is not None:
        cargo.save(folded, out)
    report.folded(folded, out, as_json=json)
    return DONE


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
    from truenorm.cli import opened
    from truenorm.cli.target import foreign
    from truenorm.report import folding as report

    check_file(out)
    opened.check_name(out, "export")
    cargo = opened.cargo(target, data, label, shape)
    with foreign(f"{target} could not be exported"):
        exported = cargo.export(out, fold_norms=not no_fold)
    report.exported(exported, as_json=json)
    return DONE
