"""Long-running programs: in a process of their own, with a log, a priority and a time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nomatmul.hardware.tools import check_status, started

_LOOK = 0.5  # seconds between looks at a log


class TimeLimit(RuntimeError):
    """A program was ended because it took too long."""


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
    with (
        log.open("wb") as file,
        log.open(encoding="utf-8", errors="replace") as lines,
        started(words, cwd=folder, output=file, preexec_fn=lambda: _lower(niceness)) as process,
    ):
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
    check_status(process, log.read_text("utf-8", "replace"))
    return time.monotonic() - start


def _lower(niceness: int) -> None:
    os.nice(niceness)
