"""Processes that we start end with us, whatever ends us: also SIGKILL, which nobody can handle.

A child ties itself to its parent. On Linux the kernel then kills it when the parent's thread that
started it ends (so that thread must stay as long as the child); elsewhere a thread looks whether
the parent is still the same. A program of this package is started through
`python -m nomatmul.train.children PARENT MODULE ...`, which ties it before it imports anything
that takes long; a worker of a pool ties itself in its initializer.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_LOOK = 0.5  # seconds between looks for the parent, where the kernel does not tell


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs `python -m module arguments` as a child of this very process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]


def tie_to(parent: int, number: int = signal.SIGKILL) -> None:
    """Called in a child: from now on this process gets signal `number` when `parent` ends.

    A parent that has ended already counts too.
    """
    if not _ask_kernel(number):
        threading.Thread(target=_watch, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:  # it ended before we could ask
        os.kill(os.getpid(), number)


def _ask_kernel(number: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0


def _watch(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os.kill(os.getpid(), number)


def main() -> None:
    parent, module = int(sys.argv[1]), sys.argv[2]
    tie_to(parent)
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
