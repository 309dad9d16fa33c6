"""Words from memory to the array: FIFO, arbiter, readers, gearbox, under random stalls.

Legend: M bits of a memory word, B bits of a beat.
"""

from __future__ import annotations

import random
from math import gcd
from typing import Any

import pytest
from amaranth import Module
from amaranth.lib import wiring
from hardware.streams import Bench

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.arbiter import Arbiter
from nomatmul.hardware.rtl.fetcher import RowFetcher
from nomatmul.hardware.rtl.fifo import Fifo
from nomatmul.hardware.rtl.gearbox import Gearbox
from nomatmul.hardware.rtl.streamer import Streamer

STALLS = [(0.0, 0.0), (0.6, 0.0), (0.0, 0.6), (0.3, 0.3)]
END = 1000  # words of the memory below


def word(address: int, bits: int) -> int:
    return random.Random(address).getrandbits(bits)


def answer_requests(
    bench: Bench, port: Any, bits: int, burst: int, *, stall: float = 0.0, latency: int = 5
) -> list[dict[str, int]]:
    """A memory behind a MemoryPort: END words, errors beyond; returns the requests it took."""
    requests: list[dict[str, int]] = []
    rng = random.Random(stall)

    async def take(ctx: Any) -> None:
        while True:
            ctx.set(port.request.ready, rng.random() >= stall)
            *_, valid, ready, payload = await ctx.tick().sample(
                port.request.valid, port.request.ready, port.request.payload
            )
            if valid and ready:
                asked = {"address": payload.address, "length": payload.length}
                assert 1 <= asked["length"] <= burst
                assert (
                    asked["address"] // burst == (asked["address"] + asked["length"] - 1) // burst
                )
                requests.append({**asked, "time": bench.cycles})

    async def give(ctx: Any) -> None:
        done = 0
        while True:
            if len(requests) <= done or bench.cycles < requests[done]["time"] + latency:
                await ctx.tick()
                continue
            address, length = requests[done]["address"], requests[done]["length"]
            for k in range(length):
                while rng.random() < stall:
                    await ctx.tick()
                bad = address + k >= END
                payload = {"data": 0 if bad else word(address + k, bits), "error": bad}
                ctx.set(port.response.payload, {**payload, "last": k == length - 1})
                ctx.set(port.response.valid, 1)
                *_, taken = await ctx.tick().sample(port.response.ready)
                assert taken, "an answer met a reader without room"
                ctx.set(port.response.valid, 0)
            done += 1

    bench.process(take, background=True)
    bench.process(give, background=True)
    return requests


@pytest.mark.parametrize("depth", [2, 4, 16])
@pytest.mark.parametrize(("before", "behind"), STALLS)
def test_fifo_keeps_order(depth: int, before: float, behind: float) -> None:
    dut = Fifo(16, depth)
    bench = Bench(dut, seed=depth)
    sent = [random.Random(k).getrandbits(16) for k in range(200)]
    bench.drive(dut.input, sent, stall=before)
    got = bench.collect(dut.output, len(sent), stall=behind)
    bench.run()
    assert got == sent


def test_fifo_takes_and_gives_a_word_a_cycle() -> None:
    dut = Fifo(8, 4)
    bench = Bench(dut)
    bench.drive(dut.input, range(100))
    bench.collect(dut.output, 100)
    assert bench.run() <= 100 + 4


def test_fifo_is_full_at_its_depth_and_two() -> None:
    dut = Fifo(8, 4)
    bench = Bench(dut)
    bench.drive(dut.input, range(100), wait=False)

    async def look(ctx: Any) -> None:
        await ctx.tick().repeat(30)
        assert ctx.get(dut.level) == 6
        assert not ctx.get(dut.input.ready)

    bench.process(look)
    bench.run()


def small(**sizes: Any) -> Design:
    return Design(**{"lanes": 32, "element_lanes": 4, "memory_bits": 16, **sizes})


@pytest.mark.parametrize(("burst", "fifo_words"), [(1, 4), (4, 8), (8, 64)])
@pytest.mark.parametrize(("before", "behind"), STALLS)
def test_streamer_reads_what_commands_say(
    burst: int, fifo_words: int, before: float, behind: float
) -> None:
    dut = Streamer(small(burst=burst, fifo_words=fifo_words))
    bench = Bench(dut, seed=burst)
    commands = [(3, 21), (700, 1), (0, 0), (44, 1), (0, 40), (END - 2, 5)]
    expect = [
        {"data": 0 if a >= END else word(a, 16), "error": int(a >= END)}
        for start, count in commands
        for a in range(start, start + count)
    ]
    bench.drive(dut.command, [{"address": a, "words": n} for a, n in commands], stall=before)
    got = bench.collect(dut.words, len(expect), stall=behind)
    answer_requests(bench, dut.memory, 16, burst, stall=before)
    errors = []

    async def look(ctx: Any) -> None:
        while True:
            *_, error = await ctx.tick().sample(dut.error)
            errors.append(error)

    bench.process(look, background=True)
    bench.run()
    assert got == expect
    assert sum(errors) == 3


def test_streamer_is_busy_until_its_last_word_is_taken() -> None:
    dut = Streamer(small(burst=4, fifo_words=16))
    bench = Bench(dut)
    bench.drive(dut.command, [{"address": 2, "words": 9}])
    got = bench.collect(dut.words, 9, stall=0.5)
    answer_requests(bench, dut.memory, 16, 4, latency=20)

    async def look(ctx: Any) -> None:
        assert not ctx.get(dut.busy)
        await ctx.tick()
        while len(got) < 9:
            assert ctx.get(dut.busy)
            await ctx.tick()
        await ctx.tick()
        assert not ctx.get(dut.busy)

    bench.process(look)
    bench.run()


def test_streamer_reads_ahead_to_its_fifo_and_then_a_word_a_cycle() -> None:
    dut = Streamer(small(burst=4, fifo_words=16))
    bench = Bench(dut)
    bench.drive(dut.command, [{"address": 0, "words": 200}])
    requests = answer_requests(bench, dut.memory, 16, 4)

    async def wait(ctx: Any) -> None:
        await ctx.tick().repeat(60)
        assert ctx.get(dut.level) == 16
        assert len(requests) == 4

    bench.process(wait)
    bench.run()

    dut = Streamer(small(burst=4, fifo_words=16))
    bench = Bench(dut)
    bench.drive(dut.command, [{"address": 0, "words": 200}])
    answer_requests(bench, dut.memory, 16, 4, latency=0)
    bench.collect(dut.words, 200)
    assert bench.run() <= 200 + 20


class Two(wiring.Component):
    """A Streamer and a RowFetcher on one memory."""

    def __init__(self, design: Design) -> None:
        self.streamer, self.fetcher = Streamer(design), RowFetcher(design)
        self.arbiter = Arbiter(design, 2)
        super().__init__({})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules += [self.streamer, self.fetcher, self.arbiter]
        wiring.connect(m, self.streamer.memory, self.arbiter.readers[0])
        wiring.connect(m, self.fetcher.memory, self.arbiter.readers[1])
        return m


@pytest.mark.parametrize(("before", "behind"), STALLS)
def test_two_readers_share_a_memory(before: float, behind: float) -> None:
    dut = Two(small(burst=4, fifo_words=32))
    bench = Bench(dut, seed=5)
    stream = [(8, 150), (300, 33)]
    rows = [(17 * k % 900, 1 + k % 7) for k in range(20)]
    got = []
    for unit, commands in ((dut.streamer, stream), (dut.fetcher, rows)):
        bench.drive(unit.command, [{"address": a, "words": n} for a, n in commands], stall=before)
        count = sum(n for _, n in commands)
        got.append(bench.collect(unit.words, count, stall=behind))
    answer_requests(bench, dut.arbiter.memory, 16, 4, stall=before)
    bench.run()
    for commands, words in zip((stream, rows), got, strict=True):
        addresses = [a for start, count in commands for a in range(start, start + count)]
        assert words == [{"data": word(a, 16), "error": 0} for a in addresses]


RATIOS = [(64, 64), (512, 512), (512, 416), (16, 64), (16, 56), (64, 56), (512, 56), (128, 32)]


def cut(words: list[int], counts: list[int], in_bits: int, out_bits: int) -> list[int]:
    """The outputs of regions of so many outputs each, by integers of any length."""
    outputs, at = [], 0
    for count in counts:
        used = -(-count * out_bits // in_bits)
        whole = sum(w << in_bits * k for k, w in enumerate(words[at : at + used]))
        outputs += [(whole >> out_bits * k) & ((1 << out_bits) - 1) for k in range(count)]
        at += used
    assert at == len(words)
    return outputs


@pytest.mark.parametrize(("in_bits", "out_bits"), RATIOS)
@pytest.mark.parametrize(("before", "behind"), STALLS[::3])
def test_gearbox_cuts_regions(in_bits: int, out_bits: int, before: float, behind: float) -> None:
    dut = Gearbox(in_bits, out_bits)
    bench = Bench(dut, seed=in_bits)
    rng = random.Random(out_bits)
    counts = [1, 0, 2, 40, *(rng.randrange(1, 12) for _ in range(6))]
    used = sum(-(-count * out_bits // in_bits) for count in counts)
    words = [rng.getrandbits(in_bits) for _ in range(used)]
    bench.drive(dut.command, counts, stall=before)
    bench.drive(dut.words, [{"data": w, "error": 0} for w in words], stall=before)
    got = bench.collect(dut.output, sum(counts), stall=behind)
    bench.run()
    assert got == cut(words, counts, in_bits, out_bits)


@pytest.mark.parametrize(("in_bits", "out_bits"), RATIOS)
def test_gearbox_gives_an_output_a_cycle_where_words_suffice(in_bits: int, out_bits: int) -> None:
    dut = Gearbox(in_bits, out_bits)
    bench = Bench(dut)
    count = 120 * min(in_bits, out_bits) // out_bits
    used = -(-count * out_bits // in_bits)
    bench.drive(dut.command, [count])
    bench.drive(dut.words, [{"data": k % 251, "error": 0} for k in range(used)])
    bench.collect(dut.output, count)
    assert bench.run() <= max(count, used) + 8 + in_bits // gcd(in_bits, out_bits) // 8


@pytest.mark.parametrize(("in_bits", "out_bits"), [(64, 64), (64, 56), (16, 64)])
def test_gearbox_leaves_the_next_region_its_words(in_bits: int, out_bits: int) -> None:
    dut = Gearbox(in_bits, out_bits)
    bench = Bench(dut)
    bench.drive(dut.command, [3])
    bench.drive(dut.words, ({"data": k, "error": k == 1} for k in range(99)), wait=False)
    bench.collect(dut.output, 3)
    taken = errors = 0

    async def count(ctx: Any) -> None:
        nonlocal taken, errors
        while True:
            *_, valid, ready, error = await ctx.tick().sample(
                dut.words.valid, dut.words.ready, dut.error
            )
            taken += valid and ready
            errors += error

    bench.process(count, background=True)
    bench.run()
    assert taken == -(-3 * out_bits // in_bits)
    assert errors == 1
