"""Resources and clock of the accelerator: synthesis and place and route, size by size.

    python benchmarks/hardware_synthesis.py                    # all sizes, about an hour and a half
    python benchmarks/hardware_synthesis.py --lanes 256 --seeds 1 2 3
    python benchmarks/hardware_synthesis.py --no-route         # resources alone

The whole top of the ULX3S (SDRAM controller, serial host, pads) on an LFE5U-85F at 100 MHz, and the
AXI top's resources on 7-series. Needs the extra `hardware`. A row is written when it is done,
and a second run goes on behind the last; files of the tools and their logs stay in --work. Writes
DATE-hardware-synthesis.json and .md to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
from dry_run import add_tiny, shrink, temporary

from nomatmul.hardware.synthesis.nextpnr import (
    Routed,
    critical_lines,
    place_and_route,
    read_report,
)
from nomatmul.hardware.synthesis.resources import AVAILABLE, resources, routed_resources
from nomatmul.hardware.synthesis.yosys import Netlist, read_cells, rtlil, synthesize

GOAL_MHZ, GOAL_LUTS = 100.0, 0.6


def top(family: str, lanes: int, tiny: bool) -> tuple[Any, dict[str, Any] | None, str]:
    """(component, its ports, its constraints) for a chip family."""
    from nomatmul.hardware.board import ulx3s
    from nomatmul.hardware.design import Design

    if tiny:
        from nomatmul.hardware.board.uart import UartTransmitter
        from nomatmul.hardware.rtl.enclose import Enclosed

        return Enclosed(UartTransmitter(4)), None, ""
    if family == "ecp5":
        board = ulx3s.Ulx3s(Design(lanes=lanes, **ulx3s.MEMORIES), GOAL_MHZ * 1e6)
        return board, board.ports(), ulx3s.constraints()
    from nomatmul.hardware.board.axi_top import AxiTop

    axi = AxiTop(Design(lanes=lanes))
    return axi, axi.ports(), ""


class Runs:
    """The rows of one result file, and the folder where the tools work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        self.machine = report.machine("")
        self.path = options.out / f"{self.machine['date']}-hardware-synthesis.json"
        self.rows = self._written()

    def _written(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"]
        return rows

    def has(self, **keys: Any) -> bool:
        return any(all(row.get(k) == v for k, v in keys.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write both files, in which another run may have written meanwhile."""
        self.rows = [*self._written(), row]
        self.rows.sort(key=_order)
        document = {"machine": self.machine, "rows": self.rows}
        for path, text in (
            (self.path, json.dumps(document, indent=1) + "\n"),
            (self.path.with_suffix(".md"), page(document)),
        ):
            part = path.with_suffix(path.suffix + ".part")
            part.write_text(text, "utf-8")
            os.replace(part, path)

    def netlist(self, lanes: int, family: str) -> tuple[Netlist, Path]:
        """Synthesised before, or now; and its constraints."""
        folder = self.options.work / f"{family}-{lanes}"
        name, lpf = f"top{lanes}", folder / "top.lpf"
        done = folder / f"{name}-{family}-stat.json"
        if done.exists():
            made = folder / f"{name}-{family}.json"
            return Netlist(family, name, read_cells(done), 0.0, made), lpf
        print(f"{family}, {lanes} lanes: synthesis", flush=True)
        component, ports, constraints = top(family, lanes, self.options.tiny)
        folder.mkdir(parents=True, exist_ok=True)
        lpf.write_text(constraints)
        text = rtlil(component, name, ports)
        found = synthesize(text, name, folder, family=family, limit=self.options.limit)
        self.add(
            {
                "kind": "synthesis",
                "family": family,
                "lanes": lanes,
                "seconds": found.seconds,
                "resources": dataclasses.asdict(resources(found.cells, family)),
                "cells": found.cells,
            }
        )
        return found, lpf

    def route(self, lanes: int, speed: int, seed: int) -> None:
        if self.has(kind="route", lanes=lanes, speed=speed, seed=seed):
            return
        netlist, constraints = self.netlist(lanes, "ecp5")
        print(f"ecp5, {lanes} lanes: place and route, grade {speed}, seed {seed}", flush=True)
        row: dict[str, Any] = {"kind": "route", "family": "ecp5", "lanes": lanes}
        row |= {"speed": speed, "seed": seed, "options": self.options.nextpnr_options}
        start = time.monotonic()
        try:
            found = place_and_route(
                netlist.json,
                netlist.json.parent,
                seed=seed,
                speed=speed,
                mhz=GOAL_MHZ,
                constraints=constraints,
                limit=self.options.limit,
                program=self.options.nextpnr,
                options=self.options.nextpnr_options.split(),
                progress=_progress(),
            )
        except RuntimeError as failure:  # it does not fit, cannot be routed, or takes too long
            why = str(failure).replace(f"{netlist.json.parent}/", "")
            self.add(row | {"seconds": time.monotonic() - start, "failure": why})
            return
        self.add(row | _found(found))

    def take(self, lanes: int, speed: int, seed: int) -> None:
        """A row of a report that nextpnr wrote elsewhere, of a design that the note names."""
        text = self.options.report.read_text("utf-8")
        found = read_report(json.loads(text), seed, self.options.report_seconds)
        row = {"kind": "route", "family": "ecp5", "lanes": lanes, "speed": speed, "seed": seed}
        self.add(row | {"note": self.options.note} | _found(found))


def _found(routed: Routed) -> dict[str, Any]:
    """What a row says of a run that came to its end."""
    return {
        "seconds": routed.seconds,
        "mhz": routed.mhz,
        "resources": dataclasses.asdict(routed_resources(routed.used)),
        "critical": critical_lines(routed),
    }


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["family"], -row["lanes"], row["kind"], row.get("speed", 0), row.get("seed", 0)


def _progress() -> Any:
    """Prints a line of the log now and then."""
    last = [time.monotonic()]

    def show(line: str) -> None:
        if time.monotonic() - last[0] > 60:
            last[0] = time.monotonic()
            print("   ", line.removeprefix("Info: ").strip(), flush=True)

    return show


def page(document: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = document["machine"]
    text = [
        f"# Synthesis, place and route of the accelerator, {about['date']}",
        "",
        f"`benchmarks/hardware_synthesis.py`, commit {about['commit']}, {about['cpu']}. Placed: the"
        " whole top of the ULX3S on an LFE5U-85F (SDRAM controller, serial host and pads included;"
        f" memories of `ulx3s.MEMORIES`), asked for {GOAL_MHZ:.0f} MHz. Grade 6 is that of the"
        " board and the slowest, 8 the fastest. xc7: the AXI top after synthesis, shares of an"
        " XC7Z020.",
        "",
        "| chip | lanes | step | grade | seed | MHz | LUTs | registers | block RAM | DSP | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    text += [_line(row) for row in document["rows"]]
    routed = [row for row in document["rows"] if row["kind"] == "route" and "mhz" in row]
    for row in routed:
        name = f"{row['lanes']} lanes, speed grade {row['speed']}, seed {row['seed']}"
        name += f", {row['note']}" if row.get("note") else ""
        text += ["", f"## Critical path: {name}", "", "```"]
        text += [*row["critical"], "```"]
    return "\n".join(text) + "\n"


def _line(row: dict[str, Any]) -> str:
    kind = f"{row['kind']} ({row['note']})" if row.get("note") else row["kind"]
    head = f"| {row['family']} | {row['lanes']} | {kind} |"
    head += f" {row.get('speed', '')} | {row.get('seed', '')} |"
    if "failure" in row:
        return f"{head} {row['failure'][:200]} | | | | | {row['seconds']:.0f} |"
    found, full = row["resources"], AVAILABLE[row["family"]]
    cells = [
        f"{found[kind]:g} ({found[kind] / full[kind]:.0%})"
        for kind in ("luts", "registers", "block_rams", "dsps")
    ]
    clock = f"{row['mhz']:.1f}" if "mhz" in row else ""
    return f"{head} {clock} | {' | '.join(cells)} | {row['seconds']:.0f} |"


def plan(options: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """(lanes, speed grade, seed): several seeds of the first size and grade, one of the others."""
    for number, lanes in enumerate(options.lanes):
        for speed in options.speeds:
            first = number == 0 and speed == options.speeds[0]
            for seed in options.seeds if first else options.seeds[:1]:
                yield lanes, speed, seed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", type=int, nargs="+", default=[256, 128, 64, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--speeds", type=int, nargs="+", default=[6, 8], help="grades of the chip")
    parser.add_argument("--families", nargs="+", default=["ecp5", "xc7"])
    parser.add_argument("--nextpnr", help="another build of nextpnr-ecp5: its path or name")
    parser.add_argument("--nextpnr-options", default="", help="more of its options, in one string")
    parser.add_argument("--report", type=Path, help="add a report of nextpnr, and do nothing else")
    parser.add_argument("--report-seconds", type=float, default=0.0, help="how long that run took")
    parser.add_argument("--note", default="", help="of which design that report is")
    parser.add_argument("--no-route", action="store_true", help="synthesis alone")
    parser.add_argument("--limit", type=float, default=3 * 3600.0, help="seconds a tool may take")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--work", type=Path, help="default: a temporary folder, which stays")
    add_tiny(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        shrink(
            options, parser, lanes=[32], seeds=[1], speeds=[6], families=["ecp5"], out=temporary()
        )
    options.out = options.out or Path(__file__).parent / "results"
    options.work = options.work or temporary()
    runs = Runs(options)
    if options.report:
        runs.take(options.lanes[0], options.speeds[0], options.seeds[0])
        return 0
    if "ecp5" in options.families:
        for lanes, speed, seed in plan(options):
            if options.no_route:
                runs.netlist(lanes, "ecp5")
            else:
                runs.route(lanes, speed, seed)
    for family in set(options.families) - {"ecp5"}:
        for lanes in options.lanes:
            if not runs.has(kind="synthesis", family=family, lanes=lanes):
                runs.netlist(lanes, family)
    print(page({"machine": runs.machine, "rows": runs.rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
