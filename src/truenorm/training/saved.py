"""A trained model as one file: written, read, rebuilt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from truenorm.data.datasets import Dataset, Scaling, Splits
from truenorm.data.preparation import Preparation
from truenorm.errors import InputError, one_line
from truenorm.factories import is_factory
from truenorm.files import write_atomically
from truenorm.folding.refold import refold
from truenorm.models import ModelSpec, build
from truenorm.training.run import Request, Run

_NAME = "model.safetensors"  # in a run folder


@dataclass(frozen=True)
class Trained:
    """A trained model, rebuilt, and what it needs to judge new data."""

    model: nn.Module
    scaling: Scaling
    input_shape: tuple[int, ...]
    input_type: str  # of stored examples: torch.uint8 or torch.float32
    classes: tuple[Any, ...]
    features: tuple[str, ...] | None
    target: str | None
    preparation: Preparation | None = None

    def accept(self, x: Tensor, name: str) -> Dataset:
        """Hold examples (N, ...) for prediction.

        Raises:
            InputError: they are not of the shape and type the model was trained on.
        """
        if tuple(x.shape[1:]) != self.input_shape or str(x.dtype) != self.input_type:
            raise InputError(
                f"{name}: examples have shape {tuple(x.shape[1:])} and type {x.dtype}, the model "
                f"was trained on {self.input_shape} and {self.input_type}; convert them."
            )
        return Dataset(x, torch.zeros(len(x), dtype=torch.int64), self.classes, name=name)


def write_model(path: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write a state dict, and as metadata plain values that say how to use it.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    header = {"truenorm": json.dumps(about)}  # one key: safetensors shuffles several
    write_atomically(path, lambda path: path.write_bytes(safetensors.torch.save(tensors, header)))


def save_model(run: Run, model: nn.Module, request: Request, splits: Splits) -> None:
    """Write a run's model.safetensors: the state dict, and as metadata how to use it again.

    Raises:
        InputError: the file cannot be written.
    """
    write_model(run.folder / _NAME, model, describe(request, splits))


def describe(request: Request, splits: Splits) -> dict[str, Any]:
    """What :func:`load_model` needs beside the weights, as plain JSON values."""
    features = splits.train.features
    return {
        "spec": None if request.spec is None else request.spec.to_json(),
        "scaling": splits.scaling.to_json(),
        "input_shape": list(splits.input_shape),
        "input_type": str(splits.train.x.dtype),
        "classes": list(splits.classes),
        "features": None if features is None else list(features),
        "target": request.target,
        "preparation": None if splits.preparation is None else splits.preparation.to_json(),
        "version": metadata.version("truenorm"),
    }


def read_model(place: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`describe` said of a run's model, and its tensors.

    Args:
        place: a run folder, or a file that was written from one.

    Raises:
        InputError: there is no finished model, or it is damaged.
    """
    path = Path(place)
    if path.suffix != ".safetensors" or path.is_dir():
        path = path / _NAME
        if not path.exists():
            Run.open(Path(place))
            raise InputError(f"{place}: has no {_NAME} yet; finish it with --resume {place}.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["truenorm"])
            tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: is damaged, missing or not TrueNorm's ({error}).") from error
    return about, tensors


def load_model(place: Path | str) -> Trained:
    """Rebuild the best model of a run, in eval mode; folded, if the file is of a folded one.

    Args:
        place: a run folder, or a file that was written from one.

    Raises:
        InputError: there is no finished model, it is damaged or of a network that this version
            does not build, or it was built from a module of the user's own, which only the user
            can build again.
    """
    about, tensors = read_model(place)
    if about.get("spec") is None:
        raise InputError(
            f"{place}: was trained from a module of your own; build it and load these weights "
            "with safetensors.torch.load_model, or truenorm.load_folded if they are folded."
        )
    spec, shape = ModelSpec.from_json(about["spec"]), tuple(about["input_shape"])
    model = build(spec, shape, len(about["classes"]), seed=0)
    scaling = Scaling.from_json(about["scaling"])
    try:
        if "folded" in about:
            model = refold(model, about["folded"])
            scaling = Scaling(None, torch.ones(1))  # the model has its own
        model.load_state_dict(tensors)
    except (AttributeError, RuntimeError) as error:
        own = is_factory(spec.name)
        built = (
            f"what {spec.name} builds now" if own else f"the {spec.name} that this version builds"
        )
        past = "bring the old code back" if own else "use the version that wrote it"
        raise InputError(
            f"{place}: its tensors do not fit {built} ({one_line(error)}); train it again, or "
            f"{past}."
        ) from error
    features = None if about["features"] is None else tuple(about["features"])
    return Trained(
        model.eval(),
        scaling,
        shape,
        about["input_type"],
        tuple(about["classes"]),
        features,
        about["target"],
        preparation_of(about),
    )


def preparation_of(about: dict[str, Any]) -> Preparation | None:
    """What training made of a table's columns, as a model's metadata keep it; None of old ones."""
    stored = about.get("preparation")
    return None if stored is None else Preparation.from_json(stored)


def load_folded(model: nn.Module, path: Path | str) -> nn.Module:
    """Give a freshly built ``model`` the structure and weights that ``truenorm fold`` wrote.

    Args:
        model: as it was before folding; it is used up.
        path: the .safetensors file.

    Returns:
        The folded model, in eval mode.

    Raises:
        InputError: the file is not of a folded model, or not of this one.
    """
    about, tensors = read_model(path)
    if "folded" not in about:
        raise InputError(f"{path}: is not of a folded model; load it with load_state_dict.")
    try:
        folded = refold(model, about["folded"])
        folded.load_state_dict(tensors)
    except (AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path}: is of another model than {type(model).__name__} ({error})."
        ) from error
    return folded.eval()
