"""The rows of studies in one SQLite file, each under the digest of all that determines it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from truenorm.errors import InputError
from truenorm.studies.trial import Row, Trial

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY,
    part TEXT NOT NULL, variant TEXT NOT NULL, model TEXT NOT NULL, norm TEXT NOT NULL,
    batch_size INTEGER NOT NULL, lr REAL NOT NULL, seed INTEGER NOT NULL,
    test_accuracy REAL, valid_loss REAL, epochs INTEGER NOT NULL, seconds REAL NOT NULL,
    diverged INTEGER NOT NULL, error TEXT,
    asked TEXT NOT NULL, row TEXT NOT NULL
)
"""


class Store:
    """Rows by key. One process writes; a row is there whole, for good, when ``add`` returns.

    Raises:
        InputError: the file cannot be opened, or is none of ours.
    """

    def __init__(self, path: Path | None) -> None:
        self.name = ":memory:" if path is None else str(path)
        with self._explained():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.name, timeout=30, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            # Each row outlives a power cut; a write costs milliseconds, a run far more.
            self._file.execute("PRAGMA synchronous=FULL")
            self._file.execute(_TABLE)
            self._file.execute("SELECT key, error, row FROM runs LIMIT 1")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self, keys: Iterable[str]) -> dict[str, Row]:
        """The rows that are there of ``keys``."""
        found = {}
        with self._explained():
            for key in keys:
                kept = self._file.execute("SELECT row FROM runs WHERE key = ?", (key,)).fetchone()
                if kept is not None:
                    found[key] = Row.from_json(json.loads(kept[0]))
        return found

    def add(self, key: str, trial: Trial, row: Row) -> None:
        """Write a row, over one with the same key."""
        values = (
            *(key, row.part, row.variant, trial.spec.name, trial.spec.norm),
            *(trial.config.batch_size, row.lr, row.seed, row.test_accuracy, row.valid_loss),
            *(row.epochs, row.seconds, row.diverged, row.error),
            *(json.dumps(trial.to_json()), json.dumps(row.to_json())),
        )
        with self._explained():
            marks = ", ".join("?" * len(values))
            self._file.execute(f"INSERT OR REPLACE INTO runs VALUES ({marks})", values)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise InputError(
                f"{self.name}: cannot serve as a study's store ({error}); name another file."
            ) from error
