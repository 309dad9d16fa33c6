"""What runs of one model, and its step: all streams, and as much of the prompts as fits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nomatmul.engine.sampling import Unanswerable
from nomatmul.serve.job import Job, Ticket
from nomatmul.serve.policy import Pace, Turns
from nomatmul.serve.reading import Chunk, Reading
from nomatmul.serve.sequence import Choice, Served, States, Tail, TokenNames

if TYPE_CHECKING:
    from nomatmul.engine.backend import Want
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float
    from nomatmul.serve.cache import StateCache

log = logging.getLogger("nomatmul.serve")

Lane = Choice | Tail | Chunk


class Batch:
    """The choices and readings of one model.

    changed: called with each ticket that has news. A fault of one of them ends that one with
    "error"; nothing is raised, not even what is no Exception, such as a panic of a library in Rust.
    """

    def __init__(
        self,
        name: str,
        served: Served,
        cache: StateCache | None,
        step_seconds: float,
        changed: Callable[[Ticket], None],
    ) -> None:
        self.served, self.lm = served, served.lm
        self.states = States(served.lm, name, cache)
        self.names = TokenNames(served.lm)
        self.pace = Pace(step_seconds)
        self.choices: list[Choice] = []
        self.readings: list[Reading] = []
        self.tails: list[Tail] = []
        self.cached_tokens, self.computed_tokens = 0, 0  # of prompts
        self.completion_tokens = 0
        self._turns, self._shortest = Turns(), True
        self._changed = changed

    @property
    def busy(self) -> bool:
        """Whether there is something to step."""
        return bool(self.choices or self.readings or self.tails)

    @property
    def running(self) -> list[Choice]:
        """The choices that write, and those whose prompt is read."""
        return [*self.choices, *(one for reading in self.readings for one in reading.waiting)]

    def check(self, prompt: Sequence[int]) -> None:
        """Raise ValueError for a prompt that the model cannot read."""
        self.lm.checked_ids([min(prompt), max(prompt)] if prompt else [])
        longest = self.lm.max_length
        if longest is not None and len(prompt) > longest:
            raise ValueError(f"{len(prompt)} tokens are more than the model's {longest} positions")

    def add(self, ticket: Ticket, index: int, seed: int, reading: Reading | None) -> Reading | None:
        """Begin a choice; reading: of its prompt by another choice of the job, if there is one.

        Returns the reading that it waits for or goes on from, None where it failed.
        """
        try:
            found = reading or self._reading(ticket.job, index)
            choice = Choice(ticket, index, found.array, self.served, self.names, seed)
        except BaseException as error:  # the choice's own: told to its client
            self.fail(ticket, index, error)
            return None
        if found.error is not None:
            self._end(ticket, index, found.error)
        elif found.logits_V is not None:
            if reading is None:
                self._count(found, [choice])
            self._begin(choice, found)
        else:
            if not found.waiting:
                self.readings.append(found)
            found.waiting.append(choice)
        return found

    def _reading(self, job: Job, index: int) -> Reading:
        """The reading of a choice's prompt: one that is going on, or a new one."""
        prompt = job.prompts[index // job.n]
        scored = job.logprobs if job.echo else None
        for reading in self.readings:
            if reading.scored == scored and reading.ids == prompt:
                return reading
        boundaries = job.boundaries if index < job.n else ()
        new = Reading(prompt, scored, boundaries, self.states, self.names)
        new.begin(self.lm, self.readings)
        return new

    def _count(self, reading: Reading, choices: Sequence[Choice]) -> None:
        """Count what a prompt that has been read took, of the first job that asked for it."""
        computed = reading.computed
        prompts = {(one.ticket, one.index // one.ticket.job.n): None for one in choices}
        for ticket, _ in prompts:  # a job may ask for one prompt several times
            cached = len(reading.ids) - computed
            ticket.usage.computed_tokens += computed
            ticket.usage.cached_tokens += cached
            self.cached_tokens += cached
            computed = 0

    def step(self) -> None:
        """Step all streams and some of the prompts, and hand on what came of it."""
        start = time.monotonic()
        lanes: list[Lane] = [*self.choices, *self.tails]
        self.tails = []
        streams = len(lanes)
        chunks, scored = self._chunks(streams)
        lanes += chunks
        if lanes:
            any_logits = any(lane.wants_logits for lane in lanes)
            want: Want = "all" if scored else "last" if any_logits else "none"
            for lane, logits in zip(lanes, self._rows(lanes, want), strict=True):
                self._take(lane, logits, scored)
        # also where there was nothing to step: who waited for another prompt may have found all
        self._end_readings()
        self.choices = [choice for choice in self.choices if not choice.ended]
        if lanes:
            tokens = sum(len(chunk.feed) for chunk in chunks)
            self.computed_tokens += tokens
            self.pace.measured(streams, tokens, scored, time.monotonic() - start)

    def _chunks(self, streams: int) -> tuple[list[Chunk], bool]:
        """(what is read of prompts in this step, whether it is one whose tokens are scored).

        Clients in turn; of each the oldest prompt in one step, in the next one that of which the
        least is left, so that a long one does not hold up all behind it. A scored prompt goes
        alone, for all logits of its step are in memory.
        """
        if not self.readings:
            return [], False
        ready = [reading for reading in self.readings if self._ready(reading)]
        order = self._turns.order({reading.client for reading in self.readings})
        self._shortest = not self._shortest
        ready.sort(key=lambda reading: (order.index(reading.client), reading.left * self._shortest))
        chunks: list[Chunk] = []
        left = self.pace.chunk(streams)
        for reading in ready:
            if reading.scored is not None:
                if chunks:
                    continue
                chunk = reading.chunk(self.pace.chunk(streams, scored=True))
                self._turns.served(reading.client)
                return [chunk], True
            chunk = reading.chunk(left)
            chunks.append(chunk)
            self._turns.served(reading.client)
            left -= len(chunk.feed)
            if left <= 0:
                break
        return chunks, False

    def _ready(self, reading: Reading) -> bool:
        try:
            ready = reading.ready(self.lm)
        except BaseException as error:  # of all who wait for the prompt, and of nobody else
            self._fail_reading(reading, error)
            return False
        return ready

    def _rows(self, lanes: Sequence[Lane], want: Want) -> Sequence[Float | BaseException]:
        """The logits of each lane, or what went wrong with it.

        A step that fails has changed nothing: then each lane goes alone, and shows whose fault it
        was.
        """
        try:
            sessions = [_session(lane) for lane in lanes]
            return self.lm.step(sessions, [lane.feed for lane in lanes], want)
        except BaseException as error:  # whose it is, the lanes alone show
            if len(lanes) == 1:
                return [error]
        found: list[Float | BaseException] = []
        for lane in lanes:
            try:
                found += self.lm.step([_session(lane)], [lane.feed], want)
            except BaseException as error:  # `_take` raises it for this lane
                found.append(error)
        return found

    def _take(self, lane: Lane, logits: Float | BaseException, scored: bool) -> None:
        """Hand a lane what came of its ids; its own fault ends it alone."""
        try:
            if isinstance(logits, BaseException):
                raise logits
            if isinstance(lane, Choice):
                lane.took(logits[-1] if scored else logits)
                self._after(lane)
            elif isinstance(lane, Chunk):
                lane.took(logits)
            else:
                lane.keep()
        except BaseException as error:  # the others of this step go on
            if isinstance(lane, Choice):
                self.fail(lane.ticket, lane.index, error)
            elif isinstance(lane, Chunk):
                self._fail_reading(lane.reading, error)
            else:
                report(error, "the end of an answer is not kept")

    def _after(self, choice: Choice) -> None:
        """News of a choice are told; of one that has ended the state is kept."""
        self._changed(choice.ticket)
        self.completion_tokens += choice.text.token is not None
        if choice.ended and self.states and choice.text.token is not None:
            tail = Tail(choice, self.states)
            longest = self.lm.max_length
            if longest is None or tail.session.position < longest:
                self.tails.append(tail)
            else:
                tail.keep()

    def _begin(self, choice: Choice, reading: Reading) -> None:
        """Go on behind a prompt that has been read."""
        assert reading.session is not None
        assert reading.logits_V is not None
        job = choice.ticket.job
        try:
            if job.keep is not None and choice.index == 0:
                self.states.pin(reading.ids, reading.session, reading.logits_V, job)
            choice.begin(reading.session, reading.logits_V, reading.tokens)
            self._after(choice)
        except BaseException as error:  # the choice's own: told to its client
            self.fail(choice.ticket, choice.index, error)
        if not choice.ended:
            self.choices.append(choice)

    def _end_readings(self) -> None:
        """Begin the choices of prompts that have been read; end those of prompts that failed."""
        over = [reading for reading in self.readings if reading.over]
        self.readings = [reading for reading in self.readings if not reading.over]
        for reading in over:
            waiting, reading.waiting = reading.waiting, []
            if reading.error is None:
                self._count(reading, waiting)
            for choice in waiting:
                if reading.error is None:
                    self._begin(choice, reading)
                else:
                    self._end(choice.ticket, choice.index, reading.error)

    def _fail_reading(self, reading: Reading, error: BaseException) -> None:
        reading.error = report(error, "a prompt")

    def fail(self, ticket: Ticket, index: int, error: BaseException) -> None:
        """End one choice with "error"."""
        ticket.unanswerable = ticket.unanswerable or isinstance(error, Unanswerable)
        self._end(ticket, index, report(error, f"choice {index} of a job"))

    def _end(self, ticket: Ticket, index: int, message: str) -> None:
        ticket.error = ticket.error or message
        if ticket.runs(index):
            ticket.put(index, finish="error")
        self._changed(ticket)

    def clear(self) -> None:
        """Forget everything, after a fault that may have left it half changed."""
        self.choices, self.readings, self.tails = [], [], []

    def drop(self, ticket: Ticket) -> None:
        """Forget the choices of a job; what they computed is kept."""
        for choice in self.choices:
            if choice.ticket is ticket and self.states:
                Tail(choice, self.states).keep()
        self.choices = [choice for choice in self.choices if choice.ticket is not ticket]
        for reading in self.readings:
            reading.waiting = [one for one in reading.waiting if one.ticket is not ticket]
            if not reading.waiting:
                reading.give_up()
        self.readings = [reading for reading in self.readings if reading.waiting]


def _session(lane: Lane) -> Session:
    assert lane.session is not None, "a choice that writes has its session"
    return lane.session


def report(error: BaseException, what: str) -> str:
    """Log a fault, and return what its user is told."""
    if isinstance(error, MemoryError):
        log.warning("%s: not enough memory", what)
        return "not enough memory"
    if isinstance(error, ValueError):
        log.warning("%s: %s", what, error)
        return str(error)
    log.error("%s: a fault of the server", what, exc_info=error)
    return "a fault of the server; its log says more"
