"""Work that would hold up the event loop: long bodies, prompts, templates, grammars.

A few threads do it, and only so much may wait for them: beyond that a request is refused as when
the queue of the engine is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request

from nomatmul.serve.job import Busy

T = TypeVar("T")

THREADS = 2
WAITING = 64


class Workers:
    """Threads for such work, and how much of it is under way. `close` ends them."""

    def __init__(self, threads: int = THREADS, waiting: int = WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nomatmul-request")
        self._limit, self._busy = threads + waiting, 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of work done by one of the threads; raises Busy where too much waits.

        On the event loop only. Work whose request is cancelled is not begun; what has begun ends.
        """
        if self._busy >= self._limit:
            raise Busy(1.0)
        future = self._pool.submit(work)
        self._busy += 1
        future.add_done_callback(self._count_down(asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def _count_down(self, loop: asyncio.AbstractEventLoop) -> Callable[[object], None]:
        def done(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._less)

        return done

    def _less(self) -> None:
        self._busy -= 1

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


async def offload(request: Request, work: Callable[[], T]) -> T:
    """Do work off the event loop; see `Workers.run`."""
    workers: Workers = request.app.state.workers
    return await workers.run(work)
