"""The router of several replicas: reads requests, chooses, hands on, and sees who is lost."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from nomatmul.serve.affinity import PrefixTable, chain, state_of
from nomatmul.serve.asgi_calls import Message
from nomatmul.serve.errors import ApiError
from nomatmul.serve.sse import error_events

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nomatmul.serve.options import ServeOptions

PING_SECONDS, PATIENCE_SECONDS = 0.5, 5.0  # between looks at a replica, and until it counts as lost
# What a replica is told of a request.
_SCOPE = (
    *("type", "asgi", "http_version", "method", "path", "raw_path", "query_string", "headers"),
    *("scheme", "client", "server"),
)
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (.+)$")
log = logging.getLogger("nomatmul.serve")


class Router:
    """Sends requests to replicas; handles: of the replicas by their numbers."""

    def __init__(self, handles: list[Any], options: ServeOptions) -> None:
        self._handles, self._options = handles, options
        self._table = PrefixTable()
        self._load = dict.fromkeys(range(len(handles)), 0)
        self._lost = {number: asyncio.Event() for number in self._load}
        self._watching: list[asyncio.Task[None]] = []

    @property
    def _alive(self) -> set[int]:
        return {number for number, lost in self._lost.items() if not lost.is_set()}

    async def __call__(self, request: Request) -> Response:
        if not self._watching:
            self._watching = [asyncio.ensure_future(self._watch(n)) for n in self._load]
        body = await self._body(request)
        if body is None:
            limit = self._options.max_body
            return ApiError(413, f"The body is larger than {limit} bytes").response()
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        if request.method == "GET" and scope["path"] == "/metrics":
            return await self._metrics(scope)
        return await self._forward(scope, body)

    async def _body(self, request: Request) -> bytes | None:
        """The whole body; None where it is larger than replicas take."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._options.max_body:
                return None
            parts.append(part)
        return b"".join(parts)

    async def _forward(self, scope: Message, body: bytes) -> Response:
        links = chain(body) if scope["path"].startswith("/v1/") else []
        tried: set[int] = set()
        while alive := self._alive - tried:
            name = state_of(scope["path"], body)
            if name is None:
                slack = self._options.max_streams
                number = self._table.choose(links, alive, self._load, slack)
            else:
                number = PrefixTable.of_state(name, len(self._handles), alive)
            answer = _Answer(self._handles[number], scope, body, self._lost[number])
            self._load[number] += 1
            try:
                start = await answer.first()
            except BaseException as error:
                self._load[number] -= 1
                answer.cancel()
                if not _is_loss(error):
                    raise
                tried.add(number)
                log.warning("replica %d is lost; a request goes elsewhere", number)
                continue
            if start["status"] == 200:
                self._table.record(links, number)
            response = self._response(number, answer, start["status"])
            response.raw_headers = [(bytes(key), bytes(value)) for key, value in start["headers"]]
            return response
        again = {"Retry-After": "5"}
        return ApiError(503, "No replica is alive", code="no_replica", headers=again).response()

    def _response(self, number: int, answer: _Answer, status: int) -> Response:
        """Hands the rest of an answer on; its replica is free again however that ends, also where
        the client has gone before the first byte and the body is never asked for."""
        from starlette.responses import StreamingResponse

        router = self

        class Forwarded(StreamingResponse):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    router._load[number] -= 1
                    answer.cancel()

        return Forwarded(self._rest(number, answer), status_code=status)

    async def _rest(self, number: int, answer: _Answer) -> AsyncIterator[bytes]:
        """The body of an answer; ends a stream of events with an error where its replica dies."""
        try:
            async for message in answer:
                if message["type"] == "http.response.body" and message.get("body"):
                    yield message["body"]
        except Exception as error:
            if not _is_loss(error) or not answer.streams:
                raise
            log.warning("replica %d is lost in the middle of an answer", number)
            gone = ApiError(502, "The replica that wrote this answer is lost", code="replica_lost")
            yield error_events(gone).encode()

    async def _metrics(self, scope: Message) -> Response:
        """The metrics of all replicas, each sample with its replica's number."""
        from starlette.responses import Response

        pages, headers = {}, []
        for number in sorted(self._alive):
            answer = _Answer(self._handles[number], scope, b"", self._lost[number])
            try:
                start = await answer.first()
                parts = [message.get("body", b"") async for message in answer]
            except Exception as error:
                if not _is_loss(error):
                    raise
                continue
            if start["status"] != 200:  # of keys
                return Response(b"".join(parts), start["status"], media_type="application/json")
            pages[number], headers = b"".join(parts).decode(), start["headers"]
        kind = next((v.decode() for k, v in headers if bytes(k).lower() == b"content-type"), None)
        return Response(merged(pages), media_type=kind)

    async def _watch(self, number: int) -> None:
        """Look whether a replica answers, and keep that."""
        lost = self._lost[number]
        while True:
            try:
                await asyncio.wait_for(_awaited(self._handles[number].ping), PATIENCE_SECONDS)
                lost.clear()
            except Exception as error:  # whatever it is, it does not answer
                if not lost.is_set():
                    log.warning("replica %d does not answer: %s", number, type(error).__name__)
                lost.set()
            await asyncio.sleep(PING_SECONDS)


class _Answer:
    """Messages of a replica's answer. lost: is set where the replica is found dead."""

    def __init__(self, handle: Any, scope: Message, body: bytes, lost: asyncio.Event) -> None:
        self._messages = handle.options(stream=True).call.remote(scope, body)
        self._lost = lost
        self.streams = False  # whether it is a stream of events

    async def first(self) -> Message:
        """The start of the answer. Raises _Lost where the replica dies before."""
        message = asyncio.ensure_future(anext(self._messages))
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait((message, lost), return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                raise _Lost
            start: Message = message.result()
        finally:
            message.cancel()
            lost.cancel()
        kinds = [bytes(v) for k, v in start["headers"] if bytes(k).lower() == b"content-type"]
        self.streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        return start

    async def __aiter__(self) -> AsyncIterator[Message]:
        async for message in self._messages:
            yield message

    def cancel(self) -> None:
        """Tell the replica that nobody listens; nothing where the answer has ended."""
        self._messages.cancel()


class _Lost(Exception):
    """A replica that had not begun to answer is dead."""


def _is_loss(error: BaseException) -> bool:
    """Whether a replica is gone, and not its application at fault."""
    from ray.exceptions import RayActorError, WorkerCrashedError

    return isinstance(error, _Lost | RayActorError | WorkerCrashedError)


async def _awaited(method: Any) -> Any:
    return await method.remote()


def merged(pages: dict[int, str]) -> str:
    """Texts of Prometheus by replica as one, the samples of a metric together."""
    found: dict[str, list[str]] = {}
    about: dict[str, list[str]] = {}
    for number, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split()[2]
                lines = about.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
            elif sample := _SAMPLE.match(line):
                name, labels, value = sample.groups()
                labels = f'replica="{number}"' + (f",{labels}" if labels else "")
                found.setdefault(family, []).append(f"{name}{{{labels}}} {value}")
    lines = [line for family, each in about.items() for line in (*each, *found.get(family, []))]
    return "\n".join(lines) + "\n"
