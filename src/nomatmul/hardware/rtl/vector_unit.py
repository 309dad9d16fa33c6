"""The vector unit: SCAN, SUMSQ and QUANT of docs/hardware-numerics.md, E elements a cycle.

One command at a time: it reads groups of x and W, passes them through E lanes without a stall, and
gathers the largest |x * W| or the sum of squares, or writes int8 activations. Every command gives
exactly one result when its work is in memory; that of QUANT says only so, and is 0.

Legend: E lanes, L = log2(E). A command of n = max(1, ceil(count / E)) groups gives its result
n + 2 L + 13 (SCAN), n + L + 17 (SUMSQ) or n + 12 cycles (QUANT) after it is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amaranth import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import normaliser, ports
from nomatmul.hardware.rtl.pipeline import register
from nomatmul.hardware.rtl.ports import VectorOp
from nomatmul.hardware.rtl.vector_lane import (
    DISTANCE_BITS,
    INVERSE_BITS,
    LEFT,
    Q_LATENCY,
    SIZE_LATENCY,
    SQUARE_LATENCY,
    VectorLane,
)

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

ONE = 1 << 14  # W of a vector "ones"
DROPPED = 8  # bits by which the largest product is cut below a mantissa
TOTAL_BITS = 49  # of a sum of at most 2^16 squares of at most 2^32
COPIES = 4  # of what the lanes' shifts obey, the last one in time for the first group
READ_LATENCY = 3  # cycles from an address to x and W in the registers of the lanes


class VectorUnit(wiring.Component):
    """`command` in; `result` out, one a command. `busy` from the taking to the result's taking.

    Addresses are multiples of E and lie within their memories, `a` is 0 or the scan of the same
    vector, `r` is 127 / a: else the numbers are meaningless, but nothing hangs. `exponent` pulses
    for an exponent of `a` or `r` that no such vector has.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self.levels = (design.element_lanes - 1).bit_length()
        # for proofs: a command has no result yet; its groups are being read; how many last groups
        # are on their way to a result
        self.working, self.running, self.ending = Signal(), Signal(), Signal(6)
        super().__init__(
            {
                "command": In(stream.Signature(ports.VectorCommand)),
                "result": Out(stream.Signature(ports.Scalar)),
                "vector": Out(ports.vector_read(design)),
                "parameter": Out(ports.parameter_read(design)),
                "activation": Out(ports.ActivationWrite(design)),
                "busy": Out(1),
                "exponent": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        op, taken = Signal(VectorOp), Signal()
        # of the group whose address is out now: there is one, it is the command's first, its last
        running, first, last = self.running, Signal(), Signal()
        lanes = self._lanes(m, taken, self._addresses(m, taken, running, last))
        m.d.sync += first.eq(taken)
        size = self._largest(m, first, [lane.size for lane in lanes])
        total = self._sum(m, first, [lane.square for lane in lanes])
        self._result(m, op, taken, Mux(op == VectorOp.SCAN, size, total))
        self._write(m, op, running, [lane.q for lane in lanes])
        self._control(m, op, taken, last)
        self._check(m, taken)
        return m

    def _check(self, m: Module, taken: Signal) -> None:
        command = self.command.payload
        most = self.design.vector_bits + self.design.weight_bits - 1  # bits of the largest size
        found = (command.a.e + DROPPED + LEFT, -(command.r.e + command.a.e + 6 + DROPPED))
        distance, f = (register(m, each, name) for each, name in zip(found, "df", strict=True))
        scaled = (command.op != VectorOp.SCAN) & (command.a.m != 0)
        asked = register(m, taken & scaled, "asked", reset=True)
        is_quant = register(m, command.op == VectorOp.QUANT, "is_quant")
        wrong_a = (distance < 0) | (distance >= most)
        wrong_r = is_quant & (f != 26) & (f != 27)
        m.d.sync += self.exponent.eq(asked & (wrong_a | wrong_r))

    def _control(self, m: Module, op: Signal, taken: Signal, last: Signal) -> None:
        """From a command to its result."""
        command, result = self.command, self.result
        gathered = READ_LATENCY + self.levels + 1 + normaliser.LATENCY
        sizes, squares = op == VectorOp.SCAN, op == VectorOp.SUMSQ
        lines = [
            _line(m, last & sizes, gathered + self.levels + SIZE_LATENCY, "last_size"),
            _line(m, last & squares, gathered + SQUARE_LATENCY, "last_square"),
            # and an operation that is none, so that it ends
            _line(m, last & ~sizes & ~squares, READ_LATENCY + Q_LATENCY, "last_q"),
        ]
        working = self.working
        m.d.comb += self.ending.eq(sum(Cat(lines)))
        m.d.comb += [
            self.busy.eq(working | result.valid),
            command.ready.eq(~self.busy),
            taken.eq(command.valid & command.ready),
        ]
        with m.If(Cat(line[-1] for line in lines).any()):
            m.d.sync += [working.eq(0), result.valid.eq(1)]
        with m.If(result.valid & result.ready):
            m.d.sync += result.valid.eq(0)
        with m.If(taken):
            m.d.sync += [working.eq(1), op.eq(command.payload.op)]

    def _addresses(self, m: Module, taken: Signal, running: Signal, last: Signal) -> Signal:
        """Count through the groups; gives the mask of lanes for the data of the last read."""
        command, lanes, low = self.command.payload, self.design.element_lanes, self.levels
        left = Signal(ports.ELEMENT_BITS, reset_less=True)
        silent, mask = Signal(), Signal(lanes)
        inside = Cat((left > lane) for lane in range(lanes))
        m.d.comb += [
            self.vector.enable.eq(1),
            self.parameter.enable.eq(1),
            last.eq(running & (left <= lanes)),
        ]
        early = Signal(lanes)
        m.d.sync += [early.eq(Mux(running & ~silent, inside, 0)), mask.eq(early)]
        with m.If(running):
            m.d.sync += [
                self.vector.address.eq(self.vector.address + 1),
                self.parameter.address.eq(self.parameter.address + 1),
                left.eq(left - lanes),
                running.eq(~last),
            ]
        with m.If(~self.working):  # taken or not: no address waits for `valid`
            m.d.sync += [
                self.vector.address.eq(command.src[low:]),
                self.parameter.address.eq(command.w[low:]),
                left.eq(command.count),
                # where a is 0 all numbers are defined as 0
                silent.eq((command.op != VectorOp.SCAN) & (command.a.m == 0)),
                running.eq(taken),
            ]
        return mask

    def _lanes(self, m: Module, taken: Signal, mask: Signal) -> list[VectorLane]:
        """The lanes, their x (0 where not in `mask`), W and the constants of the command."""
        command = self.command.payload
        ones, far, squares = (
            Signal(name=name, reset_less=True) for name in ("ones", "far", "squares")
        )
        distance = Signal(DISTANCE_BITS, reset_less=True)
        inverse = Signal(INVERSE_BITS, reset_less=True)
        with m.If(taken):
            m.d.sync += [
                ones.eq(command.ones),
                distance.eq(command.a.e + DROPPED + LEFT),
                inverse.eq(command.r.m[ports.SCALAR_BITS - 1 - INVERSE_BITS :]),
                # f = -(e_r + e_a + 14) is 26 or 27
                far.eq(command.a.e[0] ^ command.r.e[0]),
                squares.eq(command.op == VectorOp.SUMSQ),
            ]
        copies = self._copies(m, Cat(distance, squares))
        lanes = []
        for index in range(self.design.element_lanes):
            lane = VectorLane(self.design.vector_bits, self.design.weight_bits)
            m.submodules[f"lane{index}"] = lane
            x = Signal.like(lane.x, name=f"x{index}", reset_less=True)
            w = Signal.like(lane.w, name=f"w{index}", reset_less=True)
            m.d.sync += [
                x.eq(Mux(mask[index], self.vector.data[index], 0)),
                w.eq(Mux(ones, ONE, self.parameter.data[index])),
            ]
            m.d.comb += [
                lane.x.eq(x),
                lane.w.eq(w),
                Cat(lane.distance, lane.squares).eq(copies[index % COPIES]),
                lane.inverse.eq(inverse),
                lane.far.eq(far),
            ]
            lanes.append(lane)
        return lanes

    def _copies(self, m: Module, value: Value) -> list[Signal]:
        """The same again in one cycle, two and so on, each for some of the lanes.

        It drives hundreds of multiplexers; synthesis would merge registers that are always equal.
        """
        copies = []
        for index in range(COPIES):
            copy = Signal(len(value), name=f"copy{index}", reset_less=True)
            m.d.sync += copy.eq(value)
            copies.append(copy)
            value = copy
        return copies

    def _largest(self, m: Module, first: Signal, sizes: list[Value]) -> Signal:
        """The largest size of the command's groups so far."""
        group = _tree(m, sizes, self._larger(m), "larger")
        largest = Signal.like(group, reset_less=True)
        restart = _line(m, first, READ_LATENCY + SIZE_LATENCY + 2 * self.levels, "first_size")[-1]
        m.d.sync += largest.eq(Mux(restart | (group > largest), group, largest))
        return largest

    @staticmethod
    def _larger(m: Module) -> Callable[[Value, Value], Value]:
        """The larger of two of a cycle before: the comparison ends in a register."""

        def join(a: Value, b: Value) -> Value:
            is_a, late_a, late_b = Signal(reset_less=True), *map(_late, (a, b))
            m.d.sync += [is_a.eq(a > b), late_a.eq(a), late_b.eq(b)]
            return Mux(is_a, late_a, late_b)

        return join

    def _sum(self, m: Module, first: Signal, squares: list[Value]) -> Signal:
        """The sum of squares of the command's groups so far."""
        group = _tree(m, squares, lambda a, b: a + b, "sum")
        total = Signal(TOTAL_BITS, reset_less=True)
        restart = _line(m, first, READ_LATENCY + SQUARE_LATENCY + self.levels, "first_square")[-1]
        m.d.sync += total.eq(Mux(restart, 0, total) + group)
        return total

    def _result(self, m: Module, op: Signal, taken: Signal, number: Value) -> None:
        """The number as a scalar; squares count in units of 2^(2 (e_a + 8))."""
        m.submodules.normaliser = normal = normaliser.Normaliser(len(number))
        unit, payload = Signal(signed(ports.EXPONENT_BITS)), self.result.payload
        m.d.comb += normal.number.eq(number)
        with m.If(taken):
            doubled = (self.command.payload.a.e + DROPPED) << 1
            m.d.sync += unit.eq(Mux(self.command.payload.op == VectorOp.SUMSQ, doubled, 0))
        with m.If(~self.result.valid):
            m.d.sync += payload.eq(0)
            with m.If((op != VectorOp.QUANT) & (normal.scalar.m != 0)):
                m.d.sync += [
                    payload.m.eq(normal.scalar.m),
                    payload.e.eq(normal.scalar.e + unit),
                ]

    def _write(self, m: Module, op: Signal, running: Signal, values: list[Value]) -> None:
        """Write a group of int8 each time that one comes out."""
        write = self.activation
        out = _line(m, running, READ_LATENCY + Q_LATENCY, "running_q")[-1]
        m.d.comb += write.valid.eq(out & (op == VectorOp.QUANT))
        m.d.comb += [place.eq(value) for place, value in zip(write.data, values, strict=True)]
        with m.If(write.valid):
            m.d.sync += write.address.eq(write.address + 1)
        with m.If(~self.working):
            groups_a_beat = self.design.lanes // self.design.element_lanes
            m.d.sync += write.address.eq(self.command.payload.dst * groups_a_beat)


def _tree(
    m: Module, values: list[Value], join: Callable[[Value, Value], Value], name: str
) -> Value:
    """Join values in pairs, a register after each level."""
    level = 0
    while len(values) > 1:
        pairs = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        values = []
        for index, pair in enumerate(pairs):
            held = Signal(pair.shape(), name=f"{name}{level}_{index}", reset_less=True)
            m.d.sync += held.eq(pair)
            values.append(held)
        level += 1
    return values[0]


def _late(value: Value) -> Signal:
    return Signal(value.shape(), reset_less=True)


def _line(m: Module, signal: Value, cycles: int, name: str) -> Signal:
    """A bit as it was 1 .. `cycles` cycles ago, the oldest highest."""
    line = Signal(cycles, name=name)
    m.d.sync += line.eq(Cat(signal, line))
    return line
