"""nextpnr for ECP5: place and route, the clock that came of it, and the path that limits it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nomatmul.hardware.synthesis.programs import run_logged
from nomatmul.hardware.tools import tool

DEVICE = ("--85k", "--package", "CABGA381")  # an LFE5U-85F as on the ULX3S
SPEED = 6  # its speed grade there, the slowest; the fastest is 8


@dataclass(frozen=True)
class Step:
    """A piece of the critical path: nanoseconds, what kind, the cell it leads to, source lines."""

    nanoseconds: float
    kind: str
    cell: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Routed:
    """What nextpnr reports. `clocks`: MHz reached and asked for, by net."""

    seed: int
    seconds: float
    clocks: dict[str, tuple[float, float]]
    used: dict[str, tuple[int, int]]  # cell type -> used, available
    critical: list[Step] = field(default_factory=list)

    @property
    def mhz(self) -> float:
        """The clock of the slowest domain that is asked for the fastest clock."""
        goal = max(asked for _, asked in self.clocks.values())
        return min(reached for reached, asked in self.clocks.values() if asked == goal)


def place_and_route(
    netlist: Path,
    folder: Path,
    *,
    seed: int = 1,
    speed: int = SPEED,
    mhz: float = 100.0,
    constraints: Path | None = None,
    config: bool = False,
    limit: float = 4 * 3600.0,
    niceness: int = 10,
    program: str | None = None,
    options: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Routed:
    """Place and route; the report and the log are left in `folder`.

    program: another build of nextpnr-ecp5 than `tool` finds, its path or its name on the search
    path; options: more of its options.

    config: also write the configuration that ecppack reads. Raises ValueError for a missing
    program, RuntimeError where the design does not fit or cannot be routed, TimeLimit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{netlist.stem}-speed{speed}-seed{seed}"

    def here(path: Path) -> str:  # the wheels' programs see another /tmp
        return os.path.relpath(path, folder)

    report = folder / f"{stem}-report.json"
    words = [program or tool("nextpnr-ecp5"), *DEVICE, "--speed", str(speed)]
    words += ["--json", here(netlist), "--seed", str(seed), "--freq", f"{mhz:g}"]
    # router1 rips up for minutes where router2 negotiates
    words += ["--router", "router2", "--timing-allow-fail", "--report", report.name]
    words += ["--lpf", here(constraints)] if constraints else []
    words += ["--lpf-allow-unconstrained"]
    words += ["--textcfg", f"{stem}.config"] if config else []
    words += options
    log = folder / f"{stem}.log"
    try:
        seconds = run_logged(
            words, log, folder=folder, limit=limit, niceness=niceness, progress=progress
        )
    except RuntimeError as failure:
        reached = how_far(log.read_text("utf-8", "replace"))
        raise type(failure)(f"{failure}{reached}") from failure
    return read_report(json.loads(report.read_text("utf-8")), seed, seconds)


def how_far(log: str) -> str:
    """What a run that did not end had reached: the clock estimated behind placement, the wires
    that router2 had not yet given to one net each. Empty where it was not placed."""
    clock = re.search(r"Max frequency for clock '[^']*': ([\d.]+) MHz", log)
    routed = re.findall(r"iter=(\d+) wires=\d+ overused=(\d+)", log)
    text = f"; behind placement nextpnr estimates {clock[1]} MHz" if clock else ""
    if routed:
        number, shared = routed[-1]
        text += f"; {int(shared):,} wires shared after iteration {number} of router2"
    return text


def read_report(report: dict[str, Any], seed: int, seconds: float) -> Routed:
    """Raises ValueError for something that is no report of nextpnr."""
    try:
        clocks = {
            name: (float(clock["achieved"]), float(clock["constraint"]))
            for name, clock in report["fmax"].items()
        }
        used = {
            kind: (int(count["used"]), int(count["available"]))
            for kind, count in report["utilization"].items()
            if count["used"]
        }
        paths = [
            path
            for path in report["critical_paths"]
            if "async" not in path["from"] + path["to"] and path["from"] == path["to"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("this is no report of nextpnr") from None
    if not clocks:
        raise ValueError("the design has no clock")
    longest = max(paths, key=_length, default=None)
    steps = [_step(piece) for piece in longest["path"]] if longest else []
    return Routed(seed, seconds, clocks, used, steps)


def _length(path: dict[str, Any]) -> float:
    return sum(float(piece["delay"]) for piece in path["path"])


def _step(piece: dict[str, Any]) -> Step:
    return Step(
        round(float(piece["delay"]), 3),
        str(piece["type"]),
        str(piece["to"]["cell"]),
        tuple(str(line) for line in piece.get("sources", ())),
    )


def critical_lines(routed: Routed) -> list[str]:
    """The critical path as text: nanoseconds up to here, kind, cell, lines of the design's source
    (not of Yosys' own libraries)."""
    lines, total = [], 0.0
    for step in routed.critical:
        total += step.nanoseconds
        where = ", ".join(dict.fromkeys(filter(None, map(_ours, step.sources))))
        lines.append(f"{total:6.2f} {step.kind:<8} {step.cell}  {where}".rstrip())
    return lines


def _ours(source: str) -> str:
    """A line of a package's source from its root on, wherever it is installed; else nothing."""
    for root in ("/nomatmul/", "/site-packages/"):
        if root in source:
            return source.rpartition(root)[2]
    return ""
