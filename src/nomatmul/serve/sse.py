"""Answers as server-sent events: everything that is ready goes out in one write.

A thin layer over sse-starlette, which sends comments while nothing happens and notices clients
that go away. Its own way to end streams with the process is switched off: the scheduler ends them,
within the server's grace.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from nomatmul.serve.answers import check_whole, encode
from nomatmul.serve.bridge import follow
from nomatmul.serve.errors import ApiError, as_api_error
from nomatmul.serve.job import Delta, Ticket, Usage

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from nomatmul.serve.scheduler import Scheduler

_log = logging.getLogger("nomatmul.serve")
HEARTBEAT = 15  # seconds
DONE = "data: [DONE]\n\n"

AppStatus.enable_automatic_graceful_drain = False


class Writer(Protocol):
    """Writes the chunks of one answer as JSON."""

    def chunks(self, delta: Delta) -> list[str]:
        """The chunks of some news of a choice, its finish among them."""

    def end(self, usage: Usage) -> list[str]:
        """The chunks behind the last choice's finish."""


class EventStream(EventSourceResponse):
    """The answer of a ticket as events; its job ends when the client goes away."""

    def __init__(self, scheduler: Scheduler, ticket: Ticket, writer: Writer) -> None:
        super().__init__(
            _events(ticket, writer),
            ping=HEARTBEAT,
            sep="\n",
            ping_message_factory=_heartbeat,
        )
        self._scheduler, self._ticket = scheduler, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; also a client that leaves before the first event was asked for ends its job."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._ticket.finished:
                self._scheduler.cancel(self._ticket)

    # the library's is a static method
    async def _listen_for_exit_signal(self) -> None:  # type: ignore[override]
        await anyio.sleep_forever()


def _heartbeat() -> ServerSentEvent:
    return ServerSentEvent(comment="waiting", sep="\n")


async def _events(ticket: Ticket, writer: Writer) -> AsyncGenerator[bytes, None]:
    """What is ready, time after time; at the end [DONE], also behind an error."""
    async for news in follow(ticket):
        parts: list[str] = []
        try:
            for delta in news:
                check_whole(ticket, delta)
                parts += map(_event, writer.chunks(delta))
            if ticket.done:
                parts += [*map(_event, writer.end(ticket.usage)), DONE]
        except Exception as error:  # the status has gone out: all that is left is an event
            if not isinstance(error, ApiError):
                _log.exception("writing an answer failed")
            parts.append(error_events(error))
            yield "".join(parts).encode()
            return
        if parts:
            yield "".join(parts).encode()


def error_events(error: Exception) -> str:
    """The end of a stream that has begun and cannot go on."""
    return f"event: error\n{_event(encode(as_api_error(error).body()))}{DONE}"


def _event(data: str) -> str:
    return f"data: {data}\n\n"
