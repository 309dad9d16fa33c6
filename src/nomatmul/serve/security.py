"""What stands between the network and the application: keys, names, readiness, bodies, headers.

`protect` puts middlewares around an application, from the outside in: `Observer` (headers,
counters), pages of other origins, the names that the server may be called by, the size of headers,
keys, whether it takes work, bodies.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from nomatmul.serve.bodies import Bodies, header
from nomatmul.serve.connections import HEADER_BYTES
from nomatmul.serve.errors import ApiError
from nomatmul.serve.observe import Observer

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from nomatmul.serve.server import Server

MAX_HEADERS = 100
# Paths that need no key: whether the server lives, and the page, which asks for the key itself.
OPEN = frozenset({"/", "/health", "/ready"})
# Paths that are answered while models are loaded and while the server closes.
ALWAYS = frozenset({"/", "/health", "/ready", "/metrics"})


def protect(app: ASGIApp, server: Server) -> ASGIApp:
    """The application behind everything that this server's options ask for."""
    options = server.options
    app = Bodies(app, options.max_body)
    app = _Ready(app, server)
    app = _Clients(app, options.api_keys)
    app = _Headers(app)
    if is_loopback(options.host) and not options.api_keys:
        app = _Names(app, options.allow_host)
    if options.cors:
        app = CORSMiddleware(
            app,
            allow_origins=list(options.cors),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Observer(app, server)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Keys:
    """The keys of a server; the time that a comparison takes says nothing about them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode("utf-8")) for key in keys]

    def find(self, key: bytes) -> int | None:
        """The number of a key; None for one that is unknown."""
        digest, found = _digest(key), None
        for number, known in enumerate(self._digests):  # always all of them
            if hmac.compare_digest(digest, known):
                found = number
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class _Clients:
    """Says who asks, by key or by address, and refuses who has no key where one is needed."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, Keys(keys) if keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            address = scope.get("client")
            scope["state"]["client"] = address[0] if address else "local"
            if self._keys is not None and scope["path"] not in OPEN:
                number = self._keys.find(_bearer(scope))
                if number is None:
                    await _no_key(scope)(scope, receive, send)
                    return
                scope["state"]["client"] = f"key-{number + 1}"
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    kind, _, key = header(scope, b"authorization").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


def _no_key(scope: Scope) -> Response:
    given = bool(header(scope, b"authorization"))
    message = (
        "Incorrect API key provided"
        if given
        else "You didn't provide an API key: send it as Authorization: Bearer KEY"
    )
    headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
    refusal: Response = ApiError(401, message, code="invalid_api_key", headers=headers).response()
    return refusal


class _Names:
    """Refuses requests that call a server on a loopback address by a name of the outside.

    A page of another site may have its own name point to this machine (DNS rebinding); to the
    browser the server is then a part of that site.
    """

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self._app, self._allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._known(header(scope, b"host")):
            message = (
                "This server listens for programs of its own machine and does not know the name in"
                " the Host header; --allow-host NAME adds it"
            )
            error = ApiError(421, message, code="unknown_host", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, header: bytes) -> bool:
        host = header.decode("latin-1").lower()
        if not host:
            return True  # HTTP/1.0: no browser sends it
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name in self._allowed or is_loopback(name):
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True  # an address is no name that somebody could point here


class _Headers:
    """Refuses headers that are too many or too long; they are in memory by then, but go no further.

    What comes in pieces is refused by `connections` before it is whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            size = len(scope["raw_path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) for name, value in headers)
            if len(headers) > MAX_HEADERS or size > HEADER_BYTES:
                message = f"More than {MAX_HEADERS} headers, or {HEADER_BYTES} bytes of them"
                close = {"Connection": "close"}
                error = ApiError(431, message, code="headers_too_large", headers=close)
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Ready:
    """Refuses work while models are loaded and while the server closes."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._server.state
        if scope["type"] == "http" and state != "ready" and scope["path"] not in ALWAYS:
            loading = state == "loading"
            message = "The models are being loaded" if loading else "The server is shutting down"
            headers = {"Retry-After": "1", "Connection": "close"}
            code = "loading" if loading else "shutting_down"
            await ApiError(503, message, code=code, headers=headers).response()(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)
