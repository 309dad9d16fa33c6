"""Connections that cannot be held for nothing: clients that send or read too slowly are cut off.

Times count from the first byte that is missed, so a client that sends or takes a byte now and then
gains nothing.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nomatmul.serve.errors import ApiError

HEADER_BYTES = 32 << 10  # of a request line and headers, where they come in pieces
KEEP_ALIVE = 30  # seconds between two requests of a connection
READING = 60.0  # seconds in which a request must have arrived
WRITING = 60.0  # seconds that a full buffer may wait for the client, at most

_ANSWERABLE = (h11.IDLE, h11.SEND_RESPONSE)  # states in which nothing of an answer has gone out


class Connection(H11Protocol):
    """uvicorn's connection with bounds; see `connections`."""

    most: ClassVar[int]
    reading_s: ClassVar[float]
    writing_s: ClassVar[float]
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    # uvicorn narrows the type in the same way
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            error = ApiError(503, "Too many connections", code="busy", headers={"Retry-After": "1"})
            self._refuse(error)
            return
        self._reading = self._after(self.reading_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_reading()
        elif self._reading is None:
            self._reading = self._after(self.reading_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._writing or self._after(self.writing_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading()
        self._stop_writing()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; the words are uvicorn's."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close, where no other answer has begun."""
        if self.conn.our_state not in _ANSWERABLE:
            self.transport.abort()
            return
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # a request whose body broke off; its application may answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _after(self, seconds: float) -> asyncio.TimerHandle:
        """Cut the connection off then; what it still had to send is dropped."""
        return self.loop.call_later(seconds, self.transport.abort)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def connections(
    most: int, *, reading_s: float = READING, writing_s: float = WRITING
) -> type[Connection]:
    """The class of connections of a server.

    most: how many there may be at once; those beyond are answered 503. reading_s, writing_s: how
    long a request may take to arrive, and a full buffer to be read.
    """
    limits = {"most": most, "reading_s": reading_s, "writing_s": writing_s}
    return type("BoundConnection", (Connection,), limits)
