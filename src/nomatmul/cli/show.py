"""How results reach the terminal: one JSON object, or aligned plain text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, indented, numbers never NaN (that is not JSON)."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> None:
    """Columns aligned on their widest cell: the first to the left, the others to the right."""
    lines = [list(header)] if header else []
    lines += [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def hide_progress_bars() -> None:
    """Keep transformers from drawing its own bars into our output (call before its import)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def size(count: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point: `15.2 MB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count:.0f} B"
