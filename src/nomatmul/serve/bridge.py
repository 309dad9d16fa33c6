"""From the engine thread to event loops: who reads a ticket sleeps until there are news of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from nomatmul.serve.job import Delta, Ticket

# Readers are woken at most so often, but at once for first tokens and ends. A fast model makes
# several tokens meanwhile, which go out together: to wake, to write and to send costs as much as a
# fifth of a token of the model in the box.
WAKE_SECONDS = 0.02


class Bell:
    """Wakes the readers of tickets with news, each event loop once however many they are.

    Of the engine thread alone.
    """

    def __init__(self) -> None:
        self._due: dict[Ticket, None] = {}
        self._urgent, self._rung = False, 0.0  # whether to wake at once; when it was done last

    def add(self, ticket: Ticket) -> None:
        """Note that a ticket has news; for a reader of the whole they are news at the end."""
        if ticket.finished or not ticket.read_whole:
            self._due[ticket] = None
            self._urgent |= ticket.finished or ticket.usage.completion_tokens <= 1

    def ring_in_time(self, seconds: float) -> None:
        """Wake readers of news now, unless that may wait for the next call in so many seconds."""
        late = time.monotonic() + seconds > self._rung + WAKE_SECONDS
        if self._due and (self._urgent or late):
            self.ring()

    def ring(self) -> None:
        """Wake the readers of all tickets noted since the last call."""
        loops: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for ticket in self._due:
            if (reader := ticket.reader) is not None:  # its own thread may take it away meanwhile
                loop, event = reader
                loops.setdefault(loop, []).append(event)
        self._due.clear()
        self._urgent, self._rung = False, time.monotonic()
        for loop, events in loops.items():
            try:
                loop.call_soon_threadsafe(_set_all, events)
            except RuntimeError:  # the loop is closed: nobody reads any more
                continue


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


async def follow(ticket: Ticket) -> AsyncIterator[list[Delta]]:
    """Yield the news of a ticket, all that wait at once, until it is done.

    One reader at a time. Closing the iterator early does not cancel the job.
    """
    assert ticket.reader is None, "a ticket has one reader"
    event = asyncio.Event()
    ticket.reader = (asyncio.get_running_loop(), event)
    try:
        while not ticket.done:
            event.clear()
            if news := ticket.take():
                yield news
            else:
                await event.wait()
    finally:
        ticket.reader = None


async def collect(ticket: Ticket) -> list[Delta]:
    """Wait for the end of a job, undisturbed by news before it, and return one `Delta` a choice, by
    index; the ticket's only reader."""
    assert ticket.reader is None, "a ticket has one reader"
    event = asyncio.Event()
    ticket.read_whole, ticket.reader = True, (asyncio.get_running_loop(), event)
    try:
        while not ticket.finished:  # it may have ended before there was a reader
            await event.wait()
            event.clear()
    finally:
        ticket.read_whole, ticket.reader = False, None
    return ticket.take()
