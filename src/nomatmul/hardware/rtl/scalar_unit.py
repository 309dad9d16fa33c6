"""The scalar unit: MUL, ADD, DIV and SQRT of small floating numbers, one command at a time.

Every operation makes a mantissa of 25 bits, of which the highest or the next one is set, and an
exponent; one step at the end cuts it to 24 bits and clamps the exponent.

Legend: a scalar is m * 2^e, m of 24 bits with the highest set (0 is m = e = 0), e of 10 bits.
Cycles from the taking of a command to its result: MUL 8; DIV and SQRT 28; ADD 4 and a cycle for
each shift of the smaller operand by 4 or by 1 (up to 10).
"""

# No `from __future__ import annotations`: data.Struct reads the shapes from the annotations.
from amaranth import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import digits, ports
from nomatmul.hardware.rtl.ports import EXPONENT_BITS, SCALAR_BITS, ScalarOp

PIECE = SCALAR_BITS // 2  # bits of a mantissa that enter the multiplier at once
STATES = ("IDLE", "PREPARE", "MULTIPLY", "ALIGN", "DIGITS", "ROUND", "RESULT")
MOST = (1 << (EXPONENT_BITS - 1)) - 1
LEAST = -MOST - 1


class ScalarUnit(wiring.Component):
    """`command` in; `result` out, exactly one a command.

    Operands are normal or 0. Division by 0 gives 0. The exponent of a result that leaves -512..511
    is clamped, and `flag` says so.
    """

    def __init__(self) -> None:
        self.digits = digits.Digits(SCALAR_BITS)
        # for proofs: the state, and how far multiplication and alignment are
        self.states = {name: Signal(name=name.lower()) for name in STATES}
        self.step, self.apart = Signal(3), Signal(5)
        self._a_larger = Signal(reset_less=True)
        self._distances = [
            Signal(EXPONENT_BITS + 1, name=f"distance{k}", reset_less=True) for k in range(2)
        ]
        super().__init__(
            {
                "command": In(stream.Signature(ports.ScalarCommand)),
                "result": Out(stream.Signature(ports.ScalarResult)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        held = Signal(ports.ScalarCommand, reset_less=True)
        ready, multiplied, aligned = Signal(), Signal(), Signal()
        asked = self.command.payload
        with m.If(ready):  # the exponents are compared on their way in
            m.d.sync += [
                held.eq(asked),
                self._a_larger.eq(_a_larger(asked)),
                self._distances[0].eq(asked.a.e - asked.b.e),
                self._distances[1].eq(asked.b.e - asked.a.e),
            ]
        m.d.comb += [self.command.ready.eq(ready)]
        with m.FSM() as fsm:
            with m.State("IDLE"), m.If(self.command.valid):
                m.next = "PREPARE"
            with m.State("PREPARE"), m.Switch(held.op):
                with m.Case(ScalarOp.MUL):
                    m.next = "MULTIPLY"
                with m.Case(ScalarOp.ADD):
                    m.next = "ALIGN"
                with m.Default():
                    m.next = "DIGITS"
            with m.State("MULTIPLY"), m.If(multiplied):
                m.next = "ROUND"
            with m.State("ALIGN"), m.If(aligned):
                m.next = "ROUND"
            with m.State("DIGITS"), m.If(self.digits.done):
                m.next = "ROUND"
            with m.State("ROUND"):
                m.next = "RESULT"
            with m.State("RESULT"), m.If(self.result.ready):
                m.next = "IDLE"
        states = self.states
        m.d.comb += [state.eq(fsm.ongoing(name)) for name, state in states.items()]
        m.d.comb += [ready.eq(states["IDLE"]), self.result.valid.eq(states["RESULT"])]
        prepare = states["PREPARE"]
        product = self._product(m, held, prepare | states["MULTIPLY"], multiplied)
        total = self._total(m, held, prepare, aligned)
        quotient = self._quotient_or_root(m, held, prepare)
        wide = Mux(held.op == ScalarOp.MUL, product, Mux(held.op == ScalarOp.ADD, total, quotient))
        self._round(m, held, prepare, states["ROUND"], wide)
        return m

    def _product(self, m: Module, held: Signal, running: Signal, done: Signal) -> Signal:
        """a.m * b.m >> 23: four products of halves, the lowest first, each added a step later."""
        step = self.step
        halves = [(part.m[:PIECE], part.m[PIECE:]) for part in (held.a, held.b)]
        pieces = [Signal(PIECE, name=f"piece{k}", reset_less=True) for k in range(2)]
        product = Signal(2 * PIECE, reset_less=True)
        total = Signal(2 * PIECE + 2, reset_less=True)
        # before the second and the fourth product the sum moves on by a half
        grown = Signal.like(total)
        m.d.comb += [
            grown.eq(Mux(step[0], total >> PIECE, total) + product),
            done.eq(step == 5),
        ]
        m.d.sync += [
            pieces[0].eq(Mux(step[0], halves[0][1], halves[0][0])),
            pieces[1].eq(Mux(step[1], halves[1][1], halves[1][0])),
            product.eq(pieces[0] * pieces[1]),
        ]
        wide = Signal(SCALAR_BITS + 1, reset_less=True)
        m.d.sync += step.eq(Mux(running, step + 1, 0))
        with m.If(running):
            m.d.sync += total.eq(Mux(step < 2, 0, grown))
            with m.If(done):
                m.d.sync += wide.eq(Cat(total[PIECE - 1], grown))
        return wide

    def _total(self, m: Module, held: Signal, prepare: Signal, done: Signal) -> Signal:
        """The larger mantissa and the smaller one, shifted to the exponent of the larger."""
        large, small = (
            Signal(SCALAR_BITS, name=name, reset_less=True) for name in ("large", "small")
        )
        apart, wide = self.apart, Signal(SCALAR_BITS + 1, reset_less=True)
        a, b = held.a, held.b
        m.d.comb += done.eq(apart == 0)
        m.d.sync += wide.eq(large + small)
        with m.If(apart[2:].any()):
            m.d.sync += [small.eq(small >> 4), apart.eq(apart - 4)]
        with m.Elif(apart != 0):
            m.d.sync += [small.eq(small >> 1), apart.eq(apart - 1)]
        with m.If(prepare):
            distance = Mux(self._a_larger, self._distances[0], self._distances[1])
            m.d.sync += [
                large.eq(Mux(self._a_larger, a.m, b.m)),
                small.eq(Mux(self._a_larger, b.m, a.m)),
                apart.eq(distance),
            ]
            with m.If(~(a.m[-1] & b.m[-1])):  # one is 0: its exponent says nothing
                m.d.sync += apart.eq(0)
            with m.Elif(distance[5:].any()):
                m.d.sync += [small.eq(0), apart.eq(0)]
        return wide

    def _quotient_or_root(self, m: Module, held: Signal, prepare: Signal) -> Value:
        m.submodules.digits = unit = self.digits
        odd = (held.op == ScalarOp.SQRT) & held.a.e[0]
        m.d.comb += [
            unit.start.eq(prepare),
            unit.root.eq(held.op == ScalarOp.SQRT),
            unit.a.eq(Mux(odd, held.a.m << 1, held.a.m)),
            unit.b.eq(held.b.m),
        ]
        return unit.value

    def _round(
        self, m: Module, held: Signal, prepare: Signal, running: Signal, wide: Value
    ) -> None:
        """The exponent while others work; at the end 24 bits of `wide`, and the clamp."""
        payload = self.result.payload
        exponent = Signal(signed(EXPONENT_BITS + 2), reset_less=True)
        with m.If(prepare):
            a, b = held.a.e, held.b.e
            with m.Switch(held.op):
                with m.Case(ScalarOp.MUL):
                    m.d.sync += exponent.eq(a + b + (SCALAR_BITS - 1))
                with m.Case(ScalarOp.ADD):
                    m.d.sync += exponent.eq(Mux(self._a_larger, a, b))
                with m.Case(ScalarOp.DIV):
                    m.d.sync += exponent.eq(a - b - SCALAR_BITS)
                with m.Case(ScalarOp.SQRT):
                    m.d.sync += exponent.eq((a >> 1) - SCALAR_BITS // 2)
        clamped = [_clamped(m, exponent + more, f"clamped{more}") for more in (0, 1)]
        bits, result = Signal(SCALAR_BITS + 1), Signal(_Exponent)
        by_zero = (held.op == ScalarOp.DIV) & ~held.b.m[-1]
        m.d.comb += [bits.eq(wide), result.eq(Mux(bits[-1], clamped[1], clamped[0]))]
        with m.If(running):
            m.d.sync += payload.eq(0)
            with m.If((bits[-1] | bits[-2]) & ~by_zero):
                m.d.sync += [
                    payload.m.eq(Mux(bits[-1], bits[1:], bits)),
                    payload.e.eq(result.e),
                    payload.flag.eq(result.flag),
                ]


class _Exponent(data.Struct):
    e: signed(EXPONENT_BITS)
    flag: 1


def _clamped(m: Module, exponent: Value, name: str) -> Signal:
    """An exponent of 12 bits in 10, a cycle later."""
    result, wide = (
        Signal(_Exponent, name=name, reset_less=True),
        Signal(signed(EXPONENT_BITS + 2), name=f"{name}_of"),
    )
    m.d.comb += wide.eq(exponent)
    beyond = wide[EXPONENT_BITS - 1 :]
    with m.If(beyond.all() | ~beyond.any()):
        m.d.sync += [result.e.eq(wide), result.flag.eq(0)]
    with m.Else():
        m.d.sync += [result.e.eq(Mux(wide[-1], LEAST, MOST)), result.flag.eq(1)]
    return result


def _a_larger(command: Value) -> Value:
    """a has the larger exponent, or b is 0."""
    a, b = command.a, command.b
    return ~b.m[-1] | (a.m[-1] & (a.e >= b.e))
