"""Invented texts and dialogues in the forms of the box's: for dry runs.

A library of texts.py and tune.py.
"""

from __future__ import annotations

import bz2
import random
from pathlib import Path

from benchmarks.dry_run import write_texts

_WORDS = ("the", "old", "king", "river", "fox", "was", "happy", "and", "went", "home", "soon")


def write_data(folder: Path, names: list[str]) -> None:
    """NAME.txt.bz2 of each name in `folder`; those of dialogues have turns."""
    write_texts(folder, [name for name in names if not name.startswith("dialogues-")], articles=30)
    draw = random.Random(0)
    for name in [name for name in names if name.startswith("dialogues-")]:
        speakers = ("A", "B") if "self" in name or "topical" in name else ("User", "Assistant")
        parts = []
        for number in range(20):
            lines = [f"{speakers[n % 2]}: {said(draw)}" for n in range(6)]
            before = f"{said(draw)} {number}\n\n" if "storyqa" in name else ""
            parts.append(before + "\n".join(lines))
        path = folder / f"{name}.txt.bz2"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bz2.compress("\n<|endoftext|>\n".join(parts).encode()))


def said(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=7)).capitalize() + "."
