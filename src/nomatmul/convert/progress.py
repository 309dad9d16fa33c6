"""How far a conversion is: what is called as it goes on, and a line of a terminal that shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, name of a tensor); the name is empty when all is done."""


def silent(done: int, total: int, name: str) -> None:
    """Progress that nobody watches."""


def line(verb: str) -> Progress:
    """Progress on one line of stderr, which is blank in the end: "packing 3/120 head.weight"."""

    def show(done: int, total: int, name: str) -> None:
        text = f"{verb} {done}/{total} {name}" if name else ""
        print(f"\r{text:70.70}", end="" if name else "\r", file=sys.stderr, flush=True)

    return show
