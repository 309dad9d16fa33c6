"""Short work of others on the engine thread, between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from nomatmul.serve.policy import FairQueue

T = TypeVar("T")
Errand = Callable[[BaseException | None], None]  # given why it cannot be run, or None


class Errands:
    """What waits to be run, clients in turn; `lock` is the scheduler's."""

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self.waiting: FairQueue[Errand] = FairQueue()

    def add(self, work: Callable[[], T], client: str) -> Future[T]:
        """Note work whose result the future will hold; the lock is held."""
        future: Future[T] = Future()

        def errand(why_not: BaseException | None) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if why_not is not None:
                future.set_exception(why_not)
                return
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is, it is the caller's
                future.set_exception(error)

        self.waiting.push(client, errand)
        return future

    def run(self, until: float) -> None:
        """Run what waits, at least one, no new one behind a time."""
        while len(self.waiting):
            with self._lock:
                client, errand = self.waiting.first({})
                self.waiting.remove(client, errand)
            errand(None)
            if time.monotonic() > until:
                return

    def refuse(self, why: BaseException) -> None:
        """Raise an error in place of all that waits."""
        with self._lock:
            errands = self.waiting.clear()
        for errand in errands:
            errand(why)
