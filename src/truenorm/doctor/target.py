"""What a command examines: a run folder, a factory of a module, or a checkpoint's buffers."""

from __future__ import annotations

import importlib
import itertools
import json
import pickle
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from truenorm.data import Dataset, Scaling, in_batches
from truenorm.doctor.facts import MOST_BATCHES
from truenorm.errors import InputError
from truenorm.layers import BatchNorm
from truenorm.run import Run, load_model, write_atomically
from truenorm.sources import load

BATCH_SIZE = 64  # of data given to a factory's model
_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "ema")


@dataclass(frozen=True)
class Target:
    """A model to examine.

    Attributes:
        model: in the mode it came in; a run's and a checkpoint's in eval mode.
        batches: of training data, or None.
        held_out: batches of other data with targets, or None.
        save: writes the model to a file.
    """

    model: nn.Module
    batches: list[Any] | None
    held_out: list[Any] | None
    save: Callable[[Path], None]


def open_target(
    text: str,
    data: str | None = None,
    target: str | None = None,
    *,
    most: int | None = MOST_BATCHES,
) -> Target:
    """Open a run folder, ``package.module:factory``, or a checkpoint.

    Args:
        text: what to open. A factory takes no argument and returns a model, or a model and its
            batches; a checkpoint gives its buffers alone.
        data: a data source as for ``truenorm train``; by default a run's own.
        target: the label's column.
        most: batches of training data to take at most; None for all.

    Raises:
        InputError: nothing such exists, or it cannot be read.
    """
    path = Path(text)
    if path.is_dir():
        return _of_run(path, data, target, most)
    if path.suffix in _CHECKPOINTS:
        return _of_checkpoint(path, data)
    if ":" in text:
        return _of_factory(text, data, target, most)
    raise InputError(
        f"cannot examine {text!r}: it is no run folder, no checkpoint "
        f"({', '.join(_CHECKPOINTS)}) and not package.module:factory."
    )


def _of_run(folder: Path, data: str | None, target: str | None, most: int | None) -> Target:
    run = Run.open(folder)
    request, trained = run.request(), load_model(folder)
    source = data or request.data
    if not isinstance(source, str):
        raise InputError(f"{folder}: was trained on arrays; name a source with --data.")
    splits = load(source, target=target or trained.target, seed=request.train.seed)
    trained.accept(splits.train.x[:1], source)
    size = request.train.batch_size

    def save(out: Path) -> None:
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        _save(trained.model, out, metadata)

    return Target(
        trained.model,
        _batches(splits.train, size, trained.scaling, most=most),
        _batches(splits.valid, size, trained.scaling, most=None),
        save,
    )


def _batches(data: Dataset, size: int, scaling: Scaling, *, most: int | None) -> list[Any]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    cut = in_batches(data, order, size, scaling, torch.device("cpu"))
    return [(batch.x, batch.y) for batch in itertools.islice(cut, most)]


def _of_factory(text: str, data: str | None, target: str | None, most: int | None) -> Target:
    place, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: modules beside the caller are found
    try:
        made = getattr(importlib.import_module(place), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{text}: {error}; give package.module:factory.") from error
    model, batches = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{text}: returned {type(model).__name__}, not a torch.nn.Module.")
    held: list[Any] | None = None
    if data is not None:
        splits = load(data, target=target)
        batches = _batches(splits.train, BATCH_SIZE, splits.scaling, most=most)
        held = _batches(splits.valid, BATCH_SIZE, splits.scaling, most=None)
    elif isinstance(batches, Iterable):
        batches = list(itertools.islice(batches, most))
    return Target(model, batches, held, lambda out: _save(model, out, None))


def _save(model: nn.Module, out: Path, metadata: dict[str, str] | None) -> None:
    tensors = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    write_atomically(out, lambda path: safetensors.torch.save_file(tensors, path, metadata))


def _of_checkpoint(path: Path, data: str | None) -> Target:
    if data is not None:
        raise InputError("a checkpoint has no model to run data through; leave --data out.")
    tensors = _tensors(path)

    def refuse(out: Path) -> None:
        raise InputError("a checkpoint has no model to mend; give package.module:factory.")

    return Target(_carrier(tensors, path), None, None, refuse)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be read as tensors alone ({str(error).splitlines()[0]})."
        ) from error
    for name in _NESTED:
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
    if not isinstance(held, dict):
        raise InputError(f"{path}: holds {type(held).__name__}, not a dictionary of tensors.")
    return {k: v for k, v in held.items() if isinstance(v, Tensor)}


def _carrier(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """A model of batch norms alone, under their names, with the checkpoint's buffers."""
    root = nn.Module()
    names = [k.removesuffix("running_var") for k in tensors if k.endswith("running_var")]
    names = [n for n in names if f"{n}running_mean" in tensors]
    if not names:
        raise InputError(f"{path}: holds no running_mean and running_var.")
    for name in names:
        held = {k: tensors.get(f"{name}{k}") for k in ("weight", "bias")}
        mean, var = tensors[f"{name}running_mean"], tensors[f"{name}running_var"]
        # The momentum is not in a checkpoint; None keeps every judgement on it out.
        layer = BatchNorm(len(mean), momentum=None, affine=held["weight"] is not None)
        layer._buffers["running_mean"], layer._buffers["running_var"] = mean, var
        counted = tensors.get(f"{name}num_batches_tracked")
        # Without a count nothing says that it was never updated, unless its values do.
        layer._buffers["num_batches_tracked"] = torch.tensor(0) if counted is None else counted
        for key, tensor in held.items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(key, parameter)
        _put(root, name.rstrip("."), layer)
    return root.eval()


def _put(root: nn.Module, name: str, layer: nn.Module) -> None:
    *path, last = (name or "norm").split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    root.add_module(last, layer)


def known(baseline: Path) -> set[tuple[str, str | None]]:
    """Code and layer of every finding in an earlier diagnosis's JSON.

    Raises:
        InputError: the file is none.
    """
    try:
        held = json.loads(baseline.read_text("utf-8"))["findings"]
        return {(finding["code"], finding["layer"]) for finding in held}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{baseline}: is no diagnosis ({error}); make one with "
            "truenorm doctor TARGET --format json > FILE."
        ) from error
