"""One process that serves: the socket, the event loop, signals, the end.

SIGTERM, SIGINT and SIGHUP: no new work; answers that are being written end, or are cut when the
time of grace is over; the cache is written; exit status 0. A second signal ends the process at
once, with status 128 + its number. A signal that was ignored when the process started (`nohup`, a
shell's background job) stays ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nomatmul._extras import install_line
from nomatmul.serve.allocator import return_free_pages, return_large_blocks
from nomatmul.serve.options import ServeOptions

if TYPE_CHECKING:
    import uvicorn

    from nomatmul.serve.server import Server

PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "jinja2", "prometheus_client", "llguidance")
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
_WATCH = 10.0  # seconds between two looks at the models' files, and at free memory
_BACKLOG = 512
_SEND_BUFFER = 256 << 10
_DRAIN = 3  # seconds in which the last bytes of answers must have been read

_log = logging.getLogger("nomatmul.serve")

Report = Callable[[dict[str, Any]], None]


def serve(options: ServeOptions, show: Report) -> int:
    """Serve until a signal comes; returns the exit status.

    show: told what runs where, once the server is ready (see `startup.report`). Raises ValueError,
    OSError, MemoryError or ImportError, in one line, where it cannot start.
    """
    check_packages()
    return_large_blocks()
    with _uncollected(), listening(options.host, options.port) as listener:
        from nomatmul.serve.server import Server

        server = Server(options)
        loading = _Loading(server)  # beside the imports that follow
        try:
            from nomatmul.serve.app import create_app
            from nomatmul.serve.security import protect

            app = protect(create_app(server), server)
            asyncio.run(_Process(server, app, listener, loading, show).run())
        finally:
            loading.join()
            server.close(0.0)
    return 0


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection while packages are imported, a tenth of the time to the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def check_packages() -> None:
    """Raise ImportError, one line with the command, where a package of the extra is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"serve needs {', '.join(missing)}: {install_line('serve')}")


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound; raises ValueError with the reason."""
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {where}: {reason}") from None
    family, kind, protocol, _, address = sorted(found, key=lambda info: info[0])[0]
    with socket.socket(family, kind, protocol) as listener:
        try:
            if os.name == "posix":  # elsewhere it would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # what the kernel holds for a client that does not read
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            listener.bind(address)
            listener.listen(_BACKLOG)  # who comes before the event loop runs waits
        except OSError as error:
            raise ValueError(f"cannot listen on {where}: {error.strerror}") from None
        yield listener


def url_of(listener: socket.socket, host: str) -> str:
    """The address for a browser on this machine, or the host that was asked for."""
    name, port = listener.getsockname()[:2]
    if name in ("0.0.0.0", "::"):
        name = "127.0.0.1" if name == "0.0.0.0" else "::1"
    elif not _is_address(host):
        name = host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


class _Loading:
    """Loads the models in a thread of its own."""

    def __init__(self, server: Server) -> None:
        self.error: BaseException | None = None
        self._server = server
        self._thread = threading.Thread(target=self._load, name="nomatmul-load", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            self._server.start()
        except BaseException as error:  # raised again where it is waited for
            self.error = error

    def join(self) -> None:
        self._thread.join()


class _Process:
    """The event loop's side of `serve`."""

    def __init__(
        self, server: Server, app: Any, listener: socket.socket, loading: _Loading, show: Report
    ) -> None:
        self._server, self._loading, self._show = server, loading, show
        self._listener = listener
        self._uvicorn = http_server(app, server.options)
        self._end: asyncio.Task[None] | None = None

    async def run(self) -> None:
        with self._signals():
            opened = asyncio.create_task(self._open())
            watching = asyncio.create_task(self._watch())
            try:
                await self._uvicorn.serve([self._listener])
            finally:
                watching.cancel()
            await opened
            if self._end is not None:
                await self._end

    async def _open(self) -> None:
        """Wait for the models, and say so; an error ends the server and is raised."""
        from nomatmul.serve.startup import report

        await asyncio.to_thread(self._loading.join)
        if self._loading.error is not None:
            self._uvicorn.should_exit = True
            raise self._loading.error
        gc.freeze()  # what is there now stays: nothing of it is looked at again
        gc.enable()
        if self._server.state == "ready":
            self._show(report(self._server, url_of(self._listener, self._server.options.host)))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH)
            for model in self._server.models.values():
                await asyncio.to_thread(model.changed)
            await asyncio.to_thread(return_free_pages)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        found = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        taken = [each for each in found if signal.getsignal(each) is not signal.SIG_IGN]
        for each in taken:
            loop.add_signal_handler(each, self._signalled, each)
        try:
            yield
        finally:
            for each in taken:
                loop.remove_signal_handler(each)

    def _signalled(self, number: int) -> None:
        if self._end is not None:
            os._exit(128 + number)
        self._end = asyncio.create_task(self._close())

    async def _close(self) -> None:
        """The orderly end; connections are still answered (503) while streams end."""
        await asyncio.to_thread(self._loading.join)
        if self._server.state == "ready" and (running := self._server.scheduler.stats().running):
            grace = self._server.options.grace
            _log.info(
                "running answers (%d) go on for up to %g s; a second signal ends at once",
                running,
                grace,
            )
        await asyncio.to_thread(self._server.close)
        self._uvicorn.should_exit = True


def http_server(app: Any, options: ServeOptions) -> uvicorn.Server:
    """What speaks HTTP for an application, with this server's bounds; it takes no signals."""
    import uvicorn

    from nomatmul.serve.connections import HEADER_BYTES, KEEP_ALIVE, WRITING, connections

    class Uvicorn(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """As uvicorn's, but who has not read an answer's end by then is cut off."""
            cut = asyncio.get_running_loop().call_later(_DRAIN, self._cut)
            try:
                await super().shutdown(sockets)
            finally:
                cut.cancel()

        def _cut(self) -> None:
            for connection in list(self.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()

    config = uvicorn.Config(
        app,
        http=connections(options.max_connections, writing_s=min(options.timeout, WRITING)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=2 * _DRAIN,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Uvicorn(config)


def configure_log(options: ServeOptions) -> None:
    """Send the server's log to standard error, a line an event, requests only if asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("nomatmul: %(asctime)s %(levelname)s %(message)s"))
    for name, level in (
        ("nomatmul.serve", logging.INFO),
        ("uvicorn.error", logging.ERROR),  # below: a line for each broken request
        ("nomatmul.serve.requests", logging.INFO if options.log == "requests" else logging.WARNING),
    ):
        logging.getLogger(name).setLevel(level)
    for name in ("nomatmul.serve", "uvicorn"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).propagate = False
