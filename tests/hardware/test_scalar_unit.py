"""The scalar unit against the integer model's scalars, bit by bit; proofs of its recurrences."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from amaranth import Module, Mux, Signal
from amaranth.hdl import Assert, Assume
from amaranth.lib import wiring
from hardware import formal
from hardware.streams import Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nomatmul.hardware.rtl.digits import Digits
from nomatmul.hardware.rtl.ports import ScalarOp
from nomatmul.hardware.rtl.scalar_unit import ScalarUnit
from nomatmul.reference.integer import scalar
from nomatmul.reference.integer.scalar import Scalar

Pair = tuple[int, int]
Command = tuple[ScalarOp, Pair, Pair]

LEAST, MOST = 2**23, 2**24 - 1
EXACT = {
    ScalarOp.MUL: scalar.mul,
    ScalarOp.ADD: scalar.add,
    ScalarOp.DIV: scalar.div,
    ScalarOp.SQRT: lambda a, b: scalar.sqrt(a),
}


def expected(command: Command) -> Pair:
    op, a, b = command
    result = EXACT[op](*(Scalar(np.int64(m), np.int64(e)) for m, e in (a, b)))
    return int(result.m), int(result.e)


def run(commands: list[Command], *, stall: float = 0.0, seed: int = 0) -> list[dict[str, int]]:
    dut = ScalarUnit()
    bench = Bench(dut, seed=seed)
    bench.drive(
        dut.command,
        [
            {"op": op, "a": {"m": a[0], "e": a[1]}, "b": {"m": b[0], "e": b[1]}}
            for op, a, b in commands
        ],
        stall=stall,
    )
    got = bench.collect(dut.result, len(commands), stall=stall)
    bench.run(60_000)
    return got


def check(commands: list[Command], **stalls: Any) -> list[dict[str, int]]:
    got = run(commands, **stalls)
    for command, result in zip(commands, got, strict=True):
        assert (result["m"], result["e"]) == expected(command), command
    return got


def some(rng: random.Random) -> Pair:
    if rng.random() < 0.08:
        return 0, 0
    m = rng.choice([LEAST, LEAST + 1, MOST, rng.randint(LEAST, MOST), rng.randint(LEAST, MOST)])
    return m, rng.choice([rng.randint(-512, 511), rng.randint(-40, 5), rng.randint(-40, 5)])


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_random_commands_one_after_another(stall: float) -> None:
    rng = random.Random(1)
    commands = [(rng.choice(list(ScalarOp)), some(rng), some(rng)) for _ in range(300)]
    check(commands, stall=stall, seed=2)


@pytest.mark.parametrize("op", list(ScalarOp), ids=lambda op: op.name)
def test_awkward_operands(op: ScalarOp) -> None:
    numbers = [(0, 0)] + [(m, e) for m in (LEAST, MOST) for e in (-512, -513 // 2, -23, 0, 511)]
    check([(op, a, b) for a in numbers for b in numbers])


def test_operands_of_all_distances_are_added() -> None:
    rng = random.Random(3)
    commands: list[Command] = []
    for apart in [*range(-34, 35), 200, 1023, -1023]:
        a = (rng.randint(LEAST, MOST), min(max(apart // 2, -512), 511))
        b = (rng.randint(LEAST, MOST), min(max(a[1] - apart, -512), 511))
        commands.append((ScalarOp.ADD, a, b))
    check(commands)


def test_an_exponent_out_of_range_is_clamped_and_flagged() -> None:
    big, small, one = (MOST, 511), (LEAST, -512), (LEAST, -23)
    commands = [
        (ScalarOp.MUL, big, big),
        (ScalarOp.MUL, small, small),
        (ScalarOp.DIV, small, big),
        (ScalarOp.ADD, big, big),
        (ScalarOp.MUL, big, one),
        (ScalarOp.DIV, big, one),
        (ScalarOp.DIV, big, (0, 0)),
        (ScalarOp.ADD, big, small),
        (ScalarOp.SQRT, small, one),
    ]
    assert [result["flag"] for result in check(commands)] == [1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_roots_and_quotients_beside_whole_ones() -> None:
    """Squares and products, one less and one more: where a digit recurrence goes wrong first."""
    rng = random.Random(4)
    commands: list[Command] = []
    for _ in range(30):
        root = rng.randint(2**12, 2**13 - 1)
        for square in (root * root - 1, root * root, root * root + 1):
            commands.append((ScalarOp.SQRT, plain(square, rng.randint(-9, 9)), (0, 0)))
        a, b = rng.randint(2**11, 2**12), rng.randint(2**10, 2**12)
        for product in (a * b - 1, a * b, a * b + 1):
            commands.append((ScalarOp.DIV, plain(product, 3), plain(b, -4)))
    check(commands)


def plain(n: int, e: int) -> Pair:
    value = scalar.normal(np.int64(n), np.int64(e))
    return int(value.m), int(value.e)


pairs = st.one_of(st.just((0, 0)), st.tuples(st.integers(LEAST, MOST), st.integers(-512, 511)))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(list(ScalarOp)), pairs, pairs), min_size=30, max_size=40))
def test_any_commands(commands: list[Command]) -> None:
    check(commands)


@pytest.mark.parametrize(
    ("command", "cycles"),
    [
        ((ScalarOp.MUL, (LEAST, 0), (MOST, 3)), 8),
        ((ScalarOp.DIV, (LEAST, 0), (MOST, 3)), 28),
        ((ScalarOp.SQRT, (LEAST, 0), (MOST, 3)), 28),
        ((ScalarOp.ADD, (LEAST, 0), (MOST, 0)), 4),
        ((ScalarOp.ADD, (LEAST, 31), (MOST, 0)), 4 + 10),
    ],
    ids=str,
)
def test_cycles_are_the_stated_ones(command: Command, cycles: int) -> None:
    dut = ScalarUnit()
    bench = Bench(dut)
    seen: list[int] = []

    async def watch(ctx: Any) -> None:
        time = 0
        while True:
            *_, takes, gives = await ctx.tick().sample(
                dut.command.valid & dut.command.ready, dut.result.valid & dut.result.ready
            )
            time += 1
            if takes or gives:
                seen.append(time)

    bench.process(watch, background=True)
    op, a, b = command
    bench.drive(dut.command, [{"op": op, "a": {"m": a[0], "e": a[1]}, "b": {"m": b[0], "e": b[1]}}])
    bench.collect(dut.result, 1)
    bench.run(200)
    assert seen[1] - seen[0] == cycles


# -- proofs ---------------------------------------------------------------------------------------


class Recurrence(wiring.Component):
    """The invariants of a quotient (or root) of `bits` bits, after every step."""

    def __init__(self, bits: int, *, root: bool) -> None:
        self.bits, self.root = bits, root
        super().__init__({})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self.bits
        m.submodules.digits = unit = Digits(bits)
        a, b = Signal(bits + 1), Signal(bits)
        begun = Signal()
        m.d.comb += [
            unit.start.eq(formal.free(m, 1, "start")),
            unit.a.eq(formal.free(m, bits + 1, "a")),
            unit.b.eq(formal.free(m, bits, "b")),
            unit.root.eq(self.root),
            Assume(self.root | (unit.a < (unit.b << 1))),
        ]
        with m.If(unit.start):
            m.d.sync += [a.eq(unit.a), b.eq(unit.b), begun.eq(1)]
        left = unit.step
        with m.If(begun):
            m.d.comb += Assert(left <= bits + 1)
            if self.root:
                so_far = (a << bits) >> (left << 1)
                m.d.comb += [
                    Assert(unit.value * unit.value + unit.rest == so_far),
                    Assert(unit.rest <= (unit.value << 1)),
                ]
            else:
                so_far = ((a << (bits + 1)) >> left) >> 1
                m.d.comb += [
                    Assert(unit.value * b + unit.rest == so_far),
                    Assert(unit.rest < b),
                ]
        return m


@pytest.mark.parametrize("root", [False, True], ids=["quotient", "root"])
@pytest.mark.parametrize("bits", [3, 4])
def test_proof_of_the_recurrences(bits: int, root: bool) -> None:
    """For all operands; after the last step the invariants are what a quotient and a root are."""
    formal.prove(Recurrence(bits, root=root), depth=bits + 4, induction=False)


class OneResult(wiring.Component):
    """Whatever comes: one result a command, at most 28 cycles later."""

    def __init__(self) -> None:
        super().__init__({})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.unit = unit = ScalarUnit()
        command, result = unit.command, unit.result
        formal.assume_stream(m, command, "command")
        m.d.comb += result.ready.eq(formal.free(m, 1, "ready"))
        commands, age, waits = Signal(2), Signal(6), Signal()
        m.d.sync += [
            commands.eq(commands + (command.valid & command.ready) - (result.valid & result.ready)),
            age.eq(Mux((commands == 0) | result.valid, 0, age + 1)),
            waits.eq(result.valid & ~result.ready),
        ]
        states, step, digit, left = unit.states, unit.step, unit.digits.step, Signal(6)
        shifts = unit.apart[2:] + unit.apart[:2]
        for name, cycles in (
            ("PREPARE", 27),
            ("MULTIPLY", 7 - step),
            ("ALIGN", shifts + 2),
            ("DIGITS", digit + 1),
            ("ROUND", 1),
        ):
            with m.If(states[name]):
                m.d.comb += left.eq(cycles)
        m.d.comb += [
            Assert(sum(states.values()) == 1),
            Assert(~states["MULTIPLY"] | ((step >= 1) & (step <= 5))),
            Assert(~(states["IDLE"] | states["PREPARE"]) | (step == 0)),
            Assert(~states["DIGITS"] | ((digit >= 1) & (digit <= 25))),
            Assert(commands <= 1),
            Assert(command.ready == (commands == 0)),
            Assert(~result.valid | ((commands == 1) & (step == 0))),
            Assert(~waits | result.valid),
            Assert(age + left <= 27),
        ]
        return m


def test_proof_of_one_result_a_command() -> None:
    formal.prove(OneResult(), depth=3)
