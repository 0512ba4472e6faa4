"""Run or resume a training job in a child that is killed after some seconds; used by test_kill.

The parent imports torch once and runs nothing of it, so that each child starts at once and
nearly every kill falls into the training itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch  # noqa: F401  # imported here so that the children need not

from truenorm.cli import main


def child(tokens: list[str], seconds: float | None) -> int:
    """Fork, run the command there, kill -9 it after ``seconds``; its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while signal.sigtimedwait([signal.SIGCHLD], 0):
        pass  # the end of an earlier child
    pid = os.fork()
    if not pid:
        try:
            main(tokens)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(99)
    if seconds is not None and signal.sigtimedwait([signal.SIGCHLD], seconds) is None:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(folder: Path, options: list[str], seconds: float | None) -> int:
    """Start the run in ``folder``, or resume it, for at most ``seconds``; its exit status."""
    resumes = (folder / "config.json").exists()
    tokens = ["--resume", str(folder)] if resumes else ["--run-dir", str(folder), *options]
    return child(["train", "--quiet", *tokens], seconds)


def kill_and_finish(prefix: str, delays: list[float], options: list[str]) -> None:
    """Kill runs after the ``delays``; one that ends sooner is followed by another, from anew.

    Prints the status of every child.
    """
    ended = 0
    for delay in delays:
        while (status := train(Path(f"{prefix}{ended}"), options, delay)) == 0:
            print(status, flush=True)  # flushed, or the next child would print it again
            ended += 1
        print(status, flush=True)
    print(train(Path(f"{prefix}{ended}"), options, None))


if __name__ == "__main__":
    kill_and_finish(sys.argv[1], [float(d) for d in sys.argv[2].split(",") if d], sys.argv[3:])
