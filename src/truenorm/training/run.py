"""A run folder: what was asked, where it ran and how it went, each file written atomically.

config.json, environment.json   before the first step
metrics.csv, checkpoint/        after each epoch
model.safetensors               at the end, by truenorm.training.saved
report.html                     by the report
result.json                     last; it marks a run as ended
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from truenorm.data.reading import Reading
from truenorm.errors import InputError
from truenorm.files import to_json, write_atomically
from truenorm.provenance import environment
from truenorm.training.config import TrainConfig

if TYPE_CHECKING:  # fit writes runs, but builds no model
    from truenorm.models import ModelSpec

_CHECKPOINT = Path("checkpoint") / "last.pt"


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
    reading: Reading = field(default_factory=Reading)

    def to_json(self) -> dict[str, Any]:
        """The fields, with the parts' own fields inside."""
        return {**dataclasses.asdict(self), "reading": self.reading.to_json()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Request:
        """Undo :meth:`to_json`."""
        from truenorm.models import ModelSpec

        spec = None if stored["spec"] is None else ModelSpec.from_json(stored["spec"])
        reading = Reading(**stored.get("reading", {}))
        made = {"spec": spec, "train": TrainConfig(**stored["train"]), "reading": reading}
        return cls(**{**stored, **made})


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

    def lengthen(self, epochs: int) -> None:
        """Ask for more epochs than before: a run that had ended has not, until it has them."""
        longer = dataclasses.replace(self.request().train, epochs=epochs)
        request = dataclasses.replace(self.request(), train=longer)
        (self.folder / "result.json").unlink(missing_ok=True)
        self._write("config.json", to_json(request.to_json(), indent=2))

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

    def save_report(self, html: str) -> None:
        """Write report.html."""
        self._write("report.html", html)

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    def _write(self, name: str, text: str) -> None:
        # As bytes: Windows would make another line's end of one that is in a table already.
        write_atomically(self.folder / name, lambda path: path.write_bytes(text.encode()))
