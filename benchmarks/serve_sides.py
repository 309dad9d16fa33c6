"""The servers that are compared: started on a free port, stopped while the other is asked.

A library of serve_load.py and soak.py.
"""

from __future__ import annotations

import atexit
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from processes import Side, memory
from serve_client import Address, Answer, Load, load
from with_parent import kill_group, with_parent

START_SECONDS = 120
SETTLE_SECONDS = 0.1  # what a server does behind an answer is no part of the next one
STREAMS = 16


class Served:
    """A server in a process of its own; it runs only between `go` and `pause`."""

    path = "/v1/completions"

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        port: int,
        env: dict[str, str] | None = None,
        ready: str = "/health",
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.label, self.address, self._ready = label, ("127.0.0.1", port), ready
        self.extra = extra or {}  # fields that its requests need beside the common ones
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as self
        self.process = subprocess.Popen(
            list(command),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=with_parent(),
        )
        atexit.register(self.close)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.label} ended while it started:\n{self.said()}")
            if _answers(self.address, self._ready):
                return
            time.sleep(0.02)
        self.close()
        raise RuntimeError(f"{self.label} is not ready after {START_SECONDS} s:\n{self.said()}")

    def said(self) -> str:
        """The end of what the server wrote."""
        if self.log.closed:
            return ""
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")[-2000:]

    def go(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def work(self, clients: Sequence[Sequence[dict[str, Any]]]) -> Load:
        """Let clients work while this server runs."""
        self.go()
        try:
            found = load(self.address, self.path, clients)
            time.sleep(SETTLE_SECONDS)
            return found
        finally:
            self.pause()

    def memory(self) -> dict[str, Any]:
        return memory(self.process.pid)

    def kill(self) -> None:
        """SIGKILL, as a machine that fails."""
        kill_group(self.process)

    def close(self) -> int:
        """End the server as a service manager does; returns its exit status."""
        if self.process.poll() is None:
            self.go()
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                kill_group(self.process)
        atexit.unregister(self.close)
        return self.process.returncode


class DecodeLoop:
    """What stands in for llama-server where it cannot be built: serve_decode_loop.py."""

    label = "llama_decode loop"
    extra: dict[str, Any] = {}  # noqa: RUF012  # as of Served; it never looks at the tokens

    def __init__(self, model: Path, threads: int) -> None:
        self._side = Side("serve_decode_loop.py", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
        self._threads = threads
        self._side.ask("load", path=str(model))

    def work(self, clients: Sequence[Sequence[dict[str, Any]]]) -> Load:
        """As Served.work, of requests whose prompts are ids and whose answers are equally long."""
        prompts = [[body["prompt"] for body in bodies] for bodies in clients]
        (count,) = {body["max_tokens"] for bodies in clients for body in bodies}
        found = self._side.ask("work", threads=self._threads, clients=prompts, count=count)
        usage = {"completion_tokens": count}
        answers = [
            Answer(one["start"], one["times"], one["times"][-1], usage=usage, finish="length")
            for one in found["answers"]
        ]
        return Load(answers, found["seconds"], 0.0)

    def memory(self) -> dict[str, Any]:
        return self._side.ask("memory")

    def close(self) -> None:
        self._side.close()


def ours(label: str, models: Sequence[str], threads: int, *options: str, isa: str = "") -> Served:
    """`nomatmul serve` of models as its command line takes them; none: the model in the box."""
    port = free_port()
    command = [sys.executable, "-m", "nomatmul", "serve", *models]
    command += ["--port", str(port), "--threads", str(threads), "--max-streams", str(STREAMS)]
    env = {"NOMATMUL_ISA": isa} if isa else None
    return Served(label, [*command, *options], port, env, ready="/ready")


def theirs(binary: str, model: Path, threads: int, context: int) -> Served:
    """llama.cpp's server: 16 slots, weights read into huge pages, no copies of finished slots."""
    port = free_port()
    command = [binary, "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(STREAMS), "-c", str(STREAMS * context), "--no-ui"]
    command += ["-t", str(threads), "-tb", str(threads), "--load-mode", "none"]
    command += ["--cache-ram", "0", "--no-webui-mcp-proxy"]
    env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return Served("llama-server", command, port, env, extra={"ignore_eos": True})


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(address: Address, path: str) -> bool:
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
