"""What every response gets and leaves behind: headers against misuse, counters, a line in the log.

A line says who asked for what, how long it took and how many tokens; never a word of a prompt, an
answer or a key.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from nomatmul.serve.server import Server

_log = logging.getLogger("nomatmul.serve.requests")
_LONGEST_PATH = 200
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Observer:
    """The outermost middleware: it sees every response, those of refusals too."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        scope.setdefault("state", {})
        seen: dict[str, Any] = {"status": 500}
        scope["state"]["id"] = f"req_{secrets.token_hex(12)}"
        own = {**_HEADERS, b"x-request-id": scope["state"]["id"].encode()}

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                more = [pair for pair in own.items() if pair[0] not in present]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            self._note(scope, seen["status"], time.perf_counter() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "other")
        model, ticket = state.get("model", ""), state.get("ticket")
        self._server.metrics.count(route, status, model, ticket)
        if not _log.isEnabledFor(logging.INFO):
            return
        words = [f"{status} {seconds:.3f}s", f"id={state['id']}"]
        words.append(f"client={state.get('client', '')}")
        if model:
            words.append(f"model={model}")
        if ticket is not None:
            usage = ticket.usage
            words += [
                f"prompt={usage.prompt_tokens}",
                f"cached={usage.cached_tokens}",
                f"completion={usage.completion_tokens}",
            ]
            if usage.first_token_s is not None:
                words.append(f"first={usage.first_token_s:.3f}s")
        path = quote(scope["path"][:_LONGEST_PATH], safe="/:@")
        _log.info("%s %s %s", scope["method"], path, " ".join(words))
