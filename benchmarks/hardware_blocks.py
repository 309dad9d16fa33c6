"""Cycles of the published sizes on the simulated accelerator, block by block, and tokens/s of it.

    python benchmarks/hardware_blocks.py                       # 370M, 1.3B, 2.7B, each memory
    python benchmarks/hardware_blocks.py --sizes 370M --lanes 256 512 --boards ddr4-x64

A model of one layer with the real sizes and random ternary weights runs in Verilator with each
board class's memory: one token without logits (embedding and block), one with (and the head). The
whole model is its layers times the former plus the head, so the embedding is counted once a layer;
nothing else is added up. Energy is the estimate of hardware/energy.py. Needs the extra `hardware`
and a C++ compiler. Writes DATE-hardware-blocks.json and .md to --out, a row when it is done, and a
second run goes on behind the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from dry_run import add_tiny, shrink, temporary

from nomatmul.engine.random_weights import random_weights
from nomatmul.evaluate.speed import SIZES
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import Forms, PackedReader, PackedWriter
from nomatmul.hardware import isa
from nomatmul.hardware.boards import BoardClass, board
from nomatmul.hardware.cycles import Cycles, token_cycles
from nomatmul.hardware.design import Design
from nomatmul.hardware.report import GOAL, OTHERS, Workload, on_board
from nomatmul.hardware.simulate import Memory, Simulation
from nomatmul.hardware.writing import LARGEST_LOGIT, NO_LOGITS

PAPER_BLOCK = (0.112, 54e6)  # seconds and clock of the paper's block of d = 1024
TINY = {"vocab_size": 64, "hidden_size": 40, "num_layers": 2, "intermediate_size": 64}
FULL_SPEED = "word"  # no board: a memory word each cycle


def one_layer(dials: dict[str, Any], folder: Path) -> PackedReader:
    """A packed model of one layer with these sizes and random weights."""
    config = ModelConfig(**{**dials, "num_layers": 1})
    forms = Forms.of(config, embedding="int8")
    weights = random_weights(config, forms, seed=1)
    with PackedWriter(folder, config, forms) as writer:
        for name in writer.names:
            writer.add(name, weights.arrays[name])
    return PackedReader(folder)


def memory_of(kind: BoardClass | None) -> Memory:
    """A board's bandwidth, after 40 cycles for the first word."""
    if kind is None:
        return Memory(latency=40)
    return Memory(latency=40, bytes_a_cycle=round(kind.bandwidth / kind.clock, 3))


def simulated(reader: PackedReader, design: Design, kind: BoardClass | None) -> dict[str, Any]:
    """Cycles, words and stalls of a token without logits, and of one with."""
    with Simulation(reader, design, memory_of(kind)) as run:
        wants = ((3, NO_LOGITS), (5, NO_LOGITS), (7, LARGEST_LOGIT))
        seen = [run.token(token, want) for token, want in wants]
    block, whole = (
        {
            "cycles": answer["counters"]["cycles"] - answer["counters"]["token"],
            "words": answer["words"],
            "counters": answer["counters"],
            "status": answer["status"],
        }
        for answer in seen[1:]
    )
    return {"block": block, "with_head": whole}


def computed(reader: PackedReader, design: Design, kind: BoardClass | None) -> dict[str, Any]:
    """The same from the program alone."""
    program = Workload.of(reader, design).program
    rate = 1.0 if kind is None else kind.words_per_cycle(design.memory_bits)
    skip = next(n for n, i in enumerate(program) if isinstance(i, isa.Skip))
    found = {}
    for part, instructions in (("block", program[:skip]), ("with_head", program)):
        cycles = token_cycles(instructions, design, rate)
        counters = {"beats": cycles.beats, "memory": cycles.waiting}
        values = {"cycles": cycles.cycles, "words": cycles.words, "counters": counters}
        found[part] = values | {"status": 0}
    return found


def model_row(
    name: str,
    dials: dict[str, Any],
    reader: PackedReader,
    design: Design,
    kind: BoardClass | None,
    simulate: bool,
) -> dict[str, Any]:
    """One size on one memory: what was simulated, and the whole model that follows."""
    start = time.monotonic()
    found = (simulated if simulate else computed)(reader, design, kind)
    layers = dials["num_layers"]
    block, whole = found["block"], found["with_head"]

    def times(key: str) -> float:
        return layers * float(block[key]) + float(whole[key]) - float(block[key])

    beats = layers * block["counters"]["beats"] + (
        whole["counters"]["beats"] - block["counters"]["beats"]
    )
    waiting = layers * block["counters"]["memory"] + (
        whole["counters"]["memory"] - block["counters"]["memory"]
    )
    cycles = Cycles(times("cycles"), beats, waiting, times("words"))
    one = Workload.of(reader, design, name)
    layer_bytes = block["words"] * design.memory_bytes
    workload = one.repeated(layers, name, layer_bytes=layer_bytes)
    rate = 1.0 if kind is None else kind.words_per_cycle(design.memory_bits)
    row: dict[str, Any] = {
        "model": name,
        "layers": layers,
        "cycles_kind": "simulated" if simulate else "computed",
        "lanes": design.lanes,
        "packing": design.packing,
        "memory": kind.name if kind else FULL_SPEED,
        "block_cycles": block["cycles"],
        "block_beats": block["counters"]["beats"],
        "block_counters": block["counters"],
        "status": block["status"] | whole["status"],
        "head_cycles": whole["cycles"] - block["cycles"],
        "cycles": cycles.cycles,
        "computed_cycles": token_cycles(workload.program, design, rate).cycles,
        "bytes_a_token": cycles.words * design.memory_bytes,
        "seconds": time.monotonic() - start,
    }
    if kind is not None:
        made = on_board(workload, design, kind, cycles)
        row |= {"board": made | {"cycles_kind": row["cycles_kind"]}}
    return row


def page(document: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = document["machine"]
    seconds, clock = PAPER_BLOCK
    text = [
        f"# Blocks of the published sizes in simulation, {about['date']}",
        "",
        f"`benchmarks/hardware_blocks.py`, commit {about['commit']}. Cycles are simulated"
        " (Verilator) with random ternary weights, or computed from the program: one block and the"
        " head; the model is its layers times the block and the head. Watts and tokens/J are an"
        " estimate (hardware/energy.py); memory `word` answers one word each cycle. Paper: one"
        f" block of d = 1024 measured at {seconds * 1e3:.0f} ms at {clock / 1e6:.0f} MHz.",
        "",
        "| model | lanes | packing | memory | cycles are | a block | lanes busy in it"
        " | ms a block at 54 MHz | times the paper's | cycles a token (from the program)"
        " | MB a token | MHz | tokens/s | W | tokens/J | times 1.74 |",
        "|" + "---|" * 16,
    ]
    for row in document["rows"]:
        block_ms = row["block_cycles"] / clock * 1e3
        faster = f"{seconds * 1e3 / block_ms:.0f}" if row["model"] == "370M" else ""
        cells = [
            row["model"],
            row["lanes"],
            row["packing"],
            row["memory"],
            row["cycles_kind"],
            f"{row['block_cycles']:,.0f}",
            f"{row['block_beats'] / row['block_cycles']:.1%}",
            f"{block_ms:.2f}",
            faster,
            f"{row['cycles']:,.0f} ({row['computed_cycles']:,.0f})",
            f"{row['bytes_a_token'] / 1e6:.1f}",
        ]
        made = row.get("board")
        cells += (
            [
                f"{made['clock_mhz']:.0f}",
                f"{made['tokens_per_second']:.1f}" + ("" if made["fits"] else " (does not fit)"),
                f"{made['watts']:.2f}",
                f"{made['tokens_per_joule']:.2f}",
                f"{made['tokens_per_joule'] / (GOAL / 4):.1f}",
            ]
            if made
            else [""] * 5
        )
        text.append("| " + " | ".join(map(str, cells)) + " |")
    text += ["", "| others | model | tokens/s | W | tokens/J | kind | source |", "|" + "---|" * 7]
    for other in OTHERS:
        watts, ratio = other.watts or 0, other.per_joule or 0
        text.append(
            f"| {other.name} | {other.model} | {other.tokens_per_second:,g} | {watts:.1f}"
            f" | {ratio:.2f} | {other.kind} | {other.source} |"
        )
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["370M", "1.3B", "2.7B", "union-370M"])
    parser.add_argument("--lanes", type=int, nargs="+", default=[256])
    parser.add_argument("--packings", nargs="+", default=["2bit", "1.6bit"])
    parser.add_argument("--boards", nargs="+", default=[FULL_SPEED, "ddr3-x16", "ddr4-x64", "hbm2"])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument(
        "--computed", action="store_true", help="cycles from the program, nothing is simulated"
    )
    add_tiny(parser)
    options = parser.parse_args(arguments)
    simulate = not (options.tiny or options.computed)
    if options.tiny:
        shrink(options, parser, sizes=["tiny"], lanes=[32], packings=["2bit"], out=temporary())
    options.out = options.out or Path(__file__).parent / "results"
    options.out.mkdir(parents=True, exist_ok=True)
    machine = report.machine("")
    path = options.out / f"{machine['date']}-hardware-blocks.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for size in options.sizes:
        dials = TINY if options.tiny else SIZES[size]
        with tempfile.TemporaryDirectory(prefix="nomatmul-blocks.") as folder:
            reader = one_layer(dials, Path(folder) / "model")
            for lanes in options.lanes:
                for packing in options.packings:
                    design = _design(dials, lanes, packing, options.tiny)
                    for name in options.boards:
                        done = {"model": size, "lanes": lanes, "packing": packing, "memory": name}
                        if any(done.items() <= row.items() for row in rows):
                            continue
                        print(", ".join(map(str, done.values())), flush=True)
                        kind = None if name == FULL_SPEED else board(name)
                        rows.append(model_row(size, dials, reader, design, kind, simulate))
                        _write(path, {"machine": machine, "rows": rows})
    print(page({"machine": machine, "rows": rows}))
    return 0


def _design(dials: dict[str, Any], lanes: int, packing: str, tiny: bool) -> Design:
    design = Design(lanes=lanes, packing=packing, trees="fff_trees" in dials)
    if design.trees:
        design = dataclasses.replace(design, tree_rows=1024)
    return dataclasses.replace(design, memory_bits=64) if tiny else design


def _write(path: Path, document: dict[str, Any]) -> None:
    for target, text in (
        (path, json.dumps(document, indent=1) + "\n"),
        (path.with_suffix(".md"), page(document)),
    ):
        part = target.with_suffix(target.suffix + ".part")
        part.write_text(text, "utf-8")
        os.replace(part, target)


if __name__ == "__main__":
    raise SystemExit(main())
