"""From a design to a program that simulates it: Verilog, Verilator, a C++ compiler.

That takes a minute and depends on nothing but the design and our sources, so the result is kept in
the user's cache under a name that is a checksum of all of these.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomatmul.formats.cpus import usable_cpus
from nomatmul.formats.hub_files import cache_directory
from nomatmul.hardware import registers, tools
from nomatmul.hardware.design import Design
from nomatmul.hardware.registers import Register

MOST_THREADS = 64
# and the packages that bring them
FST_HEADERS = (("zlib.h", "zlib1g-dev"), ("lz4.h", "liblz4-dev"))
WAVES = {"none": 0, "vcd": 1, "fst": 2}
_BUILD = "build."  # begins the names of directories of builds that go on
_ABANDONED = 24 * 3600.0  # seconds: no build takes as long
_HERE = Path(__file__).resolve().parent
_NATIVE = ("harness.cc", "board.h", "events.h", "memory.h", "options.h")
# O1 runs as fast as O2, measured, and compiles sooner.
_FLAGS = (
    *("-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert"),
    *("-Wno-fatal", "-Wno-WIDTH", "-Wno-UNOPTFLAT", "--output-split", "20000"),
)
_OPTIMISE = "-O1"


def simulator(
    design: Design,
    *,
    waves: str = "none",
    threads: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """The simulation of a design as a program, from the cache or built now.

    note: told what goes on when it takes time. Raises ValueError for a wrong number of threads or a
    missing tool, ImportError without amaranth, RuntimeError where a tool fails.
    """
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads is {threads}, it must be 1 to {MOST_THREADS}")
    flags = _flags(design, waves, threads)
    target = cache_directory() / "hardware" / _checksum(design, flags) / "simulator"
    if target.exists():
        return target
    tools.require_simulator()
    if waves == "fst":
        for header in FST_HEADERS:
            tools.require_header(*header, "a waveform in FST (unlike one in VCD)")
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(target.parent.parent)
    with tempfile.TemporaryDirectory(prefix=_BUILD, dir=target.parent.parent) as directory:
        made = _build(Path(directory), design, flags, note)
        target.parent.mkdir(exist_ok=True)
        made.replace(target)
    return target


def _drop_abandoned(cache: Path) -> None:
    """Removes what builds that were killed have left."""
    for directory in cache.glob(f"{_BUILD}*"):
        try:
            abandoned = time.time() - directory.stat().st_mtime > _ABANDONED
        except FileNotFoundError:  # its build has ended
            continue
        if abandoned:
            shutil.rmtree(directory, ignore_errors=True)


def _flags(design: Design, waves: str, threads: int) -> list[str]:
    """What Verilator is told, the harness's definitions included."""
    defines = {
        "MEMORY_BITS": design.memory_bits,
        "ELEMENTS": design.element_lanes,
        "VECTOR_BITS": design.vector_bits,
        "STATE_BITS": design.state_bits,
        "PROBE": int(design.probe),
        "WAVES": WAVES[waves],
    }
    words = [*_FLAGS, *(("--trace",) if waves == "vcd" else ())]
    words += [*(("--trace-fst",) if waves == "fst" else ())]
    words += [*(("--threads", str(threads)) if threads > 1 else ())]
    texts = [f"-D{name}={value}" for name, value in defines.items()]
    return [*words, "-CFLAGS", " ".join(["-std=c++17", *texts])]


def _checksum(design: Design, flags: list[str]) -> str:
    digest = hashlib.sha256(repr((dataclasses.astuple(design), flags, _OPTIMISE)).encode())
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    for package in ("amaranth", "verilator"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"-")  # the system's: nobody knows which
    return digest.hexdigest()[:32]


def _sources() -> list[Path]:
    """All files that a simulation is made of."""
    room = _HERE.parent
    rtl = sorted((room / "rtl").glob("**/*.py"))
    return [*rtl, room / "design.py", room / "isa.py", room / "registers.py", Path(__file__)] + [
        _HERE / name for name in _NATIVE
    ]


def _build(directory: Path, design: Design, flags: list[str], note: Callable[[str], None]) -> Path:
    note(f"building the simulation of {design.lanes} lanes, once: writing Verilog (1 of 3)")
    (directory / "bench.v").write_text(bench_verilog(design))
    (directory / "registers.h").write_text(registers_header())
    for name in _NATIVE:
        shutil.copy(_HERE / name, directory / name)
    note("building the simulation: Verilator (2 of 3)")
    words: list[str | Path] = [tools.tool("verilator"), "--cc", "--exe", "--top-module", "bench"]
    words += [*flags, "--Mdir", "made", "bench.v", "harness.cc"]
    tools.run(words, cwd=directory)
    note("building the simulation: C++ (3 of 3)")
    jobs = usable_cpus()
    compiler = tools.tool("g++")
    make: list[str | Path] = [tools.tool("make"), "-C", "made", "-f", "Vbench.mk", f"-j{jobs}"]
    make += [f"CXX={compiler}", f"LINK={compiler}", f"OPT_FAST={_OPTIMISE}", "OPT_SLOW=-O0"]
    # how a compiler takes a precompiled header: the wheel was built without asking one
    make += ["CFG_CXXFLAGS_PCH_I=-include", "VM_PARALLEL_BUILDS=1"]
    tools.run(make, cwd=directory)
    return directory / "made" / "Vbench"


def bench_verilog(design: Design) -> str:
    """The accelerator as the harness sees it: a module `bench`, its ports named with single
    underscores (memory_request_valid)."""
    from nomatmul.hardware.rtl.top import Accelerator

    return tools.verilog(Accelerator(design), "bench", flat=True)


@functools.lru_cache(maxsize=1)
def registers_header() -> str:
    """hardware/registers.py as C++."""
    lines = ["// Written from hardware/registers.py.", "#pragma once", "#include <array>"]
    lines += ["#include <cstdint>", "namespace registers {"]

    def constant(name: str, value: Any) -> None:
        words = "".join(word.capitalize() for word in name.split("_"))
        lines.append(f"constexpr std::uint32_t k{words} = {int(value)}u;")

    for kind in (Register, registers.Control, registers.Status, registers.TokenFlag):
        for member in kind:
            if (kind, member.name) != (registers.Control, "RESET"):
                constant(str(member.name), member.value)
    constant("COUNTER_HALF", registers.COUNTER_HALF)
    names = ", ".join(f'"{name}"' for name in registers.COUNTERS)
    lines.append(
        f"constexpr std::array<const char*, {len(registers.COUNTERS)}> kCounterNames = {{{names}}};"
    )
    return "\n".join([*lines, "}  // namespace registers", ""])
