"""The scalar unit: MUL, ADD, DIV and SQRT of small floating numbers, one command at a time.

Legend: a scalar is m * 2^e, m of 24 bits with the highest set (0 is m = e = 0), e of 10.
"""

from __future__ import annotations

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports


class ScalarUnit(wiring.Component):
    """`command` in; `result` out, exactly one a command."""

    def __init__(self) -> None:
        super().__init__(
            {
                "command": In(stream.Signature(ports.ScalarCommand)),
                "result": Out(stream.Signature(ports.ScalarResult)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        return m
