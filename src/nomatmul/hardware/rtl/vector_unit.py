"""The vector unit: SCAN, SUMSQ and QUANT of docs/hardware-numerics.md, E elements a cycle.

One command at a time: it reads groups of x and W, passes them through E lanes without a stall, and
gathers the largest |x * W| or the sum of squares, or writes int8 activations. Every command gives
exactly one result when its work is in memory; that of QUANT says only so, and is 0.

Legend: E lanes; N bits of the gathered number. A command of `count` elements takes
ceil(count / E) cycles and a fixed number more: log2(E) + 11 (SCAN), log2(E) + 15 (SUMSQ), 12
(QUANT) from its taking to its result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

ONE = 1 << 14  # W of a vector "ones"


class VectorUnit(wiring.Component):
    """`command` in; `result` out, one a command. `busy` from the taking to the result's taking.

    Addresses are multiples of E and lie within their memories, `a` is 0 or the scan of the same
    vector, `r` is 127 / a: else the numbers are meaningless, but nothing hangs.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "command": In(stream.Signature(ports.VectorCommand)),
                "result": Out(stream.Signature(ports.Scalar)),
                "vector": Out(ports.vector_read(design)),
                "parameter": Out(ports.parameter_read(design)),
                "activation": Out(ports.ActivationWrite(design)),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        return m
