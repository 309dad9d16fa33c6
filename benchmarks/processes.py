"""Two processes that take turns: requests and answers in JSON lines, the idle one stopped.

A library. The idle side is held by SIGSTOP, so neither side's spinning threads disturb the other's
figures.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Side:
    """A child process that measures; it runs only while it is asked something."""

    def __init__(self, script: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        atexit.register(self.close)  # a stopped child would outlive a benchmark that failed
        self._pause()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises RuntimeError when the child fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with {self.process.wait()}")
        self._pause()
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the child; a second call does nothing."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)


def serve(handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The child's loop: answer requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr, not between the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request["do"]](request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def rehearse(
    handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]], requests: list[dict[str, Any]]
) -> None:
    """Answer these requests alone and print them: a dry run of one side."""
    for request in requests:
        print(json.dumps({"do": request["do"], **handlers[request["do"]](request)}), flush=True)


def memory(process: int | str = "self") -> dict[str, Any]:
    """Bytes of a process: peak and present resident, and how much lies in huge pages."""
    fields: dict[str, int] = {}
    for name in ("status", "smaps_rollup"):
        for line in Path(f"/proc/{process}/{name}").read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.strip().endswith("kB"):
                fields[name] = int(rest.split()[0]) * 1024
    return {
        "peak_resident": fields["VmHWM"],
        "resident": fields["VmRSS"],
        "huge_pages": fields.get("AnonHugePages", 0),
    }
