"""Work that would hold up the event loop: long bodies, prompts, templates, grammars.

A few threads do it, for clients in turn, and only so much may wait for them: beyond that a request
is refused as when the queue of the engine is full.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from nomatmul.serve.job import Busy, Closing
from nomatmul.serve.policy import FairQueue

T = TypeVar("T")

THREADS = 2
WAITING = 64  # and as many again of clients of which nothing waits


@dataclass(eq=False)
class _Piece:
    work: Callable[[], Any]
    result: asyncio.Future[Any]


class Workers:
    """Threads for such work, and what waits for them. Of one event loop; `close` ends them."""

    def __init__(self, threads: int = THREADS, waiting: int = WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nomatmul-request")
        self._threads, self._limit = threads, waiting
        self._queue: FairQueue[_Piece] = FairQueue()
        self._running: Counter[str] = Counter()

    async def run(self, work: Callable[[], T], client: str = "") -> T:
        """The result of work done by one of the threads; raises Busy where too much waits.

        What waits is dropped when its caller is cancelled; what has begun goes on to its end.
        """
        beyond = 0 if client in self._queue else self._limit
        if len(self._queue) >= self._limit + beyond:
            raise Busy(1.0)
        piece = _Piece(work, asyncio.get_running_loop().create_future())
        self._queue.push(client, piece)
        self._begin()
        try:
            result: T = await piece.result
        finally:
            self._queue.remove(client, piece)
        return result

    def _begin(self) -> None:
        """Give the threads that are free something to do."""
        while len(self._queue) and self._running.total() < self._threads:
            client, piece = self._queue.first(self._running)
            self._queue.remove(client, piece)
            self._running[client] += 1
            done = self._pool.submit(piece.work)
            done.add_done_callback(functools.partial(self._tell, client, piece))

    def _tell(self, client: str, piece: _Piece, done: Future[Any]) -> None:
        """Of a thread: have the event loop take a result, unless it has ended meanwhile."""
        try:
            piece.result.get_loop().call_soon_threadsafe(self._end, client, piece, done)
        except RuntimeError:  # it is closed: nobody waits any more
            return

    def _end(self, client: str, piece: _Piece, done: Future[Any]) -> None:
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        if not piece.result.done():
            error = done.exception()
            if error is None:
                piece.result.set_result(done.result())
            else:
                piece.result.set_exception(error)
        self._begin()

    def close(self) -> None:
        """End the threads; what has not begun is refused."""
        for piece in self._queue.clear():
            if not piece.result.done():
                piece.result.set_exception(Closing())
        self._pool.shutdown(wait=False, cancel_futures=True)


async def offload(request: Request, work: Callable[[], T]) -> T:
    """Do work of a request off the event loop; see `Workers.run`."""
    workers: Workers = request.app.state.workers
    return await workers.run(work, getattr(request.state, "client", ""))
