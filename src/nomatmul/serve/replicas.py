"""Several replicas of a server behind one address, by Ray Serve: `nomatmul serve --replicas N`.

A replica is a whole server, models, cache and engine thread, in a process of its own; a router
reads requests and sends those of one conversation to the replica that has read its beginning
(`affinity`). What a client gets of a replica is what that replica's application sent.

A replica that is lost takes its own streams with it and no other's: an answer that had begun ends
with an error, one that had not goes elsewhere, and so do later turns of its conversations, which
are computed again. Ray starts another in its place, which reads the lost one's --state-dir.

Without RAY_ADDRESS a Ray of this machine alone is started for it: loopback only, no dashboard, no
usage statistics, the smallest object store; it ends with this process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from nomatmul._extras import install_line
from nomatmul.formats.cpus import usable_cpus
from nomatmul.serve.asgi_calls import Message, call
from nomatmul.serve.replica_router import Router

if TYPE_CHECKING:
    from nomatmul.serve.options import ServeOptions

NAME = "nomatmul"  # of the application in Ray Serve
MAX_REPLICAS = 1024
# Ray's switch for a node that only this machine reaches, whatever its name says.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Ray Serve's own lines: requests are logged by the replicas, and only where that was asked for.
QUIET = {"log_level": "WARNING", "enable_access_log": False}
END_SECONDS = 20.0  # for Ray to end, beside the grace of the replicas
OBJECT_STORE = 80 << 20  # bytes, about the least that Ray takes
log = logging.getLogger("nomatmul.serve")


class Replica:
    """A whole server in a process of Ray's."""

    def __init__(self, options: ServeOptions, number: int) -> None:
        from nomatmul.serve.app import create_app
        from nomatmul.serve.run import configure_log
        from nomatmul.serve.security import protect
        from nomatmul.serve.server import Server

        configure_log(options)
        if options.state_dir is not None:  # a directory serves one process at a time
            directory = options.state_dir / f"replica-{number}"
            options = dataclasses.replace(options, state_dir=directory)
        self._server = Server(options)
        self._server.start()
        self._app = protect(create_app(self._server), self._server)

    async def call(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages of the answer to a request."""
        async for message in call(self._app, scope, body):
            yield message

    async def ping(self) -> int:
        """The process id, from the event loop that answers requests."""
        return os.getpid()

    async def report(self, url: str) -> dict[str, Any]:
        """What runs here, as `startup.report`."""
        from nomatmul.serve.startup import report

        return report(self._server, url)

    def close(self) -> None:
        """Let answers end within the time of grace, and write the cache."""
        self._server.close()

    def __del__(self) -> None:  # Ray Serve calls it when it ends a replica in order
        if hasattr(self, "_server"):
            self.close()


def serve_replicas(
    options: ServeOptions, replicas: int, show: Callable[[dict[str, Any]], None]
) -> int:
    """Serve until a signal comes; returns the exit status. show: told the address when ready.

    Raises ValueError or ImportError, in one line, where it cannot start.
    """
    if not 1 <= replicas <= MAX_REPLICAS:
        raise ValueError(f"replicas must be a number from 1 to {MAX_REPLICAS}, got {replicas}")
    if importlib.util.find_spec("ray") is None:
        raise ImportError(f"--replicas needs ray: {install_line('serve-ray')}")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_USAGE_STATS_ENABLED": "0"}
    if not os.environ.get("RAY_ADDRESS"):
        os.environ |= LOOPBACK  # read when ray is imported
    from nomatmul.serve.run import check_packages, listening, url_of

    check_packages()
    with listening(options.host, options.port) as listener:  # says what is wrong; 0: a free one
        url = url_of(listener, options.host)
        port = listener.getsockname()[1]
    import ray
    from ray import serve

    ended = threading.Event()
    _connect(ray, options, replicas)
    for number in (signal.SIGTERM, signal.SIGINT):  # behind Ray, which has its own
        signal.signal(number, lambda *_: ended.set())
    try:
        _deploy(serve, options, replicas, port)
        first = serve.get_deployment_handle("replica-0", NAME)
        show({**first.report.remote(url).result(), "replicas": replicas})
        ended.wait()
    finally:
        whole = _in_time(serve.shutdown, options.grace + END_SECONDS)
        whole = _in_time(ray.shutdown, END_SECONDS) and whole
    if not whole:  # Ray's own processes were ended first: they end with this one at the latest
        log.warning("Ray did not end in order")
        os._exit(1)
    return 0


def _in_time(work: Callable[[], object], seconds: float) -> bool:
    """Whether work ended; what Ray waits for may be gone."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _connect(ray: Any, options: ServeOptions, replicas: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a Ray of this process's own."""
    quiet = {"log_to_driver": True, "logging_level": logging.WARNING}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **quiet)
        return
    ray.init(
        num_cpus=max(usable_cpus(), replicas),
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        **quiet,
    )


def _deploy(serve: Any, options: ServeOptions, replicas: int, port: int) -> None:
    """Start the proxy, a deployment for each replica, and the router; returns when all are up."""
    many = options.max_streams + options.max_queue * 2 + options.max_connections
    if options.threads is None and not os.environ.get("RAY_ADDRESS"):
        options = dataclasses.replace(options, threads=max(1, usable_cpus() // replicas))
    http = {"host": options.host, "port": port}
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
    handles = [
        serve.deployment(
            Replica,
            name=f"replica-{number}",
            num_replicas=1,
            max_ongoing_requests=many,
            ray_actor_options={"num_cpus": 1},
            health_check_period_s=1,
            graceful_shutdown_timeout_s=options.grace + 5,
        ).bind(options, number)
        for number in range(replicas)
    ]
    router = serve.deployment(
        Router, name="router", max_ongoing_requests=many, ray_actor_options={"num_cpus": 0}
    ).bind(handles, options)
    serve.run(router, name=NAME, route_prefix="/", logging_config=QUIET)
