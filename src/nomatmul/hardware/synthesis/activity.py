"""Switching activity: how many bits change a cycle, counted in a value change dump (VCD).

A dump of Verilator or of Amaranth's simulator will do. Names of one wire (a port and what it is
connected to) share one code in a dump and are counted once. What is counted are signals of the
design before synthesis: a LUT may swallow some, and glitches are not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

_WAVES = ("wire", "reg", "integer", "logic")


OTHER = "other"


@dataclass
class Activity:
    """Toggled bits by (phase, path of the module from the top on), and cycles by phase."""

    cycles: Counter[str] = field(default_factory=Counter)
    toggles: Counter[tuple[str, str]] = field(default_factory=Counter)

    def per_cycle(self, path: str = "", phase: str | None = None) -> float:
        """Of the module at `path` with all inside it, in the cycles of a phase or in all."""
        inside = (
            count
            for (when, name), count in self.toggles.items()
            if phase in (None, when) and (not path or name == path or name.startswith(f"{path}."))
        )
        cycles = self.cycles.total() if phase is None else self.cycles[phase]
        return sum(inside) / max(1, cycles)


def count_toggles(
    lines: Iterable[str],
    clock: str = "clk",
    *,
    phases: Sequence[str] = (),
    begin: int = 0,
    end: int | None = None,
) -> Activity:
    """Count from a VCD's lines, from rising edge `begin` of the clock up to edge `end`.

    clock: the name of a signal of the outermost module that has one. Its own toggles are left out.
    phases: names of signals of one bit; a cycle belongs to the first that is 1 in it, or to OTHER.
    Raises ValueError where one of them is missing or the text is no VCD.
    """
    source = iter(lines)
    owners, codes = _declarations(source, [clock, *phases])
    clock_code = codes.pop(clock)
    activity = Activity()
    values: dict[str, str] = {}
    pending: Counter[str] = Counter()  # since the last edge
    edges = 0

    def finish() -> None:
        if edges > begin and (end is None or edges <= end):
            phase = next((name for name in phases if values.get(codes[name]) == "1"), OTHER)
            activity.cycles[phase] += 1
            for path, count in pending.items():
                activity.toggles[phase, path] += count
        pending.clear()

    for batch in _moments(source):
        if batch.get(clock_code) == "1" and values.get(clock_code) != "1":
            finish()
            edges += 1
            if end is not None and edges > end:
                return activity
        for code, new in batch.items():
            old = values.get(code)
            values[code] = new
            if old is not None and code in owners and code != clock_code:
                pending[owners[code]] += _differ(old, new)
    finish()
    return activity


def _moments(source: Iterable[str]) -> Iterator[dict[str, str]]:
    """The changes of each moment: those that an edge causes have the edge's own time."""
    batch: dict[str, str] = {}
    for line in source:
        if line.startswith("#"):
            if batch:
                yield batch
            batch = {}
            continue
        code, new = _change(line)
        if code is not None:
            batch[code] = new
    if batch:
        yield batch


def _declarations(
    source: Iterator[str], names: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """{code: path of the module that owns it}, and {name: code}, the outermost of each name."""
    owners: dict[str, str] = {}
    found: dict[str, tuple[int, str]] = {}
    scope: list[str] = []
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
            if name in names and len(scope) < found.get(name, (len(scope) + 1, ""))[0]:
                found[name] = len(scope), code
            owners.setdefault(code, ".".join(scope[1:]))
        elif words[0] == "$enddefinitions":
            break
    else:
        raise ValueError("this is no value change dump")
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"the dump has no signal {', '.join(missing)}")
    return owners, {name: code for name, (_, code) in found.items()}


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
