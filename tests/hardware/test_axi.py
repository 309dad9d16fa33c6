"""AXI: bursts against a memory that checks the protocol, the host's side, and proofs of both."""

from __future__ import annotations

import random
from typing import Any

import pytest
from amaranth import Module
from amaranth.hdl import Assert
from amaranth.lib import wiring
from hardware import formal
from hardware.streams import Bench

from nomatmul.hardware.board.axi import BASE_REGISTERS, OUTSTANDING, AxiReader, LiteBridge

BITS = 64
BYTES = BITS // 8
BASE = 0x1_2345_6000


class SlowMemory:
    """Answers read bursts in order, with pauses; `faults` are broken rules of the master."""

    def __init__(self, reader: AxiReader, bench: Bench, size: int, stall: float) -> None:
        self.reader, self.size, self.stall = reader, size, stall
        self.rng = random.Random(7)
        self.words = [self.rng.getrandbits(BITS) for _ in range(size)]
        self.bursts: list[tuple[int, int]] = []
        self.waiting: list[tuple[int, int]] = []
        self.faults: list[str] = []
        bench.process(self._address, background=True)
        bench.process(self._answer, background=True)

    async def _address(self, ctx: Any) -> None:
        ar = self.reader.ar
        while True:
            ready = self.rng.random() >= self.stall
            ctx.set(ar.ready, ready)
            *_, valid, payload = await ctx.tick().sample(ar.valid, ar.payload)
            if valid and ready:
                address, beats = payload.addr, payload.len + 1
                if address % BYTES or address // 4096 != (address + beats * BYTES - 1) // 4096:
                    self.faults.append(f"burst of {beats} at {address:#x}")
                self.bursts.append((address, beats))
                self.waiting.append((address, beats))
                if len(self.waiting) > OUTSTANDING:
                    self.faults.append(f"{len(self.waiting)} bursts are outstanding")

    async def _answer(self, ctx: Any) -> None:
        r = self.reader.r
        while True:
            if not self.waiting:
                await ctx.tick()
                continue
            address, beats = self.waiting[0]
            for beat in range(beats):
                while self.rng.random() < self.stall:
                    await ctx.tick()
                word = (address - BASE) // BYTES + beat
                inside = word < self.size
                ctx.set(r.payload.data, self.words[word] if inside else 0xBAD)
                ctx.set(r.payload.resp, 0 if inside else 3)
                ctx.set(r.payload.last, beat == beats - 1)
                ctx.set(r.valid, 1)
                taken = False
                while not taken:
                    *_, taken = await ctx.tick().sample(r.ready)
                ctx.set(r.valid, 0)
            self.waiting.pop(0)


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_bursts_are_cut_at_pages_and_come_back_whole(stall: float) -> None:
    reader = AxiReader(BITS)
    bench = Bench(reader, seed=3)
    memory = SlowMemory(reader, bench, 3000, stall)
    rng = random.Random(1)
    requests = [(rng.randrange(2500), rng.randint(1, 40)) for _ in range(8)]
    requests += [(0, 700), (2990, 20)]

    async def base(ctx: Any) -> None:
        ctx.set(reader.base, BASE)
        await ctx.tick()

    bench.process(base)
    asked = [{"address": a, "length": n} for a, n in requests]
    bench.drive(reader.port.request, asked, stall=stall)
    got = bench.collect(reader.port.response, sum(n for _, n in requests), stall=stall)
    cycles = bench.run()
    assert memory.faults == []
    assert got == [
        {
            "data": memory.words[a + k] if a + k < 3000 else 0,
            "error": int(a + k >= 3000),
            "last": int(k == n - 1),
        }
        for a, n in requests
        for k in range(n)
    ]
    if not stall:
        assert cycles < 1.1 * len(got) + 60


def _lite(reads: list[int], writes: list[tuple[int, int]]) -> tuple[Any, ...]:
    bridge = LiteBridge(timeout=30)
    bench = Bench(bridge, seed=2)
    memory = {5: 0x55}

    async def bus(ctx: Any) -> None:
        wires = bridge.bus
        while True:
            if not ctx.get(wires.cyc & wires.stb) or ctx.get(wires.adr) == 99:
                await ctx.tick()
                continue
            await ctx.tick()
            address = ctx.get(wires.adr)
            if ctx.get(wires.we):
                memory[address] = ctx.get(wires.dat_w)
            ctx.set(wires.dat_r, memory.get(address, 0))
            ctx.set(wires.ack, 1)
            await ctx.tick()
            ctx.set(wires.ack, 0)

    bench.process(bus, background=True)
    lite = bridge.lite
    bench.drive(lite.aw, [4 * a for a, _ in writes], stall=0.3)
    bench.drive(lite.w, [value for _, value in writes], stall=0.3)
    bench.drive(lite.ar, [4 * a for a in reads], stall=0.5)
    answers = bench.collect(lite.r, len(reads), stall=0.3)
    done = bench.collect(lite.b, len(writes), stall=0.3)
    bench.run()
    return answers, done, memory


def test_the_host_reads_writes_and_is_told_of_silence() -> None:
    answers, done, memory = _lite([5, 99, 6], [(7, 1), (99, 2), (8, 3)])
    assert [(a["data"], a["resp"]) for a in answers] == [(0x55, 0), (0, 2), (0, 0)]
    assert done == [0, 2, 0]
    assert (memory[7], memory[8]) == (1, 3)


def test_the_base_is_two_registers() -> None:
    low, high = BASE_REGISTERS, BASE_REGISTERS + 1
    bridge = LiteBridge()
    bench = Bench(bridge)
    bench.drive(bridge.lite.aw, [4 * low, 4 * high])
    bench.drive(bridge.lite.w, [0x89ABCDEF, 0x1234567])
    bench.collect(bridge.lite.b, 2)
    seen: list[int] = []

    async def look(ctx: Any) -> None:
        while ctx.get(bridge.base) >> 32 == 0:
            await ctx.tick()
        seen.append(ctx.get(bridge.base))

    bench.process(look)
    bench.run()
    assert seen == [0x1234567_89ABCDEF]


class _ReaderProof(wiring.Component):
    """An honest memory and an honest reader of the port; the AXI side keeps AXI's rules."""

    def __init__(self) -> None:
        super().__init__({})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.reader = reader = AxiReader(16)
        formal.assume_stream(m, reader.port.request, "request")
        formal.assume_stream(m, reader.r, "data")
        formal.assert_stream(m, reader.ar, "address")
        formal.assert_stream(m, reader.port.response, "response")
        m.d.comb += [
            reader.ar.ready.eq(formal.free(m, 1, "ar_ready")),
            reader.port.response.ready.eq(formal.free(m, 1, "response_ready")),
        ]
        address, beats = reader.ar.payload.addr, reader.ar.payload.len
        with m.If(reader.ar.valid):
            m.d.comb += [
                Assert(address[0] == 0),
                Assert((address[:12] >> 1) + beats < 2048),  # it stays in its page
            ]
        return m


@formal.depths(10, 20)
def test_proof_that_bursts_stay_in_their_page_and_streams_keep_their_word(depth: int) -> None:
    formal.prove(_ReaderProof(), depth=depth, induction=False)


class _LiteProof(wiring.Component):
    def __init__(self) -> None:
        super().__init__({})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.bridge = bridge = LiteBridge(timeout=2)
        for name in ("aw", "w", "ar"):
            formal.assume_stream(m, getattr(bridge.lite, name), name)
        for name in ("b", "r"):
            formal.assert_stream(m, getattr(bridge.lite, name), name)
            m.d.comb += getattr(bridge.lite, name).ready.eq(formal.free(m, 1, f"{name}_ready"))
        bus = bridge.bus
        m.d.comb += [
            bus.ack.eq(formal.free(m, 1, "ack") & bus.cyc & bus.stb),
            bus.dat_r.eq(formal.free(m, 32, "read")),
            Assert(bus.cyc == bus.stb),
            Assert(~(bridge.lite.r.valid & bridge.lite.b.valid)),
        ]
        return m


@formal.depths(14, 20)
def test_proof_that_the_host_side_keeps_its_word(depth: int) -> None:
    formal.prove(_LiteProof(), depth=depth, induction=False)
