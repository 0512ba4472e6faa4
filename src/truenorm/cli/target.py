"""What a command examines: a run folder, a factory of a module, or a checkpoint's tensors."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from truenorm.cli.checkpoint import carrier_of, tensors_of
from truenorm.data.batches import in_batches
from truenorm.data.datasets import Dataset, Scaling
from truenorm.data.readers.tables import is_table_name
from truenorm.data.reading import Reading
from truenorm.data.sources import load, uncut
from truenorm.doctor.facts import MOST_BATCHES
from truenorm.errors import InputError
from truenorm.factories import called, foreign, found, is_factory, offer, relative
from truenorm.files import write_atomically
from truenorm.training.run import Run
from truenorm.training.saved import load_model

BATCH_SIZE = 64  # of data given to a factory's model
_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # a mended model so named is written as torch does
_WHAT = "give a run folder, package.module:factory or a checkpoint"


@dataclass(frozen=True)
class Opened:
    """A model to examine.

    Attributes:
        model: in the mode it came in; a run's and a checkpoint's in eval mode.
        batches: of training data, that can be gone through again, or None.
        held_out: batches of other data with targets, or None.
        save: writes the model to a file.
        name: as it was given.
        file: the file it comes from, where a report places findings.
    """

    model: nn.Module
    batches: Iterable[Any] | None
    held_out: list[Any] | None
    save: Callable[[Path], None]
    name: str
    file: str


def open_target(
    text: str,
    data: str | None = None,
    target: str | None = None,
    *,
    most: int | None = MOST_BATCHES,
) -> Opened:
    """Open a run folder, ``package.module:factory``, or a checkpoint.

    Args:
        text: what to open. A factory (:mod:`truenorm.factories`) returns a model, or a model and
            its batches; a checkpoint gives its tensors alone.
        data: a data source as for ``truenorm train``; by default a run's own.
        target: the label's column.
        most: batches of training data to take at most; None for all.

    Raises:
        InputError: nothing such exists, or it cannot be read.
    """
    path = Path(text)
    if path.is_dir():
        return _of_run(path, data, target, most)
    if is_checkpoint(text):
        return _of_checkpoint(path, data)
    if is_factory(text):
        return _of_factory(text, data, target, most)
    if path.exists():
        raise InputError(f"{text}: is no checkpoint ({', '.join(_CHECKPOINTS)}); {_WHAT}.")
    raise InputError(
        f"cannot examine {text!r}: it is no run folder, no checkpoint "
        f"({', '.join(_CHECKPOINTS)}) and not package.module:factory."
    )


def check_saved(out: Path | None) -> None:
    """Refuse a name that no state dict goes by.

    Raises:
        InputError: another suffix than a checkpoint's.
    """
    if out is not None and out.suffix.lower() not in _CHECKPOINTS:
        raise InputError(
            f"{out}: --out takes the model's tensors and must end in {', '.join(_CHECKPOINTS)}."
        )


def is_checkpoint(text: str) -> bool:
    """Whether it names a file that :func:`open_target` takes for a checkpoint."""
    return Path(text).suffix in _CHECKPOINTS and not Path(text).is_dir()


def _of_run(folder: Path, data: str | None, target: str | None, most: int | None) -> Opened:
    try:
        run = Run.open(folder)
        request = run.request()
    except InputError as error:
        files = sorted(p for p in folder.iterdir() if is_checkpoint(str(p)))
        raise InputError(f"{error}" + (f" Or give {files[0]}." if files else "")) from error
    trained = load_model(folder)
    source = data or request.data
    if not isinstance(source, str):
        raise InputError(f"{folder}: was trained on arrays; name a source with --data.")
    shape = trained.input_shape
    splits = uncut(
        source,
        target=target or (trained.target if is_table_name(source) else None),
        reading=request.reading if source == request.data else Reading(),
        preparation=trained.preparation,
        image=shape if len(shape) == 3 else None,
    ).cut(request.train.seed)
    trained.accept(splits.train.x[:1], source)
    size = request.train.batch_size

    def save(out: Path) -> None:
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        _save(trained.model, out, metadata)

    return Opened(
        trained.model,
        _batches(splits.train, size, trained.scaling, most=most),
        _batches(splits.valid, size, trained.scaling, most=None),
        save,
        str(folder),
        str(folder / "model.safetensors"),
    )


def _batches(data: Dataset, size: int, scaling: Scaling, *, most: int | None) -> list[Any]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    cut = in_batches(data, order, size, scaling, torch.device("cpu"))
    return [(batch.x, batch.y) for batch in itertools.islice(cut, most)]


def _of_factory(text: str, data: str | None, target: str | None, most: int | None) -> Opened:
    splits = None if data is None else load(data, target=target)
    offered = {} if splits is None else offer(splits.input_shape, len(splits.classes))
    with foreign(text):
        module, factory = found(text, _WHAT)
        model, batches = called(factory, text, offered)
        if data is None and isinstance(batches, Iterator):  # it can be gone through only once
            batches = list(itertools.islice(batches, most))
    held_out: list[Any] | None = None
    if splits is not None:
        batches = _batches(splits.train, BATCH_SIZE, splits.scaling, most=most)
        held_out = _batches(splits.valid, BATCH_SIZE, splits.scaling, most=None)
    file = relative(getattr(module, "__file__", None) or text)
    return Opened(model, batches, held_out, lambda out: _save(model, out, None), text, file)


def _of_checkpoint(path: Path, data: str | None) -> Opened:
    if data is not None:
        raise InputError("a checkpoint has no model to run data through; leave --data out.")

    def refuse(out: Path) -> None:
        raise InputError("a checkpoint has no model to mend; give package.module:factory.")

    model = carrier_of(tensors_of(path))
    return Opened(model, None, None, refuse, str(path), str(path))


def _save(model: nn.Module, out: Path, metadata: dict[str, str] | None) -> None:
    tensors = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{key}: is {type(value).__name__} in the state dict, which a file of tensors "
                "cannot hold; mend the model in Python with truenorm.examine(...).fix()."
            )
        tensors[key] = value.detach().cpu().contiguous().clone()
    whole = io.BytesIO()  # written by torch itself, a full disk gives an obscure error
    if out.suffix in _PICKLED:
        torch.save(tensors, whole)
    else:
        whole.write(safetensors.torch.save(tensors, metadata))
    write_atomically(out, lambda path: path.write_bytes(whole.getvalue()))
