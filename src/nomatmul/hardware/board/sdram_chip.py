"""Single data rate SDRAM chips: their geometry and the timings of their datasheets.

Timings are in nanoseconds as the datasheets print them, or in clocks where these do; a controller
turns them into cycles of its clock, rounded up. `tests/hardware/sdram_model.py` checks against
the same nanoseconds, on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SdramChip:
    """Names as in the JEDEC standard; *_ns are minima unless the name says max."""

    name: str
    row_bits: int
    column_bits: int
    rcd_ns: float  # ACTIVATE to READ or WRITE
    rp_ns: float  # PRECHARGE to ACTIVATE or REFRESH
    ras_ns: float  # ACTIVATE to PRECHARGE
    rc_ns: float  # ACTIVATE to ACTIVATE of a bank, REFRESH to anything
    wr_ns: float  # last written data to PRECHARGE; at least wr_clocks
    rrd_ns: float  # ACTIVATE to ACTIVATE of another bank; at least two clocks
    cas2_max_mhz: float  # fastest clock at CAS latency 2; above it 3
    cas3_max_mhz: float
    wr_clocks: int = 2
    mrd_clocks: int = 2  # LOAD MODE to anything
    ras_max_ns: float = 100_000.0
    bank_bits: int = 2
    data_bits: int = 16
    refresh_ms: float = 64.0  # in which every row is refreshed once
    init_us: float = 200.0  # from a stable clock to the first command

    @property
    def bytes(self) -> int:
        return self.data_bits // 8 << (self.bank_bits + self.row_bits + self.column_bits)

    @property
    def refresh_interval_ns(self) -> float:
        return self.refresh_ms * 1e6 / (1 << self.row_bits)

    def cas_latency(self, clock_hz: float) -> int:
        """Raises ValueError for a clock that the chip cannot follow."""
        if clock_hz <= self.cas2_max_mhz * 1e6:
            return 2
        if clock_hz <= self.cas3_max_mhz * 1e6:
            return 3
        raise ValueError(
            f"{self.name} runs at {self.cas3_max_mhz:g} MHz at most, got {clock_hz / 1e6:g} MHz"
        )

    def cycles(self, nanoseconds: float, clock_hz: float) -> int:
        """Nanoseconds in whole cycles, rounded up (a picosecond of slack for binary fractions)."""
        return math.ceil(nanoseconds * clock_hz / 1e9 - 1e-3)


# ULX3S boards carry one of these, by the batch; the first is the slowest of the 32 MB chips in
# every figure, so one bitstream serves all of them.
CHIPS = {
    chip.name: chip
    for chip in (
        SdramChip("ulx3s-32mb", 13, 9, 18, 18, 42, 60, 14, 14, 100, 143),
        SdramChip("W9825G6KH-6", 13, 9, 15, 15, 42, 60, 0, 12, 133, 166),
        SdramChip("IS42S16160G-7", 13, 9, 15, 15, 37, 60, 14, 14, 133, 143),
        SdramChip("AS4C32M16SB-7", 13, 10, 21, 21, 42, 63, 14, 14, 100, 143),
    )
}
