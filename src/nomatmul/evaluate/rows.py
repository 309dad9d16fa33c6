"""Measured rows on disk: one JSON object a line, written as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

_VARIANT = re.compile(r"((?:fff|gated)-\d+x)(\d+)(.*)")
_LABEL = re.compile(r"\b(FFF|masked) (\d+) x (\d+)")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line; several processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, [] if it is absent; a line that was cut is left out.

    Trees of old rows get their names of today, see `by_depth`.
    """
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(by_depth(json.loads(line)))
    return rows


def by_depth(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its trees named trees x depth.

    Old rows named them trees x levels, one more: "fff-16x7", "FFF 16 x 7" are fff-16x6, FFF 16x6
    now. Their labels have spaces, those of fine-tuning had none at all. `renamed_from` keeps the
    variant's name as it stands in the file.
    """
    labels: dict[str, Any] = {key: row[key] for key in ("label", "layer") if key in row}
    new: dict[str, Any] = {key: _LABEL.sub(_label_by_depth, text) for key, text in labels.items()}
    variant = _VARIANT.fullmatch(row.get("variant", ""))
    if variant and (not labels or new != labels):
        name = f"{variant[1]}{int(variant[2]) - 1}{variant[3]}"
        new |= {"variant": name, "renamed_from": row["variant"]}
    return {**row, **new}


def _label_by_depth(found: re.Match[str]) -> str:
    return f"{found[1]} {found[2]}x{int(found[3]) - 1}"


def renamed(rows: list[dict[str, Any]]) -> str:
    """One sentence on the variants that `by_depth` renamed, "" where there are none."""
    pairs = {row["renamed_from"]: row["variant"] for row in rows if "renamed_from" in row}
    names = ", ".join(f"{old} is {new} now" for old, new in sorted(pairs.items()))
    return f"rows of an older version named trees by levels, not by depth: {names}" if names else ""
