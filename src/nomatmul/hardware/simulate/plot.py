"""How busy the array was over time, and what it waited for, as a picture."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.files.atomic import check_writable, write_file
from nomatmul.hardware.compile import Compiled
from nomatmul.hardware.registers import COUNTER_HALF, COUNTERS

# Counters that share out every cycle, in the order in which they are stacked, and their colours.
STACKED = {
    "beats": "#2a7f3f",
    "memory": "#c0392b",
    "array": "#8bc34a",
    "vector": "#2e6fb7",
    "scalar": "#7fb3e6",
    "logits": "#e0a030",
    "control": "#999999",
    "token": "#e8e8e8",
}
_WINDOWS = 400


def require_matplotlib() -> None:
    """Raises ValueError, naming what installs it, where matplotlib is missing."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from None


def check_picture(path: Path) -> None:
    """Raises ValueError where no picture can be drawn there."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        endings = ", ".join(f".{kind}" for kind in kinds)
        raise ValueError(f"the picture {path} must end in one of {endings}")
    check_writable(path)


def shares(timeline: Path, windows: int = _WINDOWS) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """(cycle at the end of each window, {counter: share of its cycles}) of a harness's timeline.

    A line holds the cycle, the instruction, and the low half of every counter.
    """
    rows = np.loadtxt(timeline, dtype=np.int64, ndmin=2)
    assert rows.shape[1] == 2 + len(COUNTERS), rows.shape
    counts = rows[:, 2:]
    steps = np.diff(counts, axis=0) % (1 << COUNTER_HALF)  # a low half begins again at 0
    whole = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(steps, axis=0)])
    at = np.unique(np.linspace(0, len(rows) - 1, windows + 1).astype(int))
    parts = np.diff(whole[at], axis=0)
    total = np.maximum(1, sum(parts[:, COUNTERS.index(name)] for name in STACKED))
    found = {name: parts[:, COUNTERS.index(name)] / total for name in STACKED}
    return rows[at[1:], 0], found


def draw(timeline: Path, picture: Path, compiled: Compiled) -> None:
    """Write a picture of `shares`, in the form that its name's ending says."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cycles, found = shares(timeline)
    figure, axes = pyplot.subplots(figsize=(11, 4))
    axes.stackplot(cycles, *found.values(), labels=list(found), colors=list(STACKED.values()))
    design = compiled.design
    axes.set(
        xlabel="cycle",
        ylabel="share of cycles",
        ylim=(0, 1),
        title=f"{design.lanes} lanes, memory of {design.memory_bits} bits: what cycles went to",
    )
    axes.margins(x=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = io.BytesIO()
    kind = picture.suffix.removeprefix(".").lower()
    figure.savefig(drawn, format=kind, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
    write_file(picture, drawn.getvalue())
