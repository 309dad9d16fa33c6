"""Long-running programs: in a process of their own, with a log, a priority and a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOOK = 0.5  # seconds between looks at a log


class TimeLimit(RuntimeError):
    """A program was ended because it took too long."""


def _tie_to_parent() -> None:
    """In the child: be killed when the parent ends, however it ends (Linux)."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def run_logged(
    words: Sequence[str],
    log: Path,
    *,
    folder: Path,
    limit: float,
    niceness: int = 10,
    progress: Callable[[str], None] | None = None,
) -> float:
    """Run `words` in `folder` with all it prints in `log`; return the seconds that it took.

    progress: called with each new line of the log. Raises TimeLimit after `limit` seconds, and
    RuntimeError with the end of the log when the program fails.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: (_tie_to_parent(), os.nice(niceness)),  # type: ignore[func-returns-value]
        )
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            while True:
                ended = process.poll() is not None
                for line in lines:
                    if progress:
                        progress(line.rstrip("\n"))
                if ended:
                    break
                if time.monotonic() - start > limit:
                    raise TimeLimit(f"{Path(words[0]).name} took more than {limit:.0f} s: {log}")
                time.sleep(_LOOK)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        tail = " | ".join(log.read_text("utf-8", "replace").strip().splitlines()[-5:])
        raise RuntimeError(f"{Path(words[0]).name} failed ({process.returncode}): {tail}")
    return time.monotonic() - start
