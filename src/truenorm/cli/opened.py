"""What ``truenorm fold`` and ``truenorm export`` ship: a run's model, or a factory's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.calling.call import Call
from truenorm.cli.target import open_target
from truenorm.data.datasets import Scaling
from truenorm.errors import InputError
from truenorm.factories import foreign
from truenorm.folding.export import FORMATS, Exported, export
from truenorm.folding.fold import Folded, FoldObserver, fold
from truenorm.training.saved import load_model, read_model, write_model

_EXAMPLES = 4  # rows of random inputs of a run's kind; the folded model serves any number


@dataclass(frozen=True)
class Shipment:
    """A model with an example of its inputs.

    Attributes:
        model: in the mode it came in; a run's in eval mode.
        example: arguments for it, unscaled where ``scaling`` is not None.
        scaling: of its first argument, or None.
        about: metadata that travel with it.
    """

    model: nn.Module
    example: Any
    scaling: Scaling | None
    about: dict[str, Any] = field(default_factory=dict)

    def fold(
        self, *, forward_only: bool, seconds: float | None, observe: FoldObserver | None
    ) -> Folded:
        """See :func:`truenorm.fold`."""
        return fold(
            self.model,
            self.example,
            scaling=self.scaling,
            forward_only=forward_only,
            seconds=seconds,
            observe=observe,
        )

    def export(self, path: Path, *, fold_norms: bool = True) -> Exported:
        """See :func:`truenorm.export`."""
        return export(
            self.model,
            self.example,
            path,
            fold_norms=fold_norms,
            scaling=self.scaling,
            about=self.about,
        )

    def save(self, folded: Folded, path: Path) -> None:
        """Write a folded model's tensors and structure to a .safetensors file.

        Raises:
            InputError: the file cannot be written.
        """
        write_model(path, folded.model, {**self.about, "folded": folded.plan})


def shipment(
    text: str, data: str | None = None, label: str | None = None, shape: str | None = None
) -> Shipment:
    """The model that ``text`` names, with an example.

    Args:
        text: a run folder, or ``package.module:factory``.
        data: a data source for a factory that returns no batches.
        label: the label's column.
        shape: of one example, as "3,224,224", in place of data.

    Raises:
        InputError: nothing such exists, or no example can be had.
    """
    place = Path(text)
    if place.is_dir() or place.suffix == ".safetensors":
        return _of_run(place)
    opened = open_target(text, data, label, most=1)
    batch = None if opened.batches is None else next(iter(opened.batches), None)
    if shape is not None:
        batch = torch.randn(_EXAMPLES, *_sizes(shape))
    if batch is None:
        raise InputError(
            f"{text}: an example is needed; let the factory return (model, batches), or give "
            "--data SOURCE or --shape 3,224,224."
        )
    with foreign(f"{text} does not run"):
        call = Call(opened.model).prepare(batch)
    if call.args and call.kwargs:
        raise InputError(f"{text}: give a batch of positional or of named arguments, not both.")
    return Shipment(opened.model, call.kwargs or call.args, None)


def _of_run(place: Path) -> Shipment:
    about, _ = read_model(place)
    if "folded" in about:
        raise InputError(f"{place}: is folded already; give the run that it came from.")
    trained = load_model(place)
    return Shipment(
        trained.model,
        examples_like(trained.scaling, trained.input_shape, trained.input_type),
        trained.scaling,
        about,
    )


def examples_like(scaling: Scaling, shape: tuple[int, ...], kind: str) -> Tensor:
    """Random raw examples: bytes, or numbers whose scaled values are standard normal."""
    generator = torch.Generator().manual_seed(0)
    if kind == "torch.uint8":
        size = (_EXAMPLES, *shape)
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    noise = torch.randn(_EXAMPLES, *shape, generator=generator)
    raw = noise / scaling.scale
    return raw if scaling.shift is None else raw + scaling.shift


def _sizes(shape: str) -> list[int]:
    try:
        sizes = [int(part) for part in shape.replace("x", ",").split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InputError(f"--shape must be sizes like 3,224,224, got {shape!r}.")
    return sizes


def check_name(path: Path | None, kind: str) -> None:
    """Refuse at once a name that fits no format.

    Raises:
        InputError: ``path`` does not end as files of ``kind`` do.
    """
    endings = [".safetensors"] if kind == "fold" else list(FORMATS)
    if path is not None and path.suffix not in endings:
        raise InputError(
            f"--out must end in {' or '.join(endings)} for truenorm {kind}, got {path}."
        )
