"""What place and route and simulation found for designs of a few sizes, and sizes between them.

The figures come from benchmarks/results (hardware-synthesis, hardware-energy); a report takes them
instead of running these tools for an hour. Sizes between and beyond are interpolated and say so.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass
from typing import TypeVar

from nomatmul.hardware.synthesis.resources import AVAILABLE, KINDS


@dataclass(frozen=True)
class Placed:
    """Whole top of the ULX3S on an LFE5U-85F-6: SDRAM controller and serial host included."""

    lanes: int
    luts: float
    registers: float
    block_rams: float
    dsps: float
    mhz: float
    kind: str = "placed"

    def shares(self) -> dict[str, float]:
        return {kind: getattr(self, kind) / AVAILABLE["ecp5"][kind] for kind in KINDS}


@dataclass(frozen=True)
class Switching:
    """Toggled bits: of a beat on its way through the whole pipeline, of a cycle in which other
    units work, and of one in which all wait. A beat's are those with a slow memory, when the
    pipeline drains behind each beat, which are more than those of beats without gaps."""

    lanes: int
    beat: float
    other: float
    waiting: float
    kind: str = "simulated"


_ESTIMATE = (
    "synthesised; the clock is that of place and route of 256 lanes with the memories of"
    " board/ulx3s.py, one seed"
)
# Smaller ones were not routed. The default memories take 52 block RAMs more than the 8,192 words of
# board/ulx3s.py: 179 were seen at 256 lanes. Its narrow memory words save 7 more, and registers.
PLACED = (
    Placed(64, 16_148, 16_481, 131, 40, 85.2, _ESTIMATE),
    Placed(128, 17_371, 18_364, 147, 40, 85.2, _ESTIMATE),
    Placed(256, 19_740, 21_634, 179, 40, 85.2, _ESTIMATE),
)
# 256 lanes: 8,960 beats, 24,121 cycles of waiting, 15,703 others (benchmarks/hardware_energy.py,
# one layer of d = 512, 13.6 bytes a cycle): 7,456, 4,123 and 2,239 toggled bits a cycle. A cycle of
# waiting that no beat's drain is in has some 200.
SWITCHING = (
    Switching(64, 4_500, 2_239, 200, "estimated from 256 lanes"),
    Switching(256, 17_800, 2_239, 200, "simulated"),
)

Row = TypeVar("Row", Placed, Switching)


def placed(lanes: int) -> Placed:
    """Resources and clock of a design of `lanes`."""
    return _between(PLACED, lanes)


def activity(lanes: int) -> Switching:
    """Switching of a design of `lanes`."""
    return _between(SWITCHING, lanes)


def _between(rows: tuple[Row, ...], lanes: int) -> Row:
    """The row of `lanes`, or one on the line through the nearest two."""
    for row in rows:
        if row.lanes == lanes:
            return row
    at = min(max(1, bisect_left([row.lanes for row in rows], lanes)), len(rows) - 1)
    low, high = rows[at - 1], rows[at]
    share = (lanes - low.lanes) / (high.lanes - low.lanes)
    values = {
        field.name: getattr(low, field.name)
        + share * (getattr(high, field.name) - getattr(low, field.name))
        for field in dataclasses.fields(low)
        if field.name not in ("lanes", "kind")
    }
    kind = f"interpolated from {low.lanes} and {high.lanes} lanes"
    return type(low)(lanes=lanes, kind=kind, **values)
