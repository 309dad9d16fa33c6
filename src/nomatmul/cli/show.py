"""How results reach the terminal: one JSON object, or aligned plain text."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, indented."""
    print(json_text(value, indent=2))


def json_text(value: dict[str, Any], indent: int | None = None) -> str:
    """JSON for standard output: numbers never NaN, plain ASCII where that is not in UTF-8.

    JSON is read as UTF-8 whatever the terminal's encoding is.
    """
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    ascii_only = encoding != "utf-8"
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=ascii_only)


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
