"""A process that a test starts, and all that come from it, found wherever they are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path


class Family:
    """A process and all that come from it, in whatever session: they inherit a mark."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.mark = directory, uuid.uuid4().hex
        path = os.pathsep.join([str(directory), *filter(None, sys.path)])
        self.environment = {**os.environ, "FAMILY": self.mark, "PYTHONPATH": path}

    def start(self, *words: str, **options: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *words], cwd=self.directory, env=self.environment, **options
        )  # type: ignore[call-overload]

    def alive(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait_for(self, count: int, limit: float = 60.0) -> int:
        """Until that many processes live; how many do."""
        end = time.monotonic() + limit
        while (living := len(self.alive())) != count and time.monotonic() < end:
            time.sleep(0.02)
        return living

    def end(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
