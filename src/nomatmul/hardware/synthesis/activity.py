"""Switching activity: how many bits change a cycle, counted in a value change dump (VCD).

A dump of Verilator or of Amaranth's simulator will do. Names of one wire (a port and what it is
connected to) share one code in a dump and are counted once. What is counted are signals of the
design before synthesis: a LUT may swallow some, and glitches are not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_WAVES = ("wire", "reg", "integer", "logic")


@dataclass
class Activity:
    """Toggled bits by module path (relative to the top) over `cycles` cycles of the clock."""

    cycles: int = 0
    toggles: Counter[str] = field(default_factory=Counter)

    def per_cycle(self, path: str = "") -> float:
        """Of the module at `path` with all inside it."""
        inside = (
            count
            for name, count in self.toggles.items()
            if not path or name == path or name.startswith(f"{path}.")
        )
        return sum(inside) / max(1, self.cycles)


def count_toggles(
    lines: Iterable[str], clock: str = "clk", *, begin: int = 0, end: int | None = None
) -> Activity:
    """Count from a VCD's lines, from rising edge `begin` of the clock up to edge `end`.

    clock: the name of a signal of the outermost module that has one. Its own toggles are left out.
    Raises ValueError where there is no such clock or the text is no VCD.
    """
    source = iter(lines)
    owners, clock_code = _declarations(source, clock)
    activity = Activity()
    values: dict[str, str] = {}
    edges = 0
    for line in source:
        code, new = _change(line)
        if code is None:
            continue
        old = values.get(code)
        values[code] = new
        if code == clock_code:
            if new == "1" and old != "1":
                edges += 1
                if edges > begin and (end is None or edges <= end):
                    activity.cycles += 1
                elif end is not None and edges > end:
                    break
            continue
        if old is not None and edges > begin and code in owners:
            activity.toggles[owners[code]] += _differ(old, new)
    return activity


def _declarations(source: Iterator[str], clock: str) -> tuple[dict[str, str], str]:
    """{code: path of the module that owns it}, and the clock's code."""
    owners: dict[str, str] = {}
    scope: list[str] = []
    clock_code, depth = "", 0
    for line in source:
        words = line.split()
        if not words:
            continue
        if words[0] == "$scope":
            scope.append(words[2])
        elif words[0] == "$upscope":
            scope.pop()
        elif words[0] == "$var" and words[1] in _WAVES:
            code, name = words[3], words[4]
            if name == clock and (not clock_code or len(scope) < depth):
                clock_code, depth = code, len(scope)
            owners.setdefault(code, ".".join(scope[1:]))
        elif words[0] == "$enddefinitions":
            break
    else:
        raise ValueError("this is no value change dump")
    if not clock_code:
        raise ValueError(f"the dump has no signal {clock!r}")
    return owners, clock_code


def _change(line: str) -> tuple[str | None, str]:
    line = line.strip()
    if not line or line[0] in "#$":
        return None, ""
    if line[0] in "bB":
        bits, code = line[1:].split()
        return code, bits
    if line[0] in "01xXzZ":
        return line[1:], line[0]
    return None, ""  # reals and strings


def _differ(old: str, new: str) -> int:
    """Bits that differ; a shorter value is filled with zeros (or its leading x)."""
    if old == new:
        return 0
    if set(old) <= {"0", "1"} and set(new) <= {"0", "1"}:
        return (int(old, 2) ^ int(new, 2)).bit_count()
    width = max(len(old), len(new))

    def full(bits: str) -> str:
        return bits.rjust(width, "0" if bits[0] in "01" else bits[0])

    return sum(a != b for a, b in zip(full(old), full(new), strict=True) if a in "01" and b in "01")
