"""What the recipe study trains: cells in the order of their value (plan.md says why).

A library of run.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies.recipes import enough, first, fourth, largest, second, third
from studies.recipes.cells import Amount, build
from studies.recipes.change import ChangedCell

PARTS = {
    **first.PARTS, **second.PARTS, **third.PARTS, **fourth.PARTS, **largest.PARTS, **enough.PARTS,
}  # fmt: skip


def plan(
    amount: Amount, work: Path, rows: Path, parts: list[str], **values: Any
) -> list[ChangedCell]:
    """All cells of these parts, in order. values: further fields of every cell."""
    return [
        build(entry, amount, work, rows, **values)
        for name in parts
        for entry in PARTS[name](amount)
    ]
