"""The row unit: what becomes of a product's sums on their way into vector memory.

One sum a cycle comes in; it is rescaled, and then stored, added to the residual, led through the
gates of an MLGRU or a GLU, through silu, or out to the host as a logit (docs/hardware-numerics.md).
"""

from __future__ import annotations

from amaranth import Module, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports

# Causes of saturation, in the order of `saturated` and `saturations`.
CAUSES = ("rescale", "residual", "state", "product")
COUNT_BITS = 16


class RowUnit(wiring.Component):
    """Rescale, epilogue, write. Ports:

    `command`: taken when idle; `sums`: exactly command.rows of them follow. `busy` is high from the
    cycle after a command is taken until all its writes are in memory (logits: until the last one is
    taken). `argmax` holds the largest logit of the last LOGITS command (the first of equals).
    `saturated` pulses a bit a cause, `saturations` counts them since reset (and stays at its
    maximum). `state_write` shows the writes of the state memory inside, for probes.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "command": In(stream.Signature(ports.RowCommand)),
                "sums": In(stream.Signature(ports.product_sum(design.sum_bits))),
                "busy": Out(1),
                "vector_read": Out(ports.vector_read(design)),
                "vector_write": Out(ports.vector_write(design)),
                "parameter_read": Out(ports.parameter_read(design)),
                "logits": Out(stream.Signature(ports.logit(design))),
                "argmax": Out(ports.argmax(design)),
                "state_write": Out(
                    ports.ElementWrite(design.state_words, signed(design.state_bits))
                ),
                "saturated": Out(len(CAUSES)),
                "saturations": Out(data.ArrayLayout(COUNT_BITS, len(CAUSES))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        return Module()
