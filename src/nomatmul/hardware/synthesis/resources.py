"""Cells of a netlist as the resources that people compare: LUTs, registers, block RAM, DSP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("luts", "registers", "block_rams", "dsps")

# of the largest chip of a family that a board of ours has; xc7: XC7Z020
AVAILABLE = {
    "ecp5": {"luts": 83640, "registers": 83640, "block_rams": 208, "dsps": 156},
    "xc7": {"luts": 53200, "registers": 106400, "block_rams": 140, "dsps": 220},
}

# LUTs that a cell takes. A carry cell of ECP5 holds two LUTs, its 16x4 RAM four, with two more of
# its write port; wide multiplexers sit behind LUTs and take none.
_LUTS = {
    "ecp5": {"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 6},
    "xc7": {f"LUT{k}": 1 for k in range(1, 7)}
    | {"RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "SRL16E": 1}
    | {"SRLC32E": 1},
}
_REGISTERS = {
    "ecp5": {"TRELLIS_FF": 1},
    "xc7": {"FDRE": 1, "FDSE": 1, "FDCE": 1, "FDPE": 1},
}
_BLOCK_RAMS = {"ecp5": {"DP16KD": 1.0, "PDPW16KD": 1.0}, "xc7": {"RAMB36E1": 1.0, "RAMB18E1": 0.5}}
_DSPS = {"ecp5": {"MULT18X18D": 1}, "xc7": {"DSP48E1": 1}}


@dataclass(frozen=True)
class Resources:
    """Block RAMs are 18 kbit on ECP5 and 36 kbit on 7-series (halves count)."""

    family: str
    luts: int
    registers: int
    block_rams: float
    dsps: int

    def share(self, kind: str) -> float:
        """Of the family's chip in AVAILABLE."""
        return float(getattr(self, kind)) / AVAILABLE[self.family][kind]


def resources(cells: Mapping[str, int], family: str) -> Resources:
    """Count the resources of `cells` (type -> number). Raises ValueError for an unknown family."""
    if family not in _LUTS:
        raise ValueError(f"chip family {family!r} is not one of {', '.join(_LUTS)}")

    def count(weights: Mapping[str, float]) -> float:
        return sum(weight * cells.get(cell, 0) for cell, weight in weights.items())

    return Resources(
        family,
        int(count(_LUTS[family])),
        int(count(_REGISTERS[family])),
        count(_BLOCK_RAMS[family]),
        int(count(_DSPS[family])),
    )


def routed_resources(used: Mapping[str, tuple[int, int]]) -> Resources:
    """What nextpnr placed on an ECP5: after packing, so carry and RAM are counted as they lie."""
    get = {kind: count for kind, (count, _) in used.items()}.get
    return Resources(
        "ecp5",
        get("TRELLIS_COMB", 0),
        get("TRELLIS_FF", 0),
        get("DP16KD", 0),
        get("MULT18X18D", 0),
    )
