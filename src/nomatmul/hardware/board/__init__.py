"""What stands between the accelerator and a board: memory controllers, host links, top levels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


def write_verilog(
    design: Design,
    out: Path,
    board: str,
    on_chip: str | Path | None = None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write Verilog, constraints and a README of how to build them into the directory `out`.

    on_chip: a compiled model whose image lies in block RAM, for the board `core`; its design
    counts then. note: told what goes on when it takes time. Returns a summary for JSON. Raises
    ValueError for an unknown board, a design that the board cannot hold, and tools that are
    missing.
    """
    from nomatmul.hardware.board.write import write

    return write(design, Path(out), board, on_chip, note=note)
