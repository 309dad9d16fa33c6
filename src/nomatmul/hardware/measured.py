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
    """Toggled bits a cycle: while the array takes a beat, while other units work, while all wait
    for memory."""

    lanes: int
    busy: float
    other: float
    waiting: float
    kind: str = "simulated"


PLACED = (
    Placed(64, 22_000, 18_000, 60, 40, 100.0, "not yet placed: a guess"),
    Placed(256, 45_000, 35_000, 150, 40, 100.0, "not yet placed: a guess"),
)
SWITCHING = (
    Switching(64, 2_000, 900, 300, "not yet simulated: a guess"),
    Switching(256, 8_000, 1_500, 400, "not yet simulated: a guess"),
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
