"""What the accelerator costs and how fast it is, by board class, beside the systems of others.

Kinds of figures: `placed` (place and route of this design's size, see benchmarks/results),
`simulated` (cycles of the Verilog), `computed` (cycles from the program, see cycles.py) and
`estimated` (energy: events times stated picojoules, see energy.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware import isa
from nomatmul.hardware.boards import BOARDS, BoardClass, board
from nomatmul.hardware.compile import formats_of
from nomatmul.hardware.compile.image import Image
from nomatmul.hardware.compile.program import Builder
from nomatmul.hardware.cycles import Cycles, token_cycles
from nomatmul.hardware.design import Design
from nomatmul.hardware.energy import (
    MEMORY_PJ_PER_BIT,
    MEMORY_SOURCES,
    SOURCES,
    Events,
    Picojoules,
    energy,
    sensitivity,
)
from nomatmul.hardware.measured import activity, placed
from nomatmul.reference.integer.model import IntegerModel

BLOCK_RAM_BITS = 36  # of one access


@dataclass(frozen=True)
class Others:
    """A system of somebody else; `kind` as its authors name it."""

    name: str
    model: str
    tokens_per_second: float
    watts: float | None
    kind: str
    source: str

    @property
    def per_joule(self) -> float | None:
        return self.tokens_per_second / self.watts if self.watts else None


OTHERS = (
    Others("MatMul-free LM on a Stratix 10", "370M", 23.8, 13.65, "projected",
           "arXiv 2406.02528, from one block measured at 54 MHz"),
    Others("TerEffic, several FPGAs, weights on chip", "370M", 16_300, 16_300 / 455,
           "published, kind not stated", "arXiv 2502.16473v2"),
    Others("TerEffic, one FPGA with HBM", "2.7B", 727, 46, "published, kind not stated",
           "arXiv 2502.16473v2"),
    Others("ZyboGPT, Zynq-7010", "115K ternary", 3_072, 3_072 / 1_017, "claimed",
           "its repository; about 1,017 tokens/s a watt"),
    Others("bitnet-kv260", "BitNet-2B-4T", 16.8, 6.2, "measured", "its repository"),
    Others("TeLLMe v2", "BitNet", 25, 5, "measured", "its paper"),
)  # fmt: skip
GOAL = 4 * 23.8 / 13.65  # tokens a joule of the 370M shape


@dataclass(frozen=True)
class Workload:
    """A model compiled for a design: its program, and how its layers repeat.

    `program`: of one token. `bytes`: of the image, all layers included.
    """

    name: str
    program: tuple[isa.Instruction, ...]
    bytes: int

    @classmethod
    def of(cls, reader: PackedReader, design: Design, name: str = "") -> Workload:
        """Raises ValueError for a model that the design cannot run."""
        model = IntegerModel.from_packed(reader, formats_of(design))
        with open(os.devnull, "wb") as nowhere:  # only the layout of the image is wanted
            image = Image(nowhere, design)
            program = tuple(step.instruction for step in Builder(model, design, image).build())
        return cls(name or "the packed model", program, image.words * design.memory_bytes)

    def repeated(self, layers: int, name: str, *, layer_bytes: int) -> Workload:
        """The model with its one layer `layers` times: same shapes, `layer_bytes` each."""
        start = next(n for n, i in enumerate(self.program) if isinstance(i, isa.Stream)) + 1
        end = next(n for n, i in enumerate(self.program) if isinstance(i, isa.Skip))
        body = self.program[start:end]
        stream = self.program[start - 1]
        assert isinstance(stream, isa.Stream)
        longer = dataclasses.replace(stream, words=stream.words * layers)
        program = (*self.program[: start - 1], longer, *body * layers, *self.program[end:])
        return Workload(name, program, self.bytes + (layers - 1) * layer_bytes)


def events(workload: Workload, design: Design, cycles: Cycles, seconds: float) -> Events:
    """What a token causes, from its cycles, its program and the activity of this design's size."""
    switching, area = activity(design.lanes), placed(design.lanes)
    rows = sum(i.rows for i in workload.program if isinstance(i, isa.Product))
    vectors = sum(
        i.count for i in workload.program if isinstance(i, isa.Scan | isa.Sumsq | isa.Quant)
    )
    per_beat = design.lanes * 8 / BLOCK_RAM_BITS  # int8 activations
    per_word = 2 * design.memory_bits / BLOCK_RAM_BITS  # the FIFO, in and out
    per_element = (design.vector_bits + design.weight_bits) / BLOCK_RAM_BITS
    working = cycles.cycles - cycles.waiting
    return Events(
        toggles=cycles.beats * switching.beat
        + (working - cycles.beats) * switching.other
        + cycles.waiting * switching.waiting,
        register_clocks=area.registers * cycles.cycles,
        block_ram_accesses=cycles.beats * per_beat
        + cycles.words * per_word
        + (vectors + 3 * rows) * per_element,
        dsp_products=3.0 * vectors + 4.0 * rows,
        memory_bits=cycles.words * design.memory_bits,
        seconds=seconds,
    )


def on_board(
    workload: Workload, design: Design, kind: BoardClass, simulated: Cycles | None = None
) -> dict[str, Any]:
    """One row: a workload on a board class. simulated: its cycles with that board's memory, if a
    simulation found them."""
    cycles = simulated or token_cycles(
        workload.program, design, kind.words_per_cycle(design.memory_bits)
    )
    seconds = cycles.cycles / kind.clock
    cost = dataclasses.replace(Picojoules(), memory=MEMORY_PJ_PER_BIT[kind.memory])
    happened = events(workload, design, cycles, seconds)
    parts = energy(happened, cost, kind.static_watts, kind.logic_scale)
    fastest = workload_bytes(cycles, design) / kind.bandwidth
    least = max(cycles.beats, fastest * kind.clock)
    return {
        "board": kind.name,
        "title": kind.title,
        "clock_mhz": kind.clock / 1e6,
        "fits": workload.bytes <= kind.capacity,
        "cycles": round(cycles.cycles),
        "cycles_kind": "simulated" if simulated else "computed",
        "bytes_a_token": round(workload_bytes(cycles, design)),
        "tokens_per_second": 1 / seconds,
        "array_busy": cycles.busy,
        "busy_of_what_memory_allows": least / cycles.cycles,
        "watts": parts.total / seconds,
        "joules_a_token": parts.total,
        "joules_by_part": dataclasses.asdict(parts),
        "tokens_per_joule": 1 / parts.total,
        "sensitivity": sensitivity(happened, cost, kind.static_watts, kind.logic_scale),
    }


def workload_bytes(cycles: Cycles, design: Design) -> float:
    """Bytes that a token reads."""
    return cycles.words * design.memory_bytes


def report(reader: PackedReader, design: Design, board_name: str | None = None) -> dict[str, Any]:
    """All that is known of a packed model on a design: one row a board class, or of one alone.

    Raises ValueError for an unknown board class or a model that the design cannot run.
    """
    kinds = [board(board_name)] if board_name else list(BOARDS.values())
    workload = Workload.of(reader, design)
    return report_of(workload, design, kinds)


def report_of(workload: Workload, design: Design, kinds: Sequence[BoardClass]) -> dict[str, Any]:
    """The report of a workload."""
    area = placed(design.lanes)
    return {
        "model": workload.name,
        "image_bytes": workload.bytes,
        "design": dataclasses.asdict(design),
        "resources": {
            **dataclasses.asdict(area),
            "shares": area.shares(),
            "fits": max(area.shares().values()) <= 1,
            "of_another_design": _placed_otherwise(design),
        },
        "boards": [on_board(workload, design, kind) for kind in kinds],
        "others": [{**dataclasses.asdict(o), "tokens_per_joule": o.per_joule} for o in OTHERS],
        "goal_tokens_per_joule": GOAL,
        "energy_is": "an estimate, nothing was measured on a board",
        "picojoules": dataclasses.asdict(Picojoules()) | {"memory": MEMORY_PJ_PER_BIT},
        "sources": {**SOURCES, **MEMORY_SOURCES},
    }


def _placed_otherwise(design: Design) -> dict[str, Any]:
    """What the designs that were placed have where this one has something else."""
    return {
        field.name: field.default
        for field in dataclasses.fields(design)
        if field.name not in ("lanes", "probe") and getattr(design, field.name) != field.default
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A report as text."""
    area = found["resources"]
    shares = area["shares"]
    text = [
        f"{found['model']}: {found['image_bytes'] / 1e6:.1f} MB in memory,"
        f" {found['design']['lanes']} lanes, {found['design']['packing']}",
        f"ECP5 LFE5U-85F ({area['kind']}): {area['luts']:.0f} LUTs ({shares['luts']:.0%}),"
        f" {area['registers']:.0f} registers, {area['block_rams']:.0f} block RAMs"
        f" ({shares['block_rams']:.0%}), {area['dsps']:.0f} DSPs ({shares['dsps']:.0%}),"
        f" {area['mhz']:.0f} MHz" + ("" if area["fits"] else " (more than the chip has)"),
    ]
    if area["of_another_design"]:
        others = ", ".join(f"{name}={value}" for name, value in area["of_another_design"].items())
        text.append(
            f"  these are of a design with {others}; `hardware verilog` and Yosys tell more"
        )
    text += [
        "",
        f"{'board class':<39} {'MHz':>4} {'MB/token':>9} {'cycles':>10} {'tokens/s':>9}"
        f" {'busy':>5} {'W':>6} {'tokens/J':>9}",
    ]
    for row in found["boards"]:
        text.append(
            f"{row['title']:<39} {row['clock_mhz']:>4.0f} {row['bytes_a_token'] / 1e6:>9.2f}"
            f" {row['cycles']:>10} {row['tokens_per_second']:>9.1f} {row['array_busy']:>5.0%}"
            f" {row['watts']:>6.2f} {row['tokens_per_joule']:>9.2f}"
            + ("" if row["fits"] else "  (does not fit its memory)")
        )
    text += ["", "Cycles are " + found["boards"][0]["cycles_kind"] + "; energy is an estimate:"]
    for row in found["boards"]:
        parts = ", ".join(
            f"{name} {joules * 1e3:.2f}" for name, joules in row["joules_by_part"].items()
        )
        text.append(f"  {row['board']}: mJ a token: {parts}")
    text += ["", "tokens/J with one figure halved, doubled:"]
    for row in found["boards"]:
        pairs = ", ".join(
            f"{name} {half:.2f}..{twice:.2f}" for name, (half, twice) in row["sensitivity"].items()
        )
        text.append(f"  {row['board']}: {pairs}")
    text += ["", f"{'others':<42} {'model':<13} {'tokens/s':>9} {'tokens/J':>9}  kind"]
    for other in found["others"]:
        ratio = other["tokens_per_joule"]
        text.append(
            f"{other['name']:<42} {other['model']:<13} {other['tokens_per_second']:>9,.1f}"
            f" {ratio or 0:>9.2f}  {other['kind']}"
        )
    return text
