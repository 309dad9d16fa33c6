"""One lane of the vector unit: x * W, its shift to 17 bits, and the square or the int8 of that.

A pipeline without control: what enters comes out a fixed number of cycles later. Zeros in give
zeros out, which is how lanes beyond the end of a vector are silent. No register is reset: markers
that travel beside the numbers say which ones count.

Legend: VB bits of x, 16 bits of W. p = x * W has VB + 16 bits; v = p >> (e_a + 8) has 17, since
|p| < 2^(e_a + 24). The shift is done as (p << 15) >> (e_a + 23), whose distance is never negative.
inv = m_r >> 6 has 18 bits, its highest bit always set: v * inv = (v << 17) + v * (inv - 2^17), so
that every multiplier is at most 18 x 18 signed. f = 26 + `far`: a quotient of mantissas has only
two exponents, so the shift of the quantiser is a choice of two. With a the scan of this vector and
r = 127 / a, |v * inv / 2^f| <= 127 * (1 + 2^-15): the definition's clamp to -127..127 never acts,
and is not built.
"""

from __future__ import annotations

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

PIECE = 17  # bits of x in the lower multiplier
V_BITS = 17
LEFT = 15  # how far p is shifted left before it is shifted right by `distance`
DISTANCE_BITS = 6
INVERSE_BITS = 17  # without the highest bit
SQUARE_BITS = 33  # (-2^16)^2 = 2^32

# Cycles from x and w to each output.
SIZE_LATENCY = 3
SQUARE_LATENCY = 7
Q_LATENCY = 8


class VectorLane(wiring.Component):
    """`x`, `w` to `size` = |x * w|, `square` = v^2 and `q` = round(v * inv / 2^f).

    `distance` = e_a + 23, `inverse` = inv - 2^17, `far` = f - 26 and `squares` (the multiplier
    makes v * v, else v * inverse) stand still while a vector is in the pipeline.
    """

    def __init__(self, vector_bits: int, weight_bits: int) -> None:
        self.product_bits = vector_bits + weight_bits
        super().__init__(
            {
                "x": In(signed(vector_bits)),
                "w": In(signed(weight_bits)),
                "distance": In(DISTANCE_BITS),
                "inverse": In(INVERSE_BITS),
                "far": In(1),
                "squares": In(1),
                "size": Out(self.product_bits - 1),
                "square": Out(SQUARE_BITS),
                "q": Out(signed(8)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        p = self._product(m)
        # |p| <= 2^(VB + 14), so VB + 15 bits are enough
        size = Signal.like(self.size, reset_less=True)
        m.d.sync += size.eq(Mux(p[-1], -p, p))
        m.d.comb += self.size.eq(size)
        v, before = self._shifted(m, p)
        other = Signal(signed(INVERSE_BITS + 1), reset_less=True)
        # chosen a cycle ahead: nothing lies between registers and a multiplier
        m.d.sync += other.eq(Mux(self.squares, before, self.inverse))
        self._squared_or_quantised(m, v, other)
        return m

    def _product(self, m: Module) -> Signal:
        """p two cycles after x and w."""
        width = self.x.shape().width
        low = Signal(signed(PIECE + self.w.shape().width), reset_less=True)
        high_bits = max(width - PIECE, 1) + self.w.shape().width
        high = Signal(signed(high_bits), reset_less=True)
        p = Signal(signed(self.product_bits), reset_less=True)
        m.d.sync += p.eq(low + (high << PIECE))
        if width > PIECE:
            x_low = Signal(signed(PIECE + 1))
            m.d.comb += x_low.eq(self.x[:PIECE])
            m.d.sync += [low.eq(x_low * self.w), high.eq(self.x[PIECE:].as_signed() * self.w)]
        else:
            m.d.sync += low.eq(self.x * self.w)
        return p

    def _shifted(self, m: Module, p: Signal) -> tuple[Signal, Signal]:
        """v three cycles after p: right shifts of 0..63 that keep what later stages can reach.

        And what enters its register.
        """
        here = p << LEFT
        for name, steps in (("coarse", (32, 16)), ("middle", (8, 4)), ("fine", (2, 1))):
            for step in steps:
                bits = V_BITS + step - 1
                bit = self.distance[step.bit_length() - 1]
                moved = Signal(signed(bits), name=f"moved{step}")
                m.d.comb += moved.eq(Mux(bit, here >> step, here))
                here = moved
            before, here = here, Signal(here.shape(), name=name, reset_less=True)
            m.d.sync += here.eq(before)
        return here, before

    def _squared_or_quantised(self, m: Module, v: Signal, other: Signal) -> None:
        product = Signal(signed(V_BITS + INVERSE_BITS + 1), reset_less=True)
        v_then = Signal(signed(V_BITS), reset_less=True)
        scaled = Signal(signed(V_BITS + INVERSE_BITS + 1), reset_less=True)
        square = Signal.like(self.square, reset_less=True)
        q = Signal.like(self.q, reset_less=True)
        m.d.sync += [
            product.eq(v * other),
            v_then.eq(v),
            square.eq(product),
            scaled.eq(product + (v_then << INVERSE_BITS)),
        ]
        # (v * inv + 2^(f-1)) >> f = (((v * inv) >> (f - 1)) + 1) >> 1
        near = Signal(signed(9))
        m.d.comb += near.eq(Mux(self.far, scaled >> 26, scaled >> 25))
        m.d.sync += q.eq((near + 1) >> 1)
        m.d.comb += [self.square.eq(square), self.q.eq(q)]
