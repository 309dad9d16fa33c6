"""Children that end with their parent, and groups that are killed whole. A library.

A benchmark may be killed from outside at any moment (a machine that is lent by the minute); what it
started would go on holding the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes  # noqa: F401  # tie_to needs it between fork and exec, where nothing is to be imported
import os
import signal
import subprocess
from collections.abc import Callable

from nomatmul.train.children import tie_to


def with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """For Popen's preexec_fn: the child leads a group of its own and gets `number` if we die.

    No new session: a session would not end with the terminal or the container of the parent.
    Start children from a thread that stays as long as they do (nomatmul.train.children).
    """
    parent = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        tie_to(parent, number)

    return prepare


def kill_group(process: subprocess.Popen) -> None:
    """Kill the process and all that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
