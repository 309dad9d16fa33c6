"""Readers of tickets: who follows is woken for news, who wants the whole only at the end."""

from __future__ import annotations

import asyncio

import pytest

from nomatmul.serve.bridge import Bell, collect, follow
from nomatmul.serve.job import Job, Ticket


@pytest.fixture
def ticket():
    return Ticket(Job("m", ((1,), (2,)), 4))


def tell(bell: Bell, ticket: Ticket, *news: tuple) -> None:
    """News of choices, as the engine thread tells them."""
    for index, text, finish in news:
        ticket.put(index, text, 1, finish=finish)
        bell.add(ticket)
    bell.ring()


def test_who_wants_the_whole_is_woken_once(ticket):
    bell, woken = Bell(), []

    async def run():
        reading = asyncio.ensure_future(collect(ticket))
        await asyncio.sleep(0)
        _, event = ticket.reader
        event.set = lambda: (woken.append(1), asyncio.Event.set(event))
        for news in ([(0, "a", None)], [(1, "x", "stop"), (0, "b", None)], [(0, "c", "length")]):
            tell(bell, ticket, *news)
            await asyncio.sleep(0)
        return await asyncio.wait_for(reading, 30)

    first, second = asyncio.run(run())
    assert (first.text, first.count, first.finish) == ("abc", 3, "length")
    assert (second.text, second.count, second.finish) == ("x", 1, "stop")
    assert len(woken) == 1
    assert ticket.done


def test_a_job_that_ended_before_it_is_read_is_there_at_once(ticket):
    tell(Bell(), ticket, (0, "a", "end"), (1, "b", "end"))
    whole = asyncio.run(asyncio.wait_for(collect(ticket), 30))
    assert [delta.text for delta in whole] == ["a", "b"]


def test_who_gives_the_whole_up_may_follow_the_rest(ticket):
    bell = Bell()

    async def run():
        reading = asyncio.ensure_future(collect(ticket))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        tell(bell, ticket, (0, "a", None))
        pieces = []
        async for news in follow(ticket):
            pieces += [delta.text for delta in news]
            if not ticket.finished:
                tell(bell, ticket, (0, "b", "end"), (1, "c", "end"))
        return pieces

    assert asyncio.run(asyncio.wait_for(run(), 30)) == ["a", "b", "c"]


class _Leaving(Ticket):
    """A ticket whose reader is gone when it is looked at for the second time."""

    @property
    def reader(self):
        reader, self._reader = self._reader, None
        return reader

    @reader.setter
    def reader(self, reader):
        self._reader = reader


def test_a_reader_may_leave_while_it_is_told():
    async def run():
        bell, ticket, event = Bell(), _Leaving(Job("m", ((1,),), 1)), asyncio.Event()
        ticket.reader = (asyncio.get_running_loop(), event)
        bell.add(ticket)
        bell.ring()
        await asyncio.wait_for(event.wait(), 30)

    asyncio.run(run())


def test_a_loop_that_has_ended_is_passed_over():
    async def loop():
        return asyncio.get_running_loop()

    async def run(ended):
        bell, event = Bell(), asyncio.Event()
        for one in (ended, asyncio.get_running_loop()):
            ticket = Ticket(Job("m", ((1,),), 1))
            ticket.reader = (one, event)
            bell.add(ticket)
        bell.ring()
        await asyncio.wait_for(event.wait(), 30)

    asyncio.run(run(asyncio.run(loop())))


def test_news_may_wait_for_the_next_call_but_first_tokens_and_ends(monkeypatch):
    monkeypatch.setattr("nomatmul.serve.bridge.WAKE_SECONDS", 1000.0)
    ticket, woken = Ticket(Job("m", ((1,),), 4)), []

    async def run():
        bell, event = Bell(), asyncio.Event()
        ticket.reader = (asyncio.get_running_loop(), event)
        for seconds, finish in [(0, None), (0, None), (2000, None), (0, None), (0, "length")]:
            ticket.put(0, "a", 1, finish=finish)
            bell.add(ticket)
            bell.ring_in_time(seconds)
            await asyncio.sleep(0)
            woken.append(event.is_set())
            event.clear()

    asyncio.run(run())
    assert woken == [True, False, True, False, True]
