"""Children that end with their parent: a group of their own, and a signal when the parent is gone.

A library. A benchmark may be killed from outside at any moment (a machine that is lent by the
minute); what it started would go on holding the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def with_parent(number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """For Popen's preexec_fn: the child leads a group of its own and gets `number` if we die.

    No new session: a session would not end with the terminal or the container of the parent.
    Linux sends the signal when the starting *thread* ends, so start children from one that stays.
    """
    parent = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
            if os.getppid() != parent:  # it died in between
                os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def kill_group(process: subprocess.Popen) -> None:
    """Kill the process and all that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
