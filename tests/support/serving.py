"""Servers for tests: in a thread of this process, or `nomatmul serve` as its users start it.

Both listen on a free port of 127.0.0.1 and are gone when the block ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nomatmul.engine.loading import BOX
from nomatmul.serve.app import create_app
from nomatmul.serve.models import BOX_NAME, ServedModel
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.run import http_server, listening, url_of
from nomatmul.serve.security import protect
from nomatmul.serve.server import Server

WAIT = 60.0  # seconds for what takes one


@dataclass
class Running:
    """A server of this process. url: without a slash at the end; `url + "/v1"` is the API."""

    url: str
    server: Server


@contextlib.contextmanager
def running_server(
    options: ServeOptions | None = None,
    models: dict[str, ServedModel] | None = None,
    grace: float = 0.0,
) -> Iterator[Running]:
    """A server in a thread: of the box's base, of those that the options name, or of `models`."""
    options = replace(options or ServeOptions(threads=1), port=0)
    if models is None and not options.models:
        options = replace(options, models=(f"{BOX_NAME}={BOX}",))
    with listening(options.host, 0) as listener:
        server = Server(options)
        server.start(models)
        http = http_server(protect(create_app(server), server), options)
        thread = threading.Thread(target=lambda: asyncio.run(http.serve([listener])))
        thread.start()
        try:
            yield Running(url_of(listener, options.host), server)
        finally:
            server.close(grace)
            http.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive(), "the server did not end"


class Process:
    """`nomatmul serve` with --json: report is what it said when it was ready."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        self.report: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return str(self.report["url"])

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Wait for the end, after a signal if one is given; returns (status, standard error)."""
        if number is not None:
            self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=WAIT)
        return self.popen.returncode, errors


@contextlib.contextmanager
def serve_process(
    *arguments: object,
    ready: bool = True,
    env: dict[str, str] | None = None,
    hangup: signal.Handlers = signal.SIG_DFL,
) -> Iterator[Process]:
    """`nomatmul serve --port 0 --json ...` in a process of its own; killed where it still runs.

    ready: wait until it serves. hangup: what SIGHUP is when it starts, whatever it is here (whoever
    runs the tests may ignore it, as nohup does).
    """
    command = [sys.executable, "-m", "nomatmul", "serve", "--port", "0", "--json"]
    popen = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )
    process = Process(popen)
    try:
        if ready:
            assert popen.stdout is not None
            line = _first_line(popen)
            assert line, f"serve ended: {popen.communicate(timeout=WAIT)}"
            process.report = json.loads(line)
        yield process
    finally:
        popen.kill()
        popen.communicate()


def _first_line(popen: subprocess.Popen[str]) -> str:
    """The first line of its output, "" where it ended without one; fails after WAIT seconds."""
    found: queue.Queue[str] = queue.Queue()
    assert popen.stdout is not None
    threading.Thread(target=lambda: found.put(popen.stdout.readline()), daemon=True).start()
    return found.get(timeout=WAIT)
