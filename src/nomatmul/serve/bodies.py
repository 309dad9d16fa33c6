"""Bodies of requests: read whole, up to a limit, and not nested deeper than a parser should go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nomatmul.serve.errors import ApiError, short

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_DEPTH = 64  # of JSON objects and arrays
_HELD = 8  # bodies of the largest size that may be in memory before they are parsed
_DISCARDED = 4  # times the limit that are read and thrown away, so that a client sees the refusal
_QUOTE, _BACKSLASH = 34, 92
_OPENING, _CLOSING = (91, 123), (93, 125)


class Bodies:
    """Hands an application the body of a request whole, or refuses it.

    Status 413 for more than `limit` bytes, declared or not; 400 for JSON that is nested too deep;
    415 for what is not declared as JSON, which pages of other origins may send unasked; 503 where
    too many bodies are being received.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit, self._held = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        held = _Held(self)
        try:
            body = await self._read(scope, receive, held)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except Gone:
            return
        finally:
            held.release()
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive, held: _Held) -> bytes:
        """The whole body. Raises ApiError, or Gone where the client has left."""
        pieces: list[bytes] = []
        depth = Depth()
        _check_kind(header(scope, b"content-type"))
        if _declared(scope) > self._limit:
            await self._discard(receive, _declared(scope))
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            piece = message.get("body", b"")
            held.add(len(piece))
            pieces.append(piece)
            if held.size > self._limit:
                pieces.clear()
                await self._discard(receive, held.size if message.get("more_body") else 0)
            depth.feed(piece)
            if not message.get("more_body"):
                return b"".join(pieces)

    async def _discard(self, receive: Receive, size: int) -> None:
        """Read on for a while and throw it away; always raises ApiError or Gone."""
        left = _DISCARDED * self._limit if size else 0
        while left > 0:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                break
        raise ApiError(
            413,
            f"The body is larger than the limit of {self._limit} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


class Gone(Exception):
    """The client went away before its request was there."""


class _Held:
    """Bytes of one body that is being received, counted among those of all."""

    def __init__(self, owner: Bodies) -> None:
        self._owner, self.size = owner, 0

    def add(self, count: int) -> None:
        owner = self._owner
        if owner._held + count > _HELD * owner._limit:
            headers = {"Retry-After": "1", "Connection": "close"}
            message = "Too many large requests are being received; try again in 1 s"
            raise ApiError(503, message, code="busy", headers=headers)
        self.size += count
        owner._held += count

    def release(self) -> None:
        self._owner._held -= self.size
        self.size = 0


class Depth:
    """How deep JSON is nested, piece by piece; what is no JSON is left to the parser."""

    def __init__(self, limit: int = MAX_DEPTH) -> None:
        self._limit, self._depth = limit, 0
        self._in_string = False
        self._escaped = False  # the next character, by a backslash before it

    def feed(self, piece: bytes) -> None:
        """Look at the next bytes. Raises ApiError (400) beyond the limit."""
        codes = np.frombuffer(piece, np.uint8)
        if not len(codes):
            return
        quotes = (codes == _QUOTE) & ~self._escapes(codes)
        inside = (np.cumsum(quotes) + self._in_string) % 2 == 1
        opening = ((codes == _OPENING[0]) | (codes == _OPENING[1])) & ~inside
        closing = ((codes == _CLOSING[0]) | (codes == _CLOSING[1])) & ~inside
        depths = np.cumsum(opening.astype(np.int64) - closing) + self._depth
        self._in_string, self._depth = bool(inside[-1]), int(depths[-1])
        if int(depths.max()) > self._limit:
            raise ApiError(
                400,
                f"The body is nested deeper than {self._limit} levels",
                code="nested_too_deep",
                headers={"Connection": "close"},
            )

    def _escapes(
        self, codes: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which bytes stand behind an odd number of backslashes."""
        slashes = codes == _BACKSLASH
        escaped = np.zeros(len(codes), bool)
        escaped[0], self._escaped = self._escaped, False
        if not slashes.any():
            return escaped
        if escaped[0]:
            slashes[0] = False  # itself escaped: begins nothing
        padded = np.concatenate([[False], slashes, [False]])
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        starts, ends = edges[::2], edges[1::2]
        behind = ends[(ends - starts) % 2 == 1]
        self._escaped = bool(len(behind) and behind[-1] == len(codes))
        escaped[behind[behind < len(codes)]] = True
        return escaped


def _check_kind(value: bytes) -> None:
    kind = value.partition(b";")[0].strip().lower().decode("latin-1")
    if kind != "application/json":
        found = f", got {short(kind)}" if kind else ""
        message = f"The header Content-Type must be application/json{found}"
        raise ApiError(415, message, code="not_json", headers={"Connection": "close"})


def _declared(scope: Scope) -> int:
    value = header(scope, b"content-length")
    return int(value) if value.isdigit() else 0


def header(scope: Scope, wanted: bytes) -> bytes:
    """The first value of a header, b"" where there is none."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for name, value in headers if name == wanted), b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that has the whole body as its first message."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
