"""The engine thread: one loop that decodes all streams and reads all prompts.

A turn takes in what was submitted and cancelled, runs short work of others (`call`), steps one
model, models in turn, and wakes the readers of what has news. All that touches a session or the
state cache happens on this thread; other threads hand it things under one lock.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from nomatmul.serve.again import Again, Text
from nomatmul.serve.batch import Batch, report
from nomatmul.serve.bridge import Bell
from nomatmul.serve.errands import Errands
from nomatmul.serve.job import Closing, Job, Ticket
from nomatmul.serve.jobs import Jobs, Work
from nomatmul.serve.policy import FairQueue
from nomatmul.serve.stats import Stats as Stats

if TYPE_CHECKING:
    from nomatmul.serve.cache import StateCache
    from nomatmul.serve.sequence import Served

T = TypeVar("T")
log = logging.getLogger("nomatmul.serve")

LOOK_SECONDS = 0.02  # how often deadlines are looked at
# Of Python's threads: how long the engine waits for an event loop that is at work before it takes
# the GIL from it. With Python's own 5 ms a loop that works a third of the time halves the speed of
# the model in the box, which steps in one.
SWITCH_SECONDS = 0.0005


class Scheduler:
    """Runs jobs on the models of a server.

    max_streams: choices that run at the same time, of all models together. max_queue: jobs that may
    wait; clients of which none waits get one place each beyond, up to as many again, so that one
    client cannot fill the queue for all. step_seconds: how long prompts may hold up streams, see
    `policy.Pace`; with several models that is the time of one model's step.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        cache: StateCache | None,
        *,
        max_streams: int = 16,
        max_queue: int = 64,
        step_seconds: float = 0.1,
    ) -> None:
        if max_streams < 1 or max_queue < 0 or not step_seconds > 0:
            raise ValueError(
                "a scheduler needs max_streams of at least 1, max_queue of at least 0 and"
                f" step_seconds above 0, got {max_streams}, {max_queue} and {step_seconds}"
            )
        self._max_streams, self._step_seconds = max_streams, step_seconds
        self._cache = cache if cache is not None and cache.max_bytes else None
        self._bell = Bell()
        self._counts = Stats(max_streams=max_streams, max_queue=max_queue)
        self._batches = {
            name: Batch(name, served, self._cache, step_seconds, self._changed)
            for name, served in models.items()
            if hasattr(served.lm, "text_generation")  # encoders write nothing
        }
        self._order = list(self._batches.values())  # the model whose turn it is first
        self._lock = threading.Condition()  # of all that follows
        self._jobs = Jobs(self._lock, self._counts)
        self._errands = Errands(self._lock)
        self._again = Again(self._lock, max_streams)
        self._cut_at: float | None = None  # when a close cuts what runs
        self._thread: threading.Thread | None = None
        self._looked = 0.0  # when deadlines were looked at

    # --- of any thread -------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread; until `close`, threads of the process switch more often."""
        assert self._thread is None, "a scheduler starts once"
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        self._thread = threading.Thread(target=self._run, name="nomatmul-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Ticket:
        """Take a job; of any thread, returns at once.

        Raises ValueError for a job that cannot run, Busy where no place is free, Closing.
        """
        self._check(job)
        work = Work(Ticket(job))
        with self._lock:
            self._admit_to(self._jobs.waiting, job.client)
            self._jobs.add(work)
            self._lock.notify()
        return work.ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a job within one step; its choices that have no finish get "cancelled"."""
        with self._lock:
            self._jobs.cancel(ticket)
            self._lock.notify()

    def call(self, work: Callable[[], T], client: str = "") -> Future[T]:
        """Run short work on the engine thread between two steps, clients in turn.

        It holds up all streams, so long work goes in slices; a turn begins none of them when it has
        run others for `step_seconds`. Raises Busy, Closing.
        """
        with self._lock:
            self._admit_to(self._errands.waiting, client)
            future = self._errands.add(work, client)
            self._lock.notify()
        return future

    def read_again(
        self, model: str, ids: tuple[int, ...], boundaries: tuple[int, ...] = ()
    ) -> Future[int]:
        """Read a text while nothing else is to be done, for the request that will begin with it.

        The future holds how many tokens were computed, once it is over: also where newer texts took
        its place, or the server closes. Without a state cache nothing is done. boundaries: as of a
        Job. Raises ValueError for ids that the model cannot read, Closing.
        """
        batch = self._batches[model]
        batch.check(ids)
        text = Text(batch, ids, boundaries)
        with self._lock:
            if self._cut_at is not None:
                raise Closing
            if self._cache is None:
                text.end()
                return text.done
            text = self._again.add(text)
            self._lock.notify()
        return text.done

    def close(self, grace: float) -> None:
        """Refuse new jobs, end those that wait, let running choices go on for `grace` seconds, cut
        the rest ("shutdown"), and end; a second call may shorten the grace.

        Returns when the thread has ended and the cache is written.
        """
        with self._lock:
            at = time.monotonic() + grace
            self._cut_at = at if self._cut_at is None else min(at, self._cut_at)
            self._lock.notify()
        if self._thread is None:
            self._shut_down()
        else:
            self._thread.join()
            sys.setswitchinterval(self._switch_seconds)

    def stats(self) -> Stats:
        """Counts of now."""
        batches = self._batches.values()
        with self._lock:
            return dataclasses.replace(
                self._counts,
                running=sum(len(batch.running) for batch in batches),
                waiting=len(self._jobs.waiting),
                cached_tokens=sum(batch.cached_tokens for batch in batches),
                computed_tokens=sum(batch.computed_tokens for batch in batches),
                completion_tokens=sum(batch.completion_tokens for batch in batches),
                reread_tokens=self._again.tokens,
            )

    def _check(self, job: Job) -> None:
        """Raise ValueError for a job that cannot run."""
        batch = self._batches.get(job.model)
        if batch is None:
            raise ValueError(f"no model {job.model!r} writes text here: {sorted(self._batches)}")
        if job.choices < 1:
            raise ValueError(f"a job needs a prompt and n of at least 1, got n = {job.n}")
        if job.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, got {job.max_tokens}")
        if job.keep is not None and self._cache is None:
            raise ValueError("a named state needs a state cache, and this server has none")
        for number, prompt in enumerate(job.prompts):
            try:
                batch.check(prompt)
            except ValueError as error:
                where = f"prompt {number}: " if len(job.prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from None

    def _admit_to(self, queue: FairQueue[T], client: str) -> None:
        """Raise Closing, or Busy where a queue has no place for a client; the lock is held."""
        if self._cut_at is not None:
            raise Closing
        free = self._max_streams - sum(len(batch.running) for batch in self._batches.values())
        self._jobs.admit(queue, client, free)

    # --- of the engine thread ------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except BaseException as error:  # a fault of ours: what runs may be half changed
                message = report(error, "a turn of the engine")
                for batch in self._order:
                    batch.clear()
                self._again.clear()
                for ticket in self._jobs.open:
                    self._end(ticket, "error", message)
                self._bell.ring()
        self._shut_down()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        with self._lock:
            while True:
                busy = any(batch.busy for batch in self._order)
                closing = self._cut_at is not None
                if closing and (not busy or time.monotonic() >= (self._cut_at or 0.0)):
                    return False
                jobs = len(self._jobs.waiting) or self._jobs.cancelled
                if busy or jobs or len(self._errands.waiting) or self._again:
                    return True
                self._lock.wait()

    def _turn(self) -> None:
        start = time.monotonic()
        self._end_some(start)
        if len(self._jobs.waiting):
            self._again.pause()
        self._begin_some(start + self._step_seconds / 4)
        if len(self._errands.waiting):
            self._bell.ring()  # what is news now need not wait for them
            self._errands.run(start + self._step_seconds)
        batch = next((batch for batch in self._order if batch.busy), None)
        if batch is not None:
            self._order.sort(key=lambda other: other is batch)  # behind the others
            batch.step()
            seconds = time.monotonic() - start
            self._counts.steps += 1
            self._counts.step_s += seconds
            self._counts.longest_step_s = max(self._counts.longest_step_s, seconds)
        # to the end of the next step; without one nothing else would wake them
        paces = [batch.pace.last for batch in self._order if batch.busy]
        self._bell.ring_in_time(max(paces, default=math.inf))
        if not paces and not len(self._jobs.waiting) and self._again:
            self._again.step()

    def _end_some(self, now: float) -> None:
        """End jobs that were cancelled, that are out of time, that a close finds waiting."""
        look = now - self._looked > LOOK_SECONDS
        if not (look or self._jobs.cancelled or self._cut_at is not None):
            return
        cancelled, late, waiting = self._jobs.to_end(now, look, self._cut_at is not None)
        self._looked = now if look else self._looked
        for ticket in cancelled:
            self._end(ticket, "cancelled")
        for ticket in late:
            self._end(ticket, "timeout")
        for work in waiting:
            if self._jobs.is_open(work.ticket):  # not cancelled, or late, in this very turn
                for index in range(work.begun, work.ticket.job.choices):
                    work.ticket.put(index, finish="shutdown")
                self._changed(work.ticket, "shut_down")

    def _begin_some(self, until: float) -> None:
        """Begin choices of jobs that wait, as many as there are streams free."""
        if not len(self._jobs.waiting):
            return
        running = [choice for batch in self._order for choice in batch.running]
        counts = Counter(choice.ticket.job.client for choice in running)
        for _ in range(self._max_streams - len(running)):
            if (found := self._jobs.next(counts)) is None:
                return
            work, index = found
            counts[work.ticket.job.client] += 1
            self._begin(work, index)
            if time.monotonic() > until:
                return

    def _begin(self, work: Work, index: int) -> None:
        ticket, job = work.ticket, work.ticket.job
        if ticket.usage.queue_s is None:
            ticket.usage.queue_s = time.monotonic() - ticket.submitted
        reading = work.reading if index % job.n else None
        work.reading = self._batches[job.model].add(ticket, index, work.seed, reading)
        if work.begun == job.choices:
            work.reading = None  # its state is not needed any more

    def _changed(self, ticket: Ticket, counter: str = "finished") -> None:
        """A ticket has news."""
        self._bell.add(ticket)
        if ticket.finished:
            self._jobs.over(ticket, "failed" if ticket.error is not None else counter)

    def _end(self, ticket: Ticket, finish: str, error: str | None = None) -> None:
        """Cut a job off, wherever it is; nothing for one that is over."""
        if not self._jobs.withdraw(ticket):
            return
        self._batches[ticket.job.model].drop(ticket)
        ticket.error = ticket.error or error
        for index in range(ticket.job.choices):
            if ticket.runs(index):
                ticket.put(index, finish=finish)
        self._jobs.over(ticket, _COUNTERS[finish])
        self._bell.add(ticket)

    def _shut_down(self) -> None:
        """End whatever is left; write the cache."""
        for ticket in self._jobs.open:
            self._end(ticket, "shutdown")
        self._bell.ring()
        self._again.clear()
        self._errands.refuse(Closing())
        if self._cache is not None:
            try:
                self._cache.flush()
            except BaseException as error:  # closing goes on, and the log says it
                report(error, "the state cache is not written")


_COUNTERS = {
    "cancelled": "cancelled",
    "timeout": "timed_out",
    "shutdown": "shut_down",
    "error": "failed",
}
