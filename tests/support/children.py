"""What child processes of the tests do alike."""

from __future__ import annotations

import signal


def heed_ctrl_c():
    """For a child process: a shell's background jobs ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
