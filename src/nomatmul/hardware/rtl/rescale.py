"""Fixed point after a product: shift to the right, round to the nearest, saturate.

`RoundingShift` is the second half of every product of the row unit, `Rescale` turns a ternary
row's sum into the fraction that the next step takes. Both take a new number each cycle.

Legend of widths: S bits of a sum, V bits of the result, 18 bits of a factor.
"""

from __future__ import annotations

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl.pipeline import delay, register
from nomatmul.reference.integer.numerics import EXPONENT_MOST, FACTOR_BITS, MANTISSA_BITS

# The lower piece of a sum, as wide as an unsigned DSP input.
_PIECE = 18


class RoundingShift(wiring.Component):
    """result = saturate((value + half) >> shift), half = 2^(shift - 1), or 0 where shift is 0.

    `beyond` says that value, if it is not 0, is to saturate by its sign. `saturated`: result is
    not the exact number. `latency` cycles after the inputs, which come from registers. A shift of
    all ones gives 0, as any from bits + 1 on.
    """

    def __init__(self, bits: int, result_bits: int, shift_bits: int) -> None:
        self.latency = -(-shift_bits // 2) + 3
        super().__init__(
            {
                "value": In(signed(bits)),
                "shift": In(shift_bits),
                "beyond": In(1),
                "result": Out(signed(result_bits)),
                "saturated": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits, shift_bits = len(self.result), len(self.shift)
        # A bit below the point stays: adding it rounds. Two bits of the shift a cycle, high first.
        value, shift = Cat(Const(0, 1), self.value).as_signed(), self.shift
        for low in range((shift_bits - 1) // 2 * 2, -1, -2):
            for bit in range(low, min(low + 2, shift_bits)):
                value = Mux(shift[bit], value >> (1 << bit), value)
            value = register(m, value, f"shifted{low}")
            shift = register(m, shift[:low], f"shift{low}") if low else shift
        barrel = self.latency - 3
        forced = delay(m, self.beyond & (self.value != 0), barrel, "forced")

        # Far out of range or near: two bits more than the result are enough for the addition.
        near = value[: bits + 2].as_signed()
        upper = value[bits + 1 :]
        over = register(m, (upper.any() & ~upper.all()) | forced, "over")
        negative = register(m, value[-1], "negative")
        near = register(m, near, "near")

        half_up = register(m, ((near + 1) >> 1)[: bits + 1].as_signed(), "half_up")
        over, negative = register(m, over, "over_2"), register(m, negative, "negative_2")

        limit = Mux(negative, Const(-(1 << (bits - 1)), signed(bits)), (1 << (bits - 1)) - 1)
        outside = over | (half_up[bits] ^ half_up[bits - 1])
        result = register(m, Mux(outside, limit, half_up[:bits].as_signed()), "result_1")
        saturated = register(m, outside, "saturated_1")
        m.d.comb += [self.result.eq(result), self.saturated.eq(saturated)]
        return m


class Factor(wiring.Component):
    """From a scalar (m, e) and a fraction F: the shift for `Rescale`, `latency` cycles later.

    The right shift is s = -(e + 6 + F). A factor has its highest bit set, so a result of V bits
    has room for V - 18 to the left (`headroom`), which the shifter has; further left saturates.
    """

    latency = 3

    def __init__(self, result_bits: int, shift_bits: int, fraction_bits: int) -> None:
        self.headroom = headroom(result_bits)
        super().__init__(
            {
                "e": In(signed(EXPONENT_MOST.bit_length() + 1)),
                "fraction": In(signed(fraction_bits)),
                "shift": Out(shift_bits),
                "beyond": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        most = (1 << len(self.shift)) - 1
        up = register(m, self.e + self.fraction, "up")
        right = register(m, self.headroom - (MANTISSA_BITS - FACTOR_BITS) - up, "right")
        shift = Mux(right < 0, 0, Mux(right > most, most, right))[: len(self.shift)]
        m.d.comb += [
            self.beyond.eq(register(m, right < 0, "beyond_1")),
            self.shift.eq(register(m, shift, "shift_1")),
        ]
        return m


def headroom(result_bits: int) -> int:
    """Bits by which `Rescale` can shift to the left."""
    return max(0, result_bits - FACTOR_BITS)


class Rescale(wiring.Component):
    """result = saturate((sum * factor + half) >> s), s as `Factor` gives it; factor 18 bits."""

    def __init__(self, sum_bits: int, result_bits: int) -> None:
        self._sum_bits = max(sum_bits, _PIECE + 1)  # two pieces always
        wide = self._sum_bits + FACTOR_BITS + headroom(result_bits)
        self.shift_bits = (wide + 1).bit_length()
        self._shift = RoundingShift(wide, result_bits, self.shift_bits)
        self.latency = 3 + self._shift.latency
        super().__init__(
            {
                "sum": In(signed(sum_bits)),
                "factor": In(FACTOR_BITS),
                "shift": In(self.shift_bits),
                "beyond": In(1),
                "result": Out(signed(result_bits)),
                "saturated": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.rounding = rounding = self._shift
        sum_bits = self._sum_bits
        room = len(rounding.value) - sum_bits - FACTOR_BITS
        # Unsigned pieces, so that a factor of 18 bits fits; the sum's sign is taken off afterwards:
        # sum = unsigned - sign * 2^S.
        unsigned = Signal(sum_bits)
        m.d.comb += unsigned.eq(self.sum)
        low = register(m, unsigned[:_PIECE] * self.factor, "low")
        high = register(m, unsigned[_PIECE:] * self.factor, "high")
        negative, factor = self.sum[-1], self.factor
        for cycle in range(2):
            negative = register(m, negative, f"negative{cycle}")
            factor = register(m, factor, f"factor{cycle}")
        upper = register(m, (low[_PIECE:] + high)[: sum_bits + FACTOR_BITS - _PIECE], "upper")
        rest = register(m, low[:_PIECE], "rest")
        # only the bits from 2^S on change
        kept = sum_bits - _PIECE
        signed_top = (upper[kept:] - Mux(negative, factor, 0))[:FACTOR_BITS]
        product = register(m, Cat(rest, upper[:kept], signed_top).as_signed(), "product")
        m.d.comb += [
            rounding.value.eq(product << room),
            rounding.shift.eq(delay(m, self.shift, 3, "shift")),
            rounding.beyond.eq(delay(m, self.beyond, 3, "beyond")),
            self.result.eq(rounding.result),
            self.saturated.eq(rounding.saturated),
        ]
        return m
