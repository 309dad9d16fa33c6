"""Jobs that wait for a stream or run, and whether one more finds a place."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from typing import TypeVar

from nomatmul.serve.job import Busy, Ticket
from nomatmul.serve.policy import FairQueue, Rate
from nomatmul.serve.reading import Reading
from nomatmul.serve.stats import Stats

T = TypeVar("T")

_SEEDS = random.SystemRandom()


class Work:
    """A job on its way: what of it has begun."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.begun = ticket, 0
        seed = ticket.job.sampling.seed
        self.seed = _SEEDS.getrandbits(48) if seed is None else int(seed)
        self.reading: Reading | None = None  # of the prompt whose choices begin now


class Jobs:
    """Jobs of which a choice has no finish; `lock` is the scheduler's, `counts` what it counts."""

    def __init__(self, lock: threading.Condition, counts: Stats) -> None:
        self._lock, self._counts = lock, counts
        self._waiting: FairQueue[Work] = FairQueue()
        self._open: dict[Ticket, Work] = {}
        self._cancelled: list[Ticket] = []
        self._rate = Rate()

    @property
    def waiting(self) -> FairQueue[Work]:
        """Those of which a choice has not begun."""
        return self._waiting

    @property
    def open(self) -> list[Ticket]:
        """All of them."""
        return list(self._open)

    @property
    def cancelled(self) -> bool:
        """Whether `to_end` has a cancelled one to tell of."""
        return bool(self._cancelled)

    def admit(self, queue: FairQueue[T], client: str, free: int) -> None:
        """Raise Busy where a queue has no place for a client; the lock is held.

        free: streams that nobody has, for what can begin at once does not wait.
        """
        places = self._counts.max_queue + max(0, free)
        beyond = 0 if client in queue else self._counts.max_queue
        if len(queue) >= places + beyond:
            self._counts.refused += 1
            raise Busy(self._rate.wait(len(self._waiting)))

    def add(self, work: Work) -> None:
        """Let a job wait that was admitted; the lock is held."""
        self._waiting.push(work.ticket.job.client, work)
        self._open[work.ticket] = work
        self._counts.submitted += 1
        self._counts.prompt_tokens += work.ticket.usage.prompt_tokens

    def cancel(self, ticket: Ticket) -> None:
        """Have a job ended; the lock is held."""
        self._cancelled.append(ticket)

    def next(self, running: Mapping[str, int]) -> tuple[Work, int] | None:
        """(job, number of its choice) to begin now; running: choices of each client that run."""
        with self._lock:
            if not len(self._waiting):
                return None
            client, work = self._waiting.first(running)
            index = work.begun
            work.begun += 1
            if work.begun == work.ticket.job.choices:
                self._waiting.remove(client, work)
                self._rate.note(time.monotonic())
        return work, index

    def to_end(
        self, now: float, look: bool, closing: bool
    ) -> tuple[list[Ticket], list[Ticket], list[Work]]:
        """(cancelled since the last call, out of time if `look`, still waiting if `closing`)."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            waiting = self._waiting.clear() if closing else []
            late = [ticket for ticket in self._open if _is_late(ticket, now)] if look else []
        return cancelled, late, waiting

    def is_open(self, ticket: Ticket) -> bool:
        """Whether a choice of a job has no finish."""
        return ticket in self._open

    def withdraw(self, ticket: Ticket) -> bool:
        """Let a job wait no longer; False for one that is over."""
        work = self._open.get(ticket)
        if work is None:
            return False
        with self._lock:
            self._waiting.remove(ticket.job.client, work)
        return True

    def over(self, ticket: Ticket, counter: str) -> None:
        """All choices of a job have a finish: count it once, under a name of `Stats`."""
        with self._lock:
            if self._open.pop(ticket, None) is not None:
                setattr(self._counts, counter, getattr(self._counts, counter) + 1)


def _is_late(ticket: Ticket, now: float) -> bool:
    timeout = ticket.job.timeout
    return timeout is not None and now - ticket.submitted >= timeout
