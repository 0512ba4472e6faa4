"""The commands gathered, run, and their errors told.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import os
import sys

from cyclopts import App, CycloptsError, UnusedCliTokensError

import truenorm
from truenorm.cli.doctor import doctor, recalibrate
from truenorm.cli.info import info
from truenorm.cli.options import (
    DONE,
    INTERRUPTED,
    MENDABLE,
    UNREAD,
)
from truenorm.cli.ship import export, fold
from truenorm.cli.study import claims, compare
from truenorm.cli.train import predict, train
from truenorm.cores import share_cores
from truenorm.errors import InputError

app = App(
    name="truenorm",
    help="Batch normalization you can trust, for PyTorch.",
    version=truenorm.__version__,
    version_flags=["--version"],
    help_format="plaintext",  # a line for each command; a reader of Markdown costs 50 ms
)
for _command in (train, compare, claims, predict, doctor, recalibrate, fold, export, info):
    app.command(_command, help_format="markdown")
app.register_install_completion_command(
    help="Install the completion of commands and options for this shell.", version_flags=[]
)


def main(tokens: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for what the user must mend, 130 interrupted."""
    tokens = sys.argv[1:] if tokens is None else tokens
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may not have all that names hold
            stream.reconfigure(errors="backslashreplace")
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        with share_cores():
            code = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = UNREAD
    except (InputError, CycloptsError, OSError, MemoryError) as error:
        _refuse(_text_of(error), as_json="--json" in tokens)
        code = MENDABLE
    except KeyboardInterrupt:
        _refuse("interrupted.", as_json="--json" in tokens)
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else DONE)


def _text_of(error: BaseException) -> str:
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        given = error.unused_tokens[0]
        command = " ".join(error.command_chain or ())
        return (
            f"{command} takes no {given!r}; data are named by --data, as in truenorm {command} "
            f"--data {given}. See truenorm {command} --help."
        )
    if isinstance(error, CycloptsError):
        return f"{error} See truenorm --help."
    return str(error) or type(error).__name__


def _refuse(text: str, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"error": text}))
    print(f"truenorm: {text}", file=sys.stderr)
