"""An ASGI application called without a network: a request in, the messages of its answer out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


async def call(app: App, scope: Message, body: bytes) -> AsyncIterator[Message]:
    """Yield what the application sends; whoever stops listening is a client that went away.

    Raises what the application raises.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await app(scope, receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.ensure_future(work())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        gone.set()  # the application sees it and ends its work
        if not task.done():
            await asyncio.wait([task], timeout=5.0)
            task.cancel()
