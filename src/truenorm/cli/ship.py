"""truenorm fold and truenorm export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from truenorm.cli.options import DONE, OUT, Flag, Json, Label, Model, check_file

if TYPE_CHECKING:
    from truenorm.cli.opened import Shipment


@dataclass(frozen=True, kw_only=True)
class Example:
    """Where the example comes from on which a factory's model is run."""

    data: Annotated[
        str | None, Parameter(help="A data source for a factory that returns no batches.")
    ] = None
    label: Label = None
    shape: Annotated[
        str | None, Parameter(help="Of one example, like 3,224,224, in place of data.")
    ] = None


ExampleOptions = Annotated[Example, Parameter(name="*")]
NO_EXAMPLE = Example()


def fold(
    target: Model,
    /,
    *,
    out: Annotated[Path | None, OUT] = None,
    forward_only: Flag = False,
    seconds: float | None = None,
    example: ExampleOptions = NO_EXAMPLE,
    json: Json = False,
) -> int:
    """Fold batch norms into the weights beside them, for inference; prove each pair.

    Parameters
    ----------
    out
        The .safetensors file for the folded model, which predict and truenorm.load_folded take;
        without it, say what can be folded.
    forward_only
        Fold also what makes other functions of the model's other public methods or flags.
    seconds
        That the proofs may take; the example is proved in any case, and what was not tried told.
    """
    from truenorm.factories import foreign
    from truenorm.report import folding as report

    shipment = _opened(target, example, out, "fold")
    with foreign(f"{target} could not be folded"), report.following(as_json=json) as observe:
        folded = shipment.fold(forward_only=forward_only, seconds=seconds, observe=observe)
    if out is not None:
        shipment.save(folded, out)
    report.folded(folded, out, as_json=json)
    return DONE


def export(
    target: Model,
    /,
    *,
    out: Annotated[Path, OUT],
    no_fold: Flag = False,
    example: ExampleOptions = NO_EXAMPLE,
    json: Json = False,
) -> int:
    """Write one file that other programs run: .onnx or .pt2; run it and compare.

    Parameters
    ----------
    out
        The file, ending in .onnx or .pt2. A run's takes raw inputs: scaling is inside.
    no_fold
        Keep the batch norms.
    """
    from truenorm.factories import foreign
    from truenorm.report import folding as report

    shipment = _opened(target, example, out, "export")
    with foreign(f"{target} could not be exported"):
        exported = shipment.export(out, fold_norms=not no_fold)
    report.exported(exported, as_json=json)
    return DONE


def _opened(target: str, example: Example, out: Path | None, command: str) -> Shipment:
    """What ``command`` ships; a name that cannot be written is refused before the work."""
    from truenorm.cli import opened

    check_file(out)
    opened.check_name(out, command)
    return opened.shipment(target, example.data, example.label, example.shape)
