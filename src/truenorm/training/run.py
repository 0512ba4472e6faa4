"""The run folder: what was asked, where it ran, how it went, and the model; all written atomically.

config.json, environment.json   before the first step
metrics.csv, checkpoint/        after each epoch
model.safetensors, result.json  at the end; result.json marks a run as ended
report.html                     by the report, last
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from truenorm.data.datasets import Dataset, Scaling, Splits
from truenorm.errors import InputError, one_line
from truenorm.folding.refold import refold
from truenorm.models import ModelSpec, build
from truenorm.training.config import TrainConfig

_CHECKPOINT = Path("checkpoint") / "last.pt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it over ``path``.

    Whoever reads ``path`` sees the old content or the new, never a part, whatever happens.

    Raises:
        InputError: the disk is full or the place cannot be written; ``path`` is as it was.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error.strerror}); what was there before is intact. "
            "Free space or choose a writable folder."
        ) from error
    finally:
        # After a success the file has its new name; where removing fails, so did writing.
        if beside.exists() and os.access(beside.parent, os.W_OK):
            beside.unlink()


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


@dataclass(frozen=True)
class Request:
    """What a run was asked to do, whole enough to do it again.

    ``data`` and ``target`` are None for data handed over from Python.
    """

    spec: ModelSpec | None
    train: TrainConfig
    recipe: str | None = None
    data: str | None = None
    target: str | None = None
    fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields, with the parts' own fields inside."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Request:
        """Undo :meth:`to_json`."""
        spec = None if stored["spec"] is None else ModelSpec.from_json(stored["spec"])
        return cls(**{**stored, "spec": spec, "train": TrainConfig(**stored["train"])})


@dataclass(frozen=True)
class Run:
    """A run folder and its files."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, request: Request) -> Run:
        """Claim ``folder`` for a new run, and record what was asked and where it runs.

        Raises:
            InputError: it holds a run already, is no folder, or cannot be written.
        """
        run = cls(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; a run needs a folder of its own.")
        if run._config.exists():
            raise InputError(
                f"{folder}: holds a run already; continue it with --resume {folder}, or choose "
                "another folder with --run-dir."
            )
        run._write("environment.json", to_json(environment(), indent=2))
        run._write("config.json", to_json(request.to_json(), indent=2))
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open an existing run.

        Raises:
            InputError: there is none.
        """
        run = cls(folder)
        if not run._config.is_file():
            raise InputError(f"{folder}: holds no run (no config.json); give a run folder.")
        return run

    def abandon(self) -> None:
        """Take back the claim on the folder, if nothing was learned in it yet."""
        if (self.folder / "metrics.csv").exists():
            return
        for name in ("config.json", "environment.json"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what else the folder holds is not ours
            self.folder.rmdir()

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    def request(self) -> Request:
        """What the run was asked to do.

        Raises:
            InputError: config.json does not parse.
        """
        try:
            return Request.from_json(json.loads(self._config.read_text("utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._config}: is no run's config ({error}).") from error

    def result(self) -> dict[str, Any] | None:
        """The result of a run that has ended, else None."""
        path = self.folder / "result.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def save_result(self, result: dict[str, Any]) -> None:
        """Write result.json, which marks the run as ended."""
        self._write("result.json", to_json(result, indent=2))

    def save_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.csv, a row an epoch."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        self._write("metrics.csv", text.getvalue())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write all that continuing needs, as one file."""
        whole = io.BytesIO()  # written by torch itself, a full disk gives an obscure error
        torch.save(state, whole)
        write_atomically(self.folder / _CHECKPOINT, lambda path: path.write_bytes(whole.getvalue()))

    def checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if no epoch was completed.

        Raises:
            InputError: it is damaged.
        """
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever its unpickler met
            raise InputError(
                f"{path}: is damaged; remove it, and the run starts over from its first epoch."
            ) from error
        return state

    def save_model(self, model: nn.Module, about: dict[str, Any]) -> None:
        """Write model.safetensors: the state dict, and as metadata how to use it again."""
        write_model(self.folder / "model.safetensors", model, about)

    def save_report(self, html: str) -> None:
        """Write report.html."""
        self._write("report.html", html)

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, lambda path: path.write_text(text, "utf-8"))


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
        path = path / "model.safetensors"
        if not path.exists():
            Run.open(Path(place))
            raise InputError(
                f"{place}: has no model.safetensors yet; finish it with --resume {place}."
            )
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
        raise InputError(
            f"{place}: its tensors do not fit the {spec.name} that this version builds "
            f"({one_line(error)}); train it again, or use the version that wrote it."
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
    )


def environment() -> dict[str, Any]:
    """Versions, machine and command: what a reader needs to judge or repeat the numbers."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "truenorm": metadata.version("truenorm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }
