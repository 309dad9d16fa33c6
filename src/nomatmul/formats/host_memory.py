"""How much memory this process may still take: of the machine, of its control groups, by limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nomatmul.formats.control_groups import control_groups


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process could still allocate without swapping; None where nobody says.

    The least of: what the machine has available, what is left to each control group around the
    process (version 1 or 2), and what RLIMIT_AS and RLIMIT_DATA leave. root: where proc and sys
    are looked for.
    """
    found = [*_machine(root), *_control_groups(root), *_limits(root)]
    return max(min(found), 0) if found else None


def _machine(root: Path) -> Iterator[int]:
    table = _table(root / "proc/meminfo")
    if "MemAvailable" in table:
        yield table["MemAvailable"] * 1024
    elif not table:  # no Linux: all that there is
        with contextlib.suppress(AttributeError, ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Files of a group: its limit, what it uses, and what of that is files that are only cached.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _control_groups(root: Path) -> Iterator[int]:
    """What is left of the limits of the process's groups and of those around them."""
    for version, group in control_groups("memory", root / "proc/self", root / "sys/fs/cgroup"):
        yield from _left_in(group, *_FILES[version])


def _left_in(group: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """Files that are only cached count as free: the kernel drops them first."""
    with contextlib.suppress(ValueError):  # "max", or no such file: no limit
        most, taken = int(_read(group / limit)), int(_read(group / used))
        yield most - taken + _table(group / "memory.stat").get(cache, 0)


def _limits(root: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    table = _table(root / "proc/self/status")
    for number, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - table.get(used, 0) * 1024


def _table(file: Path) -> dict[str, int]:
    """The numbers of a file of lines "name number" or "name: number kB"."""
    table = {}
    for line in _read(file).splitlines():
        name, _, rest = line.partition(" ") if ":" not in line else line.partition(":")
        with contextlib.suppress(ValueError, IndexError):
            table[name] = int(rest.split()[0])
    return table


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:
        return ""
