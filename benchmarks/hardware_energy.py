"""Switching activity of the simulated accelerator, and the energy of a token by the estimate.

    python benchmarks/hardware_energy.py                     # 64 and 256 lanes
    python benchmarks/hardware_energy.py --lanes 256 --memory 8

A model of one layer with random ternary weights runs in Verilator; every signal's changes go
through a pipe into a counter (hardware/synthesis/activity.py), apart for cycles in which the array
takes weights, in which it waits for memory, and all others. Those are the figures of
hardware/measured.py. Needs the extra `hardware` and a C++ compiler. Writes to --out
DATE-hardware-energy.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import report
from dry_run import add_tiny, shrink, temporary
from hardware_blocks import one_layer

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.design import Design
from nomatmul.hardware.simulate import Memory, Simulation, Waves
from nomatmul.hardware.synthesis.activity import OTHER, Activity, count_toggles
from nomatmul.hardware.writing import LARGEST_LOGIT

DIALS = {"vocab_size": 128, "hidden_size": 512, "num_layers": 1, "intermediate_size": 768}
PHASES = {"event_beats": "weights taken", "event_memory": "waiting for memory", OTHER: "all else"}
UNITS = ("product", "row", "vector", "vectors", "parameters", "streamer", "weights", "sequencer")


def measure(reader: PackedReader, design: Design, bytes_a_cycle: float) -> Activity:
    """Run one token and count on the way; nothing is stored."""
    with tempfile.TemporaryDirectory(prefix="nomatmul-energy.") as folder:
        pipe = Path(folder) / "waves.vcd"
        os.mkfifo(pipe)
        found: list[Activity] = []

        def read() -> None:
            with pipe.open(encoding="ascii", errors="replace") as lines:
                found.append(count_toggles(lines, phases=list(PHASES)[:2]))

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        memory = Memory(latency=40, bytes_a_cycle=bytes_a_cycle)
        with Simulation(reader, design, memory, waves=Waves("vcd", pipe)) as run:
            run.token(3, LARGEST_LOGIT)
        reading.join()
    return found[0]


def row(lanes: int, bytes_a_cycle: float, activity: Activity) -> dict[str, Any]:
    """Toggled bits a cycle by phase, and by unit while weights are taken."""
    prefix = next(path for _, path in activity.toggles if path.endswith("product"))
    prefix = prefix.removesuffix("product")
    return {
        "lanes": lanes,
        "bytes_a_cycle": bytes_a_cycle,
        "cycles": dict(activity.cycles),
        "toggles": {phase: activity.per_cycle(phase=phase) for phase in PHASES},
        "units": {unit: activity.per_cycle(prefix + unit, "event_beats") for unit in UNITS},
    }


def page(document: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = document["machine"]
    text = [
        f"# Switching activity of the accelerator, {about['date']}",
        "",
        f"`benchmarks/hardware_energy.py`, commit {about['commit']}: toggled bits a cycle of all"
        " signals of the design before synthesis, simulated with random ternary weights. A LUT may"
        " swallow some of these signals, and glitches are not seen.",
        "",
        "| lanes | memory, bytes a cycle | " + " | ".join(PHASES.values()) + " | of these in "
        + " | ".join(UNITS) + " |",
        "|" + "---|" * (2 + len(PHASES) + len(UNITS)),
    ]  # fmt: skip
    for found in document["rows"]:
        cells = [found["lanes"], found["bytes_a_cycle"] or "a word"]
        cells += [f"{found['toggles'][phase]:,.0f}" for phase in PHASES]
        cells += [f"{found['units'][unit]:,.0f}" for unit in UNITS]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--memory", type=float, default=13.6, help="bytes a cycle (DDR3 x16)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    add_tiny(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        shrink(options, parser, lanes=[32], out=temporary())
    options.out = options.out or Path(__file__).parent / "results"
    options.out.mkdir(parents=True, exist_ok=True)
    machine = report.machine("")
    rows = []
    with tempfile.TemporaryDirectory(prefix="nomatmul-energy.") as folder:
        dials = {**DIALS, "hidden_size": 40, "intermediate_size": 64} if options.tiny else DIALS
        reader = one_layer(dials, Path(folder) / "model")
        for lanes in options.lanes:
            print(f"{lanes} lanes", flush=True)
            if options.tiny:
                rows.append(row(lanes, options.memory, _invented()))
                continue
            design = Design(lanes=lanes)
            rows.append(row(lanes, options.memory, measure(reader, design, options.memory)))
    document = {"machine": machine, "rows": rows}
    path = options.out / f"{machine['date']}-hardware-energy.json"
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(page(document), "utf-8")
    print(page(document))
    return 0


def _invented() -> Activity:
    """Of a dry run, which builds no simulation."""
    activity = Activity()
    for phase in PHASES:
        activity.cycles[phase] = 10
        for unit in UNITS:
            activity.toggles[phase, f"dut.{unit}"] = 1000
    return activity


if __name__ == "__main__":
    raise SystemExit(main())
