"""From the bits of a beat to ternary codes, in the two packings of formats/packing.py.

A code is t + 1: 0, 1, 2 for the weights -1, 0, 1. "2bit" holds codes as they are; 3 is illegal.
"1.6bit" holds five digits of base 3 in a byte v, the fraction v / 256 rounded up: times 9 brings
the first two digits above the point, in 0..8, times 9 again the next two, times 3 the last. What
is left is below 243 for the 243 bytes that stand for digits, and for no other.

Decoders are pipelines without a stall: codes come LATENCY[packing] cycles after the bits.
"""

from __future__ import annotations

from amaranth import Array, Cat, Const, Module, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.formats.packing import PER_BYTE
from nomatmul.hardware.rtl.pipeline import delay

LATENCY = {"2bit": 1, "1.6bit": 3}
_LEGAL_RESTS = 243
_HIGH, _LOW = [k // 3 % 3 for k in range(16)], [k % 3 for k in range(16)]


class Decoder(wiring.Component):
    """`beat` of beat_bits in; `codes` LATENCY[packing] cycles later, `illegal` two after those."""

    def __init__(self, packing: str, lanes: int) -> None:
        self.packing, self.lanes = packing, lanes
        self.bytes = -(-lanes // PER_BYTE[packing])
        super().__init__(
            {
                "beat": In(8 * self.bytes),
                "codes": Out(data.ArrayLayout(unsigned(2), lanes)),
                "illegal": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self.packing == "2bit":
            m.d.comb += self.codes.eq(delay(m, self.beat, 1, "codes"))
            codes = self.codes.as_value()
            wrong = codes[0::2] & codes[1::2]
        else:
            decoded = [_five_digits(m, self.beat.word_select(k, 8)) for k in range(self.bytes)]
            digits = [digit for five, _ in decoded for digit in five]
            m.d.comb += self.codes.eq(delay(m, Cat(digits[: self.lanes]), 1, "codes"))
            wrong = delay(m, Cat(bad for _, bad in decoded), 1, "wrong")
        parts = [wrong[k : k + 16] for k in range(0, len(wrong), 16)]
        some = delay(m, Cat(part.any() for part in parts), 1, "some")
        m.d.sync += self.illegal.eq(some.any())
        return m


def _five_digits(m: Module, byte: Value) -> tuple[list[Value], Value]:
    """The five codes of a byte, and whether it is illegal; both two registers behind."""
    first = delay(m, _times_9(byte), 1, "first")
    second = delay(m, _times_9(first[:8]), 1, "second")
    early = delay(m, first[8:], 1, "early")  # two digits, while the next two are found
    last = second[:8] + (second[:8] << 1)
    digits = [*_two_digits(early), *_two_digits(second[8:]), last[8:10]]
    return digits, last[:8] >= _LEGAL_RESTS


def _times_9(value: Value) -> Value:
    return Cat(value[:3], value + value[3:])


def _two_digits(value: Value) -> list[Value]:
    """The two digits of base 3 of 0..8; what is beyond comes of no byte."""
    return [Array(Const(number, 2) for number in table)[value] for table in (_HIGH, _LOW)]
