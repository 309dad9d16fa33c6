"""Work off the event loop: clients in turn, a bound on what waits, nothing lost at the end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nomatmul.serve.job import Busy, Closing
from nomatmul.serve.offload import Workers


def run(scenario, **options):
    """A coroutine function, given workers and a gate behind which their first work waits."""

    async def whole():
        workers, gate = Workers(**options), threading.Event()
        try:
            await asyncio.wait_for(scenario(workers, gate), 20)
        finally:
            gate.set()
            workers.close()

    asyncio.run(whole())


async def blocked(workers, gate, client="a"):
    """A task whose work has begun and goes on until the gate opens."""
    begun = threading.Event()

    def work():
        begun.set()
        gate.wait()

    task = asyncio.create_task(workers.run(work, client))
    await asyncio.to_thread(begun.wait)
    return task


def test_results_and_errors_come_back():
    async def scenario(workers, gate):
        assert await workers.run(lambda: 7) == 7
        with pytest.raises(KeyError):
            await workers.run(lambda: {}["none"])
        assert await workers.run(threading.get_ident) != threading.get_ident()

    run(scenario)


def test_clients_take_turns():
    async def scenario(workers, gate):
        done = []
        first = await blocked(workers, gate)
        names = ["a1", "a2", "a3", "b1", "c1", "b2"]
        tasks = [
            asyncio.create_task(workers.run(lambda name=name: done.append(name), name[0]))
            for name in names
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *tasks)
        assert sorted(done[:3]) == ["a1", "b1", "c1"]
        assert sorted(done) == sorted(names)

    run(scenario, threads=1)


def test_one_client_cannot_take_all_places():
    async def scenario(workers, gate):
        first = await blocked(workers, gate)
        waiting = [asyncio.create_task(workers.run(int, "a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await workers.run(int, "a")
        waiting.append(asyncio.create_task(workers.run(int, "b")))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await workers.run(int, "b")
        gate.set()
        await asyncio.gather(first, *waiting)
        assert await workers.run(int, "a") == 0

    run(scenario, threads=1, waiting=2)


def test_what_is_cancelled_gives_its_place_back():
    async def scenario(workers, gate):
        done = []
        first = await blocked(workers, gate)
        task = asyncio.create_task(workers.run(lambda: done.append("cancelled"), "a"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        other = asyncio.create_task(workers.run(lambda: done.append("other"), "a"))
        gate.set()
        await asyncio.gather(first, other)
        assert done == ["other"]

    run(scenario, threads=1, waiting=1)


def test_what_waits_is_refused_at_the_end():
    async def scenario(workers, gate):
        first = await blocked(workers, gate)
        task = asyncio.create_task(workers.run(int))
        await asyncio.sleep(0)
        workers.close()
        with pytest.raises(Closing):
            await task
        gate.set()
        await first

    run(scenario, threads=1)
