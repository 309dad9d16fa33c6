"""The int8 activations of the products: written E at a time, read `lanes` at a time.

As many block memories as a beat has groups, side by side: a write goes to one, a read to all. What
a read of a group finds while that is written has no meaning (no_rw_check: else synthesis adds a
copy of every bit and a multiplexer).
Addresses of reads are in beats, of writes in groups. The memories are spread over the chip, so
addresses and data pass copies of registers, one set for CHUNK groups: a write is in memory three
cycles later (four where a beat's groups are no power of two).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Cat, Module, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.pipeline import copy, delay

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

READ_LATENCY = 4  # cycles from an address to registers beside the products
CHUNK = 4  # groups with registers of their own


class ActivationMemory(wiring.Component):
    """`data` is the beat at the `address` of READ_LATENCY cycles before."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "write": In(ports.ActivationWrite(design)),
                "address": In(range(design.activation_beats)),
                "data": Out(data.ArrayLayout(signed(8), design.lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        groups = design.lanes // design.element_lanes
        valid, beat, group, contents = self._split(m, groups)
        beats = []
        for k in range(groups):
            if k % CHUNK == 0:
                here = [copy(m, value) for value in (beat, contents, self.address)]
            enable = copy(m, valid & (group == k))
            words = memory.Memory(
                shape=8 * design.element_lanes,
                depth=design.activation_beats,
                init=[],
                attrs={"ram_style": "block", "no_rw_check": 1},
            )
            m.submodules[f"group_{k}"] = words
            write, read = words.write_port(), words.read_port()
            m.d.comb += [
                write.en.eq(enable),
                write.addr.eq(here[0]),
                write.data.eq(here[1]),
                read.addr.eq(here[2]),
            ]
            beats.append(read.data)
        m.d.comb += self.data.eq(delay(m, Cat(beats), 2, "beat"))  # the first in the block RAMs
        return m

    def _split(self, m: Module, groups: int) -> tuple[Value, Value, Value, Value]:
        """valid, beat, group of the beat and data of the write, a cycle later.

        Where groups is no power of two: two cycles later, with a product for the quotient.
        """
        write, bits = self.write, (groups - 1).bit_length()
        valid = delay(m, write.valid, 1, "valid", reset=True)
        address = delay(m, write.address, 1, "address")
        contents = delay(m, write.data.as_value(), 1, "contents")
        if groups == 1 << bits:
            return valid, address[bits:], address[:bits], contents
        factor, shift = reciprocal(groups, self.design.activation_groups)
        beat = Signal(range(self.design.activation_beats), reset_less=True)
        m.d.sync += beat.eq((address * factor) >> shift)
        group = (delay(m, address, 1, "late_address") - beat * groups)[:bits]
        late = delay(m, valid, 1, "late_valid", reset=True)
        return late, beat, group, delay(m, contents, 1, "late_contents")


def reciprocal(divisor: int, limit: int) -> tuple[int, int]:
    """(f, s) such that n // divisor == n * f >> s for every n in 0..limit - 1."""
    shift = 0
    while True:
        factor = -(-(1 << shift) // divisor)
        # the excess of the factor, times the largest n, must not reach the next quotient
        if (factor * divisor - (1 << shift)) * limit < 1 << shift:
            return factor, shift
        shift += 1
