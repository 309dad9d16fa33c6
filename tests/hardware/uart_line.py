"""A simulated component with `rx` and `tx` behind the `Line` that a host talks through."""

from __future__ import annotations

from collections import deque
from typing import Any

from amaranth.sim import Simulator


class SimulatedLine:
    """Time passes while somebody waits; `cycles` a bit, `patience` cycles of silence.

    damage_sent, damage_received map the number of a byte (counted over all that the host sends, or
    receives) to what becomes of it: None loses it.
    """

    def __init__(self, component: Any, cycles: int, patience: int) -> None:
        self.component, self.cycles, self.patience = component, cycles, patience
        self.simulator = Simulator(component)
        self.simulator.add_clock(1e-6)
        self.simulator.add_testbench(self._send, background=True)
        self.simulator.add_testbench(self._receive, background=True)
        self.now = 0
        self.to_board: deque[int] = deque()
        self.to_host: deque[int] = deque()
        self.sent = self.received = 0
        self.damage_sent: dict[int, int | None] = {}
        self.damage_received: dict[int, int | None] = {}

    # -- the simulation ---------------------------------------------------------------------------

    async def _send(self, ctx: Any) -> None:
        while True:
            if not self.to_board:
                await ctx.tick()
                continue
            byte = self.to_board.popleft()
            for bit in [0, *(byte >> k & 1 for k in range(8)), 1]:
                ctx.set(self.component.rx, bit)
                await ctx.tick().repeat(self.cycles)

    async def _receive(self, ctx: Any) -> None:
        while True:
            while ctx.get(self.component.tx):
                await ctx.tick()
            await ctx.tick().repeat(self.cycles // 2)
            byte = 0
            for bit in range(8):
                await ctx.tick().repeat(self.cycles)
                byte |= ctx.get(self.component.tx) << bit
            await ctx.tick().repeat(self.cycles)
            assert ctx.get(self.component.tx), "a stop bit is missing"
            got: int | None = byte
            if self.received in self.damage_received:
                got = self.damage_received[self.received]
            self.received += 1
            if got is not None:
                self.to_host.append(got)

    def pass_time(self, cycles: int) -> None:
        self.now += cycles
        self.simulator.run_until(self.now * 1e-6)

    # -- Line -------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        for byte in data:
            sent: int | None = byte
            if self.sent in self.damage_sent:
                sent = self.damage_sent[self.sent]
            self.sent += 1
            if sent is not None:
                self.to_board.append(sent)
        while self.to_board:
            self.pass_time(10 * self.cycles)

    def receive(self, count: int) -> bytes:
        silence, byte = 0, 10 * self.cycles
        while len(self.to_host) < count and silence < self.patience:
            before = len(self.to_host)
            self.pass_time(byte)
            silence = 0 if len(self.to_host) > before else silence + byte
        return bytes(self.to_host.popleft() for _ in range(min(count, len(self.to_host))))

    def forget(self) -> None:
        self.pass_time(self.patience)
        self.to_host.clear()
