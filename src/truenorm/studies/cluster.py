"""Trials on a Ray cluster, by the extra ``cluster``: the rows are those of local processes."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from truenorm.data.datasets import Uncut
from truenorm.errors import InputError, one_line
from truenorm.studies.bench import Bench
from truenorm.studies.trial import ATTEMPTS, Row, Trial, failed

ANSWER = 10.0  # seconds that the head of a cluster may take to answer


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "engine 'ray' needs the package ray: pip install 'truenorm[cluster]'."
        ) from error
    return ray


def _reach(address: str) -> None:
    """Raise ConnectionError if nobody answers there; ray would try again for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
    except (OSError, OverflowError, UnicodeError) as error:  # no answer, port or name
        raise ConnectionError(str(error)) from error


@dataclass(eq=False)
class RayPool:
    """Ray actors over ``data``, ``count`` or one for each core of the cluster.

    Joins the cluster that the caller's ``ray.init()`` or RAY_ADDRESS names, or one that runs on
    this machine, and leaves it as it was; else starts one and ends it with the context.

    Raises:
        InputError: ray is not installed, or the cluster that RAY_ADDRESS names is not there.
    """

    data: Uncut
    count: int | None

    def __post_init__(self) -> None:
        self.ray = _ray()

    def __enter__(self) -> RayPool:
        self._connected = not self.ray.is_initialized()
        if self._connected:
            self._connect()
        cores = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        self.count = min(self.count or cores, cores)
        self._data = self.ray.put(self.data)
        self._idle: list[Any] = []
        self._actors: list[Any] = []
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self.ray.kill(actor)
        if self._connected:
            self.ray.shutdown()  # of a cluster that was joined, only the connection

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = logging.ERROR  # how ray starts is no part of what a study tells
        address = os.environ.get("RAY_ADDRESS")
        try:
            _reach(address or "")
            self.ray.init(log_to_driver=False, include_dashboard=False, logging_level=quiet)
        except (ConnectionError, ValueError) as error:
            raise InputError(
                f"engine 'ray' found no cluster ({one_line(error)}); RAY_ADDRESS is "
                f"{address!r}: start that one, or unset it."
            ) from error

    def run(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Row]]:
        """Run ``trials`` and yield each with its row, as they come."""
        waiting = deque((trial, 1) for trial in trials)
        working: dict[Any, tuple[Any, Trial, int]] = {}
        while waiting or working:
            while waiting and (actor := self._free()) is not None:
                trial, attempt = waiting.popleft()
                working[actor.perform.remote(trial)] = (actor, trial, attempt)
            done, _ = self.ray.wait(list(working), num_returns=1)
            actor, trial, attempt = working.pop(done[0])
            try:
                row = self.ray.get(done[0])
                self._idle.append(actor)
            except self.ray.exceptions.RayError as error:  # its process died
                self._actors.remove(actor)
                self.ray.kill(actor)  # or, where only its answer was lost, it would keep a core
                if attempt < ATTEMPTS:
                    waiting.appendleft((trial, attempt + 1))
                    continue
                text = f"its worker process died {attempt} times ({type(error).__name__})"
                row = failed(trial, text)
            yield trial, row

    def _free(self) -> Any:
        """An actor with nothing to do, a new one if there may be more, or None."""
        assert self.count is not None
        if self._idle:
            return self._idle.pop()
        if len(self._actors) == self.count:
            return None
        self._actors.append(self.ray.remote(num_cpus=1)(Bench).remote(self._data))
        return self._actors[-1]
