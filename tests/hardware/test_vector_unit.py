"""The vector unit with its memories, against the integer model's vectors, bit by bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from amaranth import Module, Signal
from amaranth.hdl import Assert
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from hardware import formal
from hardware.streams import Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.ports import VectorOp
from nomatmul.hardware.rtl.vector_memory import ParameterMemory, VectorMemory
from nomatmul.hardware.rtl.vector_unit import VectorUnit
from nomatmul.reference.integer import scalar, vector
from nomatmul.reference.integer.scalar import Scalar

ZERO = {"m": 0, "e": 0}
W_MOST = 2**15 - 1


def design(**parameters: int) -> Design:
    small = {"lanes": 32, "element_lanes": 4, "vector_words": 512, "parameter_words": 512}
    return Design(**{**small, "activation_beats": 4, "memory_bits": 64, **parameters})


class Units(wiring.Component):
    """The unit and the memories that it reads."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "command": In(stream.Signature(ports.VectorCommand)),
                "result": Out(stream.Signature(ports.Scalar)),
                "vector_write": In(ports.vector_write(design)),
                "parameter_write": In(ports.parameter_write(design)),
                "activation": Out(ports.ActivationWrite(design)),
                "exponent": Out(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.unit = unit = VectorUnit(self.design)
        m.submodules.vectors = vectors = VectorMemory(self.design)
        m.submodules.parameters = parameters = ParameterMemory(self.design)
        connect(m, flipped(self.command), unit.command)
        connect(m, unit.result, flipped(self.result))
        connect(m, unit.vector, vectors.read)
        connect(m, unit.parameter, parameters.read)
        connect(m, flipped(self.vector_write), vectors.write)
        connect(m, flipped(self.parameter_write), parameters.write)
        connect(m, unit.activation, flipped(self.activation))
        m.d.comb += [self.exponent.eq(unit.exponent), self.busy.eq(unit.busy)]
        return m


def plain(value: Scalar) -> dict[str, int]:
    return {"m": int(value.m), "e": int(value.e)}


class Run:
    """Vectors in memory one after another, and SCAN, SUMSQ, QUANT of each, in one simulation."""

    def __init__(self, design: Design, vectors: list[tuple[Any, Any]]) -> None:
        """Vectors: (x, W), W None for ones."""
        self.design = design
        self.commands: list[dict[str, Any]] = []
        self.results: list[dict[str, int]] = []
        self.activations: dict[int, list[int]] = {}
        self.x = np.zeros(design.vector_words, np.int64)
        self.w = np.zeros(design.parameter_words, np.int64)
        src = w = beat = 0
        for x, weights in vectors:
            x = np.asarray(x, np.int64)
            ones = weights is None
            weights = np.full(len(x), vector.ONES) if ones else np.asarray(weights, np.int64)
            self.x[src : src + len(x)] = x
            # what lies behind a vector must not count
            behind = self.x[src + len(x) : self._end(src, len(x))]
            behind[:] = -(2 ** (design.vector_bits - 1))
            if not ones:
                self.w[w : w + len(x)] = weights
                self.w[w + len(x) : self._end(w, len(x))] = W_MOST
            self._add(x, weights, {"src": src, "w": w, "ones": int(ones), "dst": beat})
            src = self._end(src, len(x))
            w = w if ones else self._end(w, len(x))
            beat = (beat + 1) % (design.activation_beats - len(x) // design.lanes)
        self.x, self.w = self.x[:src], self.w[:w]

    def _end(self, start: int, count: int) -> int:
        lanes = self.design.element_lanes
        return start + -(-count // lanes) * lanes

    def _add(self, x: Any, w: Any, where: dict[str, int]) -> None:
        a = vector.scan(x, w)
        r = scalar.div(Scalar.of(127), a)
        square, q = vector.sumsq(x, w, a), vector.quantise(x, w, a, r)
        operands = {
            VectorOp.SCAN: (ZERO, ZERO, plain(a)),
            VectorOp.SUMSQ: (plain(a), ZERO, plain(square)),
            VectorOp.QUANT: (plain(a), plain(r), ZERO),
        }
        for op, (first, second, result) in operands.items():
            self.commands.append({"op": op, "count": len(x), "a": first, "r": second, **where})
            self.results.append(result)
        lanes = self.design.element_lanes
        padded = np.concatenate([q, np.zeros(-len(q) % lanes, np.int64)]).reshape(-1, lanes)
        first_group = where["dst"] * self.design.lanes // lanes
        for group, values in enumerate(padded):
            self.activations[first_group + group] = values.tolist()

    def check(self, *, stall: float = 0.0, seed: int = 0) -> list[int]:
        """Simulate; gives the cycles from each command's taking to its result's."""
        dut = Units(self.design)
        bench = Bench(dut, seed=seed)
        rng = random.Random(seed)
        written: dict[int, list[int]] = {}
        taken: list[int] = []
        waited: list[int] = []
        lanes = self.design.element_lanes

        async def load(ctx: Any) -> None:
            write, group = dut.vector_write, dut.parameter_write
            ctx.set(write.valid, 1)
            for address, value in enumerate(self.x.tolist()):
                ctx.set(write.address, address)
                ctx.set(write.data, value)
                await ctx.tick()
            ctx.set(write.valid, 0)
            ctx.set(group.valid, 1)
            for address, value in enumerate(self.w.tolist()):
                ctx.set(group.address, address // lanes)
                ctx.set(group.mask, 1 << address % lanes)
                # elements outside the mask are not written
                ctx.set(group.data, [value if k == address % lanes else 99 for k in range(lanes)])
                await ctx.tick()
            ctx.set(group.valid, 0)

        async def drive(ctx: Any) -> None:
            await load(ctx)
            for command in self.commands:
                while rng.random() < stall:
                    await ctx.tick()
                ctx.set(dut.command.payload, command)
                ctx.set(dut.command.valid, 1)
                await ctx.tick().until(dut.command.ready)
                ctx.set(dut.command.valid, 0)

        async def watch(ctx: Any) -> None:
            port, time = dut.activation, 0
            while True:
                *_, valid, address, data, wrong, takes, gives = await ctx.tick().sample(
                    port.valid,
                    port.address,
                    port.data,
                    dut.exponent,
                    dut.command.valid & dut.command.ready,
                    dut.result.valid & dut.result.ready,
                )
                assert not wrong
                time += 1
                if takes:
                    taken.append(time)
                if gives:
                    waited.append(time - taken[-1])
                if valid:
                    written[address] = [data[k] for k in range(lanes)]

        bench.process(watch, background=True)
        bench.process(drive)
        got = bench.collect(dut.result, len(self.commands), stall=stall)
        bench.run(60_000)
        assert got == self.results
        assert written == self.activations
        return waited


def random_vector(rng: np.random.Generator, count: int, bits: int) -> tuple[Any, Any]:
    """x and W of random sizes, so that every distance of the shift is met."""
    x_size, w_size = rng.integers(1, bits), rng.integers(1, 16)
    x = rng.integers(-(2 ** (x_size - 1)), 2 ** (x_size - 1), count, endpoint=True)
    w = rng.integers(-(2 ** (w_size - 1)), 2 ** (w_size - 1), count, endpoint=True)
    return np.clip(x, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), np.clip(w, -W_MOST, W_MOST)


def awkward(lanes: int, bits: int) -> list[tuple[Any, Any]]:
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [
        ([0] * 9, [W_MOST] * 9),
        ([5, -7, 9], [0, 0, 0]),
        ([1], [1]),
        ([-1], [1]),
        ([0, 0, 1], None),
        ([least], [-(2**15)]),
        ([most], [W_MOST]),
        ([least, most] * 5, [-(2**15), W_MOST] * 5),
        ([least] * 7, [W_MOST] * 7),
        ([least, 1, -1, 0, most], None),
        # one element decides, the others vanish beside it
        ([1] * (2 * lanes) + [most], [1] * (2 * lanes) + [W_MOST]),
        # halves of a step: ties
        ([254, 1, -1, 3, -3, 127, -127], [2**14] * 7),
        *(([3 * k - 5 for k in range(count)], None) for count in range(1, lanes + 2)),
    ]


def test_awkward_vectors() -> None:
    Run(design(), awkward(4, 24)).check()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"element_lanes": 8, "lanes": 96},
        {"vector_bits": 32, "element_lanes": 16},
        {"vector_bits": 16},
    ],
    ids=str,
)
def test_random_vectors_back_to_back(parameters: dict[str, int]) -> None:
    shape = design(**parameters)
    rng = np.random.default_rng(1)
    vectors = [random_vector(rng, n, shape.vector_bits) for n in (1, 2, 5, 8, 13, 16, 17, 31, 70)]
    vectors += [random_vector(rng, int(n), shape.vector_bits) for n in rng.integers(1, 10, 12)]
    Run(shape, vectors).check()


def test_stalls_change_nothing() -> None:
    rng = np.random.default_rng(2)
    vectors = [random_vector(rng, int(n), 24) for n in rng.integers(1, 30, 12)]
    Run(design(), vectors).check(stall=0.6, seed=5)


def test_cycles_are_the_stated_ones() -> None:
    """16 groups of 4, by the legend: n + 2 L + 13, n + L + 17, n + 12."""
    rng = np.random.default_rng(3)
    cycles = Run(design(), [random_vector(rng, 64, 24)]).check()
    assert cycles == [16 + 4 + 13, 16 + 2 + 17, 16 + 12]


@st.composite
def vectors(draw: st.DrawFn) -> tuple[list[int], list[int] | None]:
    count = draw(st.integers(1, 13))
    x_most, w_most = 2 ** draw(st.integers(0, 23)), 2 ** draw(st.integers(0, 15))
    x = st.one_of(st.integers(-x_most, x_most - 1), st.sampled_from([-x_most, 0, x_most - 1]))
    w = st.integers(-w_most, w_most - 1)
    weights = st.one_of(st.none(), st.lists(w, min_size=count, max_size=count))
    return draw(st.lists(x, min_size=count, max_size=count)), draw(weights)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(vectors(), min_size=20, max_size=30))
def test_any_vectors(many: list[tuple[list[int], list[int] | None]]) -> None:
    Run(design(), many).check()


@pytest.mark.parametrize(
    ("a", "r", "wrong"),
    [
        ((2**23, 15), (2**23, -55), False),  # f = 26
        ((2**23, 15), (2**23, -56), False),
        ((2**23, 15), (2**23, -57), True),
        ((2**23, 15), (2**23, -54), True),
        ((2**23, 16), (2**23, -56), True),  # larger than any product
        ((2**23, -23), (2**23, -17), False),
        ((2**23, -24), (2**23, -16), True),  # smaller than 1
        ((0, 0), (0, 0), False),
    ],
)
def test_exponents_that_cannot_be_are_flagged(
    a: tuple[int, int], r: tuple[int, int], wrong: bool
) -> None:
    dut = VectorUnit(design())
    bench = Bench(dut)
    flags: list[int] = []

    async def watch(ctx: Any) -> None:
        while True:
            *_, flag = await ctx.tick().sample(dut.exponent)
            flags.append(flag)

    bench.process(watch, background=True)
    first, second = ({"m": m, "e": e} for m, e in (a, r))
    bench.drive(dut.command, [{"op": VectorOp.QUANT, "count": 5, "a": first, "r": second}])
    bench.collect(dut.result, 1)
    bench.run(200)
    assert sum(flags) == wrong


class OneResult(wiring.Component):
    """Whatever comes: one result for each command, which waits until it is taken.

    And no standstill: a command that has no result yet still reads groups, whose number falls each
    cycle, or its last group moves on to the result each cycle.
    """

    def __init__(self) -> None:
        super().__init__({})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.unit = unit = VectorUnit(design())
        command, result = unit.command, unit.result
        formal.assume_stream(m, command, "command")
        m.d.comb += result.ready.eq(formal.free(m, 1, "ready"))
        commands = Signal(2)
        m.d.sync += commands.eq(
            commands + (command.valid & command.ready) - (result.valid & result.ready)
        )
        waits = Signal()
        m.d.sync += waits.eq(result.valid & ~result.ready)
        m.d.comb += [
            Assert(commands <= 1),
            Assert(unit.busy == (commands == 1)),
            Assert(~waits | result.valid),
            Assert(~(unit.working & result.valid)),
            Assert(unit.running + unit.ending == unit.working),
        ]
        return m


def test_proof_of_one_result_a_command() -> None:
    formal.prove(OneResult(), depth=3)
