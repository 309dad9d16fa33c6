"""Decoders, array and product unit beside numpy, with rows as formats/packing.py packs them.

Legend: N rows, K inputs, L lanes, E activations a write, S slots.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from amaranth.sim import Simulator
from hardware.streams import Bench
from numpy.typing import NDArray

from nomatmul.formats import packing
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import decode
from nomatmul.hardware.rtl.activation_memory import READ_LATENCY, ActivationMemory, reciprocal
from nomatmul.hardware.rtl.array import TernaryArray
from nomatmul.hardware.rtl.products import ProductUnit

PACKINGS = packing.PACKINGS


def pack_beats(t_NK: NDArray[np.int8], design: Design) -> list[int]:
    """The beats of the rows, in order: each `lanes` inputs of a row packed alone."""
    rows, columns = t_NK.shape
    beats = design.beats(columns)
    padded = np.zeros((rows, beats * design.lanes), dtype=np.int8)
    padded[:, :columns] = t_NK
    packed = packing.pack_ternary(padded.reshape(rows * beats, design.lanes), design.packing)
    return [int.from_bytes(row[: design.beat_bits // 8].tobytes(), "little") for row in packed]


def interleave(matrices: list[NDArray[np.int8]]) -> NDArray[np.int8]:
    """Rows of S matrices [N, K] in turns, [S * N, K]."""
    return np.stack(matrices, axis=1).reshape(-1, matrices[0].shape[1])


def write_activations(bench: Bench, dut: Any, design: Design, q_K: NDArray[np.int8]) -> None:
    """Fill the activation memory from beat 0 on, a group a cycle, in an order of no meaning."""
    lanes, some = design.element_lanes, random.Random(len(q_K))
    groups = q_K.reshape(-1, lanes)
    order = some.sample(range(len(groups)), len(groups))

    async def write(ctx: Any) -> None:
        for address in order:
            ctx.set(dut.valid, 1)
            ctx.set(dut.address, address)
            ctx.set(dut.data, [int(q) for q in groups[address]])
            await ctx.tick()
        ctx.set(dut.valid, 0)

    bench.process(write)


def run_products(
    design: Design,
    matrices: list[NDArray[np.int8]],
    q_SK: NDArray[np.int8],
    *,
    act: int = 0,
    stall: float = 0.0,
    behind: float = 0.0,
    seed: int = 0,
) -> tuple[list[dict[str, int]], int]:
    """The sums of one command, and the cycles from the end of the writes."""
    slots, columns = q_SK.shape
    beats = design.beats(columns)
    memory = np.full((design.activation_beats, design.lanes), 77, dtype=np.int8)
    memory[act : act + slots * beats] = 0
    for s in range(slots):
        flat = memory[act + s * beats : act + (s + 1) * beats].reshape(-1)
        flat[:columns] = q_SK[s]  # what is behind meets weights of zero
        flat[columns:] = 99
    rows = interleave(matrices)
    dut = ProductUnit(design)
    bench = Bench(dut, seed=seed)
    write_activations(bench, dut.activation, design, memory.reshape(-1))
    writing = memory.size // design.element_lanes + 1
    command = {"rows": len(rows), "beats": beats, "slots": slots, "act": act}

    async def send(ctx: Any) -> None:
        await ctx.tick().repeat(writing)
        ctx.set(dut.command.payload, command)
        ctx.set(dut.command.valid, 1)
        await ctx.tick()
        ctx.set(dut.command.valid, 0)
        await ctx.tick().repeat(2)

    bench.process(send)
    bench.drive(dut.beats, pack_beats(rows, design), stall=stall)
    got = bench.collect(dut.sums, len(rows), stall=behind)
    cycles = bench.run(60_000)
    return got, cycles - writing


def expected_sums(matrices: list[NDArray[np.int8]], q_SK: NDArray[np.int8]) -> list[dict[str, int]]:
    rows, slots = interleave(matrices).astype(np.int64), len(matrices)
    return [
        {"sum": int(rows[r] @ q_SK[r % slots]), "slot": r % slots, "row": r, "last": int(last)}
        for r in range(len(rows))
        for last in [r == len(rows) - 1]
    ]


def small(**sizes: Any) -> Design:
    return Design(**{"lanes": 32, "element_lanes": 4, "activation_beats": 16, **sizes})


def random_case(rng: np.random.Generator, rows: int, columns: int, slots: int) -> Any:
    matrices = [rng.integers(-1, 2, (rows, columns), dtype=np.int8) for _ in range(slots)]
    return matrices, rng.integers(-127, 128, (slots, columns), dtype=np.int8)


# -- decoders ------------------------------------------------------------------------------------


def decoded(form: str, lanes: int, beats: list[int]) -> tuple[NDArray[np.int8], list[int]]:
    dut = decode.Decoder(form, lanes)
    codes, illegal = [], []

    async def test(ctx: Any) -> None:
        for beat in [*beats, *[0] * 5]:
            ctx.set(dut.beat, beat)
            await ctx.tick()
            codes.append([ctx.get(dut.codes)[k] for k in range(lanes)])
            illegal.append(ctx.get(dut.illegal))

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(test)
    simulator.run()
    start = decode.LATENCY[form] - 1
    count = len(beats)
    return np.array(codes[start : start + count]), illegal[start + 2 : start + 2 + count]


@pytest.mark.parametrize("form", PACKINGS)
def test_decoders_read_what_packing_writes(form: str) -> None:
    rng = np.random.default_rng(7)
    design = small(packing=form)
    t_NK = rng.integers(-1, 2, (300, 32), dtype=np.int8)
    codes, illegal = decoded(form, 32, pack_beats(t_NK, design))
    np.testing.assert_array_equal(codes - 1, t_NK)
    assert not any(illegal)


def test_every_byte_is_five_digits_or_illegal() -> None:
    legal = {int(b) for b in packing._BASE3_BYTE}
    assert len(legal) == 243
    codes, illegal = decoded("1.6bit", 5, list(range(256)))
    assert {b for b in range(256) if not illegal[b]} == legal
    for byte in legal:
        np.testing.assert_array_equal(codes[byte], packing._BASE3_DIGITS[byte])


def test_code_3_is_illegal_wherever_it_stands() -> None:
    plain = sum(1 << 2 * k for k in range(48))
    beats = [plain, *(plain | 3 << 2 * k for k in range(48)), plain]
    _, illegal = decoded("2bit", 48, beats)
    assert illegal == [0, *[1] * 48, 0]


# -- the array -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [2, 5, 32, 96, 256])
def test_array_adds_products(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    codes = rng.integers(0, 4, (60, lanes))
    q = rng.integers(-127, 128, (60, lanes))
    for k, (code, value) in enumerate([(0, 127), (0, -127), (2, 127), (2, -127), (1, 127), (0, 0)]):
        codes[k], q[k] = code, value
    codes[6], q[6] = np.arange(lanes) % 2 * 2, np.arange(lanes) % 2 * 254 - 127
    dut = TernaryArray(lanes)
    sums = []

    async def test(ctx: Any) -> None:
        for k in range(len(q) + dut.latency):
            row = min(k, len(q) - 1)
            ctx.set(dut.codes, [int(c) for c in codes[row]])
            ctx.set(dut.activations, [int(a) for a in q[row]])
            await ctx.tick()
            sums.append(ctx.get(dut.sum) + ctx.get(dut.carry))

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(test)
    simulator.run()
    weights = np.where(codes == 3, 0, codes - 1)
    start = dut.latency - 1
    assert sums[start : start + len(q)] == (weights * q).sum(axis=1).tolist()


def test_quotients_of_group_addresses_are_exact() -> None:
    for divisor in (3, 12, 24, 40):
        factor, shift = reciprocal(divisor, 2048)
        for n in range(2048):
            assert n * factor >> shift == n // divisor


def test_activation_memory_of_lanes_that_are_no_power_of_two() -> None:
    design = small(lanes=96, activation_beats=5)
    dut = ActivationMemory(design)
    bench = Bench(dut)
    q = np.random.default_rng(1).integers(-127, 128, 5 * 96, dtype=np.int8)
    write_activations(bench, dut.write, design, q)
    seen = []

    async def read(ctx: Any) -> None:
        await ctx.tick().repeat(len(q) // 4 + 3)
        for beat in range(5):
            ctx.set(dut.address, beat)
            await ctx.tick().repeat(READ_LATENCY)
            seen.append([ctx.get(dut.data)[k] for k in range(96)])

    bench.process(read)
    bench.run()
    np.testing.assert_array_equal(np.array(seen), q.reshape(5, 96))


# -- the unit ------------------------------------------------------------------------------------

SHAPES = [
    # rows a slot, inputs, slots, first beat
    (1, 1, 1, 0),
    (1, 32, 1, 15),
    (5, 33, 1, 0),
    (40, 32, 1, 3),
    (7, 100, 3, 4),
    (9, 64, 2, 0),
    (3, 512, 1, 0),
    (20, 20, 3, 13),
]


@pytest.mark.parametrize(("rows", "columns", "slots", "act"), SHAPES)
@pytest.mark.parametrize(("form", "stall", "behind"), [("2bit", 0.5, 0.0), ("1.6bit", 0.2, 0.8)])
def test_product_unit_gives_the_sums(
    form: str, rows: int, columns: int, slots: int, act: int, stall: float, behind: float
) -> None:
    rng = np.random.default_rng(rows * columns)
    matrices, q_SK = random_case(rng, rows, columns, slots)
    design = small(packing=form)
    got, _ = run_products(design, matrices, q_SK, act=act, stall=stall, behind=behind, seed=rows)
    assert got == expected_sums(matrices, q_SK)


@pytest.mark.parametrize("form", PACKINGS)
def test_a_beat_a_cycle_without_bubbles(form: str) -> None:
    rng = np.random.default_rng(3)
    for rows, columns, slots in [(200, 32, 1), (40, 90, 3), (60, 32, 3)]:
        matrices, q_SK = random_case(rng, rows, columns, slots)
        design = small(packing=form)
        got, cycles = run_products(design, matrices, q_SK)
        assert got == expected_sums(matrices, q_SK)
        assert cycles <= rows * slots * design.beats(columns) + 20


@pytest.mark.parametrize("form", PACKINGS)
def test_the_largest_sums(form: str) -> None:
    ones = np.ones((1, 512), dtype=np.int8)
    q_SK = np.full((1, 512), 127, dtype=np.int8)
    for sign in (1, -1):
        matrix = np.concatenate([ones, -ones, ones - ones])
        got, _ = run_products(small(packing=form), [matrix], sign * q_SK)
        assert [one["sum"] for one in got] == [sign * 512 * 127, -sign * 512 * 127, 0]


def test_sums_wait_as_long_as_they_must_and_none_is_lost() -> None:
    rng = np.random.default_rng(5)
    matrices, q_SK = random_case(rng, 150, 32, 1)
    got, _ = run_products(small(), matrices, q_SK, behind=0.97)
    assert got == expected_sums(matrices, q_SK)


def test_commands_follow_each_other_and_empty_ones_do_nothing() -> None:
    rng = np.random.default_rng(6)
    design = small()
    matrices, q_SK = random_case(rng, 6, 64, 1)
    dut = ProductUnit(design)
    bench = Bench(dut)
    memory = np.zeros(16 * 32, dtype=np.int8)
    memory[:64] = q_SK[0]
    write_activations(bench, dut.activation, design, memory)

    async def wait(ctx: Any) -> None:
        await ctx.tick().repeat(len(memory) // 4 + 2)
        assert not ctx.get(dut.busy)
        for rows, beats, slots in [(0, 2, 1), (6, 0, 1), (6, 2, 0), (0, 0, 0), (6, 2, 1)]:
            payload = {"rows": rows, "beats": beats, "slots": slots, "act": 0}
            ctx.set(dut.command.payload, payload)
            ctx.set(dut.command.valid, 1)
            taken = 0
            while not taken:
                *_, taken = await ctx.tick().sample(dut.command.ready)
            ctx.set(dut.command.valid, 0)
            assert ctx.get(dut.busy) == (rows > 0 and beats > 0)
            while ctx.get(dut.busy) and slots == 0:
                await ctx.tick()
        while len(got) < 12:
            await ctx.tick()
        await ctx.tick()
        assert not ctx.get(dut.busy)

    beats = pack_beats(matrices[0], design)
    bench.drive(dut.beats, beats + beats)
    got = bench.collect(dut.sums, 12)
    bench.process(wait)
    bench.run()
    assert got == expected_sums(matrices, q_SK) * 2


@pytest.mark.parametrize("form", PACKINGS)
def test_illegal_codes_are_flagged_once_a_beat_and_nothing_hangs(form: str) -> None:
    design = small(packing=form)
    zero = pack_beats(np.zeros((1, 32), dtype=np.int8), design)[0]
    byte = 0x57 if form == "2bit" else min(set(range(256)) - {int(b) for b in packing._BASE3_BYTE})
    bad = (zero & ~0xFF00) | byte << 8
    dut = ProductUnit(design)
    bench = Bench(dut)
    bench.drive(dut.command, [{"rows": 4, "beats": 2, "slots": 1, "act": 0}])
    bench.drive(dut.beats, [zero, zero, bad, zero, zero, bad, bad, zero], stall=0.4)
    got = bench.collect(dut.sums, 4)
    flags = []

    async def count(ctx: Any) -> None:
        while True:
            *_, illegal = await ctx.tick().sample(dut.illegal)
            flags.append(illegal)

    bench.process(count, background=True)
    bench.run()
    assert [one["row"] for one in got] == [0, 1, 2, 3]
    assert sum(flags) == 3
