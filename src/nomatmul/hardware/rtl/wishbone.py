"""Wishbone as the host's side speaks it: classic cycles of 32-bit words.

The initiator holds `cyc`, `stb` and the request until `ack`, which lasts one cycle; `dat_r` counts
in that cycle. Bytes are not selected: every access is a whole word, `adr` counts words.
"""

from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Wishbone(wiring.Signature):
    """Seen from the initiator."""

    def __init__(self, address_bits: int) -> None:
        self.address_bits = address_bits
        super().__init__(
            {
                "cyc": Out(1),
                "stb": Out(1),
                "we": Out(1),
                "adr": Out(address_bits),
                "dat_w": Out(32),
                "dat_r": In(32),
                "ack": In(1),
            }
        )

    def __repr__(self) -> str:
        return f"Wishbone({self.address_bits})"
