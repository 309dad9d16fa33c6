"""Board classes: a memory, its bandwidth, a clock, and what the board draws when nothing runs.

Only the ULX3S has a top level of ours; the others are classes of boards that the AXI top fits, and
their clocks are assumptions until somebody places and routes the design there. None of these
powers was measured by us.
"""

from __future__ import annotations

from dataclasses import dataclass

MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class BoardClass:
    """`peak`: bytes/s of the memory's pins. `efficiency`: the share that long sequential bursts
    get. `static_watts`: board, chip and memory without switching. `logic_scale`: energy of
    switching, relative to ECP5's 40 nm at 1.1 V. `sources`: where each figure comes from."""

    name: str
    title: str
    memory: str  # a key of energy.MEMORY_PJ_PER_BIT
    peak: float
    efficiency: float
    capacity: float  # bytes
    clock: float  # Hz
    static_watts: float
    logic_scale: float
    sources: str

    @property
    def bandwidth(self) -> float:
        """Bytes a second of sequential reads."""
        return self.peak * self.efficiency

    def words_per_cycle(self, memory_bits: int) -> float:
        """Memory words of `memory_bits` that come a cycle, one at most."""
        return min(1.0, self.bandwidth / self.clock / (memory_bits / 8))


BOARDS = {
    board.name: board
    for board in (
        BoardClass(
            "ulx3s", "ULX3S-85F, SDR x16", "sdr", 0.2 * GIGA, 0.95, 32 * 2**20, 100 * MEGA,
            0.9, 1.0,
            "SDRAM at the design's clock, efficiency of our controller in simulation (>= 0.95);"
            " static: assumed, ECP5-85F leakage ~0.2 W, regulators, USB bridge, refresh",
        ),
        BoardClass(
            "ddr3-x16", "DDR3-800 x16 (ECP5, Artix class)", "ddr3", 1.6 * GIGA, 0.85, 512 * 2**20,
            100 * MEGA, 1.5, 1.0,
            "DDR3-800 is what ECP5 is specified for; efficiency and static power assumed",
        ),
        BoardClass(
            "ddr4-x64", "DDR4-2400 x64 (Zynq UltraScale+ class)", "ddr4", 19.2 * GIGA, 0.85,
            4 * 2**30, 200 * MEGA, 3.5, 0.4,
            "peak of the KV260; clock assumed (200 MHz is modest there); static assumed below the"
            " 6.2 W that bitnet-kv260 measured for a board at work",
        ),
        BoardClass(
            "hbm2", "HBM2, one stack (Alveo class)", "hbm2", 230 * GIGA, 0.85, 8 * 2**30,
            250 * MEGA, 20.0, 0.4,
            "half of an Alveo U50/U280's two stacks; clock and static (idle of such cards) assumed",
        ),
    )
}  # fmt: skip


def board(name: str) -> BoardClass:
    """Raises ValueError for an unknown name."""
    if name not in BOARDS:
        raise ValueError(f"board class {name!r} is not one of {', '.join(BOARDS)}")
    return BOARDS[name]
