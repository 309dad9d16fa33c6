"""Drives and collects the streams of a component in Amaranth's simulator, with random stalls.

    bench = Bench(fifo, seed=3)
    bench.drive(fifo.input, [1, 2, 3], stall=0.3)
    got = bench.collect(fifo.output, 3, stall=0.5)
    bench.run()
    assert got == [1, 2, 3]

Every collector also checks the rule of streams: a payload that is valid and not taken stays, valid
and unchanged. After the last awaited beat the bench runs on for a while with every collector
ready, so that a beat too many is seen.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from amaranth.lib import data
from amaranth.sim import Simulator

Process = Callable[[Any], Awaitable[None]]


def plain(value: Any) -> Any:
    """A sampled payload as ints, lists and dicts."""
    if not isinstance(value, data.Const):
        return value
    layout = value.shape()
    if isinstance(layout, data.ArrayLayout):
        return [plain(value[k]) for k in range(layout.length)]
    return {key: plain(value[key]) for key, _ in layout}


class Bench:
    """One simulation of `component`; seed decides every stall."""

    def __init__(self, component: Any, *, seed: int = 0) -> None:
        self.simulator = Simulator(component)
        self.simulator.add_clock(1e-6)
        self._seed = seed
        self._made = 0
        self._waiting: dict[str, Callable[[], bool]] = {}
        self._finishing = False
        self.cycles = 0

    def drive(
        self, stream: Any, payloads: Iterable[Any], *, stall: float = 0.0, wait: bool = True
    ) -> None:
        """Send the payloads; before each, valid is low for a random time (`stall` a cycle).

        wait: the run lasts until all are taken. A payload may be a callable, called when its
        turn comes.
        """
        name, rng = self._name("drive"), self._rng()
        left = list(payloads)
        if wait:
            self._waiting[name] = lambda: not left

        async def process(ctx: Any) -> None:
            while left:
                while rng.random() < stall:
                    await ctx.tick()
                value = left[0]() if callable(left[0]) else left[0]
                ctx.set(stream.payload, value)
                ctx.set(stream.valid, 1)
                taken = False
                while not taken:
                    *_, taken = await ctx.tick().sample(stream.ready)
                ctx.set(stream.valid, 0)
                left.pop(0)

        self.simulator.add_testbench(process, background=True)

    def collect(self, stream: Any, count: int = 0, *, stall: float = 0.0) -> list[Any]:
        """Return a list that fills with the payloads taken; the run lasts until it has `count`."""
        name, rng = self._name("collect"), self._rng()
        taken: list[Any] = []
        self._waiting[name] = lambda: len(taken) >= count

        async def process(ctx: Any) -> None:
            held: tuple[Any] | None = None
            while True:
                ready = self._finishing or rng.random() >= stall
                ctx.set(stream.ready, ready)
                *_, valid, payload = await ctx.tick().sample(stream.valid, stream.payload)
                assert valid or held is None, f"{name}: valid fell before its payload was taken"
                if held is not None:
                    assert plain(payload) == held[0], f"{name}: a payload changed while it waited"
                held = None
                if valid and ready:
                    taken.append(plain(payload))
                elif valid:
                    held = (plain(payload),)

        self.simulator.add_testbench(process, background=True)
        return taken

    def process(self, process: Process, *, background: bool = False) -> None:
        """Add a testbench of one's own; the run lasts until it ends unless it is in the back."""
        if background:
            self.simulator.add_testbench(process, background=True)
            return
        done: list[bool] = []
        self._waiting[self._name("process")] = lambda: bool(done)

        async def whole(ctx: Any) -> None:
            await process(ctx)
            done.append(True)

        self.simulator.add_testbench(whole, background=True)

    def run(self, limit: int = 20_000, *, extra: int = 40) -> int:
        """Run until nothing is awaited and `extra` cycles more; return the cycles until then.

        Fails, naming who still waits, after `limit` cycles.
        """

        async def watch(ctx: Any) -> None:
            while waiting := [name for name, done in self._waiting.items() if not done()]:
                assert self.cycles < limit, f"after {limit} cycles there still wait: {waiting}"
                await ctx.tick()
                self.cycles += 1
            self._finishing = True
            for _ in range(extra):
                await ctx.tick()

        self.simulator.add_testbench(watch)
        self.simulator.run()
        return self.cycles

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{kind} {self._made}"

    def _rng(self) -> random.Random:
        return random.Random(f"{self._seed} {self._made}")
