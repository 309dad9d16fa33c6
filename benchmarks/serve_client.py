"""A client that costs little: HTTP over plain sockets, many streams in one thread.

It runs on the cores of the server that it measures, so it parses no more than it must; what it
takes is measured (`Load.cpu`). Used by serve_load.py and soak.py.

A library.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Address = tuple[str, int]


class Reply:
    """An answer of which status and headers are there; its body is read by `chunks`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}

    async def begin(self) -> None:
        """Read status and headers. Raises ConnectionError where the server closes instead."""
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the server closed the connection without an answer")
        self.status = int(line.split()[1])
        while (line := await self._reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.lower()] = value.strip()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
        elif "content-length" in self.headers:
            yield await self._reader.readexactly(int(self.headers["content-length"]))
        else:
            while data := await self._reader.read(1 << 16):
                yield data

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def events(self) -> AsyncIterator[bytes]:
        """Data of server-sent events, "[DONE]" among them."""
        rest = b""
        async for chunk in self.chunks():
            *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in whole:
                lines = event.split(b"\n")
                data = [line[5:].strip() for line in lines if line.startswith(b"data:")]
                if data:
                    yield b"\n".join(data)

    def close(self) -> None:
        self._writer.close()


async def ask(
    address: Address,
    path: str,
    body: bytes | None = None,
    *,
    method: str = "",
    receive: int = 0,
) -> Reply:
    """Send a request over a connection of its own; GET without a body. receive: bytes that the
    system takes in before they are read (a slow reader's few; 0: as many as usual)."""
    reader, writer = await asyncio.open_connection(*address)
    if receive:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    head = f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1\r\nHost: {address[0]}\r\n"
    writer.write(f"{head}Connection: close\r\n{length}\r\n".encode() + (body or b""))
    reply = Reply(reader, writer)
    try:
        await writer.drain()
        await reply.begin()
    except BaseException:
        writer.close()
        raise
    return reply


async def fetch(address: Address, path: str, body: Any = None) -> tuple[int, Any]:
    """(status, JSON or text) of a request that is not streamed."""
    reply = await ask(address, path, None if body is None else json.dumps(body).encode())
    try:
        data = await reply.body()
    finally:
        reply.close()
    kind = reply.headers.get("content-type", "")
    return reply.status, json.loads(data) if "json" in kind else data.decode()


@dataclass
class Answer:
    """One request: times in seconds of time.perf_counter; `times` of every event with text."""

    start: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    text: str = ""
    finish: str | None = None
    status: int = 0
    logprobs: list[float] = field(default_factory=list)  # of made tokens, where asked for
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.start

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times)]


async def complete(
    address: Address, path: str, body: dict[str, Any], answer: Answer | None = None
) -> Answer:
    """Ask for a text, streamed or not as the body says, and time what comes; never raises for
    what the server does: `error` says it. answer: filled while it comes, for others to look at."""
    data = json.dumps(body).encode()
    answer = answer or Answer(0.0)
    answer.start = time.perf_counter()
    try:
        reply = await ask(address, path, data)
        answer.status = reply.status
        try:
            if reply.status != 200:
                answer.error = f"{reply.status}: {(await reply.body()).decode()[:300]}"
            elif body.get("stream"):
                await _follow(reply, answer)
            else:
                _take(json.loads(await reply.body()), answer)
        finally:
            reply.close()
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end = time.perf_counter()
    return answer


async def _follow(reply: Reply, answer: Answer) -> None:
    async for data in reply.events():
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            answer.error = json.dumps(event["error"])
            return
        _take(event, answer)
    answer.error = "the stream broke off"


def _take(event: dict[str, Any], answer: Answer) -> None:
    for choice in event.get("choices", []):
        message = choice.get("delta") or choice.get("message") or {}
        if text := choice.get("text") or message.get("content"):
            answer.times.append(time.perf_counter())
            answer.text += text
        answer.finish = choice.get("finish_reason") or answer.finish
        if found := choice.get("logprobs"):
            content = found.get("content")
            each = found["token_logprobs"] if content is None else [t["logprob"] for t in content]
            answer.logprobs += each
    if event.get("usage"):
        answer.usage = event["usage"]


@dataclass
class Load:
    """What several clients saw: answers, seconds in all, and CPU seconds that the client took."""

    answers: list[Answer]
    seconds: float
    cpu: float


def load(address: Address, path: str, clients: Sequence[Sequence[dict[str, Any]]]) -> Load:
    """Let clients work at once, each through its requests one after another."""

    async def one(bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        return [await complete(address, path, body) for body in bodies]

    async def run() -> list[list[Answer]]:
        return await asyncio.gather(*(one(bodies) for bodies in clients))

    start, cpu = time.perf_counter(), time.process_time()
    answers = asyncio.run(run())
    seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    return Load([one for each in answers for one in each], seconds, spent)
