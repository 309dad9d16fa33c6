"""OUT/curve.png: the losses of a run as a picture, where matplotlib is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nomatmul.train.metrics import read_metrics

CURVE_FILE = "curve.png"
_POINTS = 200  # of the training curve: means over so many equal parts of the run


def open_pyplot() -> Any:
    """matplotlib.pyplot that needs no display; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def training_curve(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(step, mean loss) over equal parts of the run."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    size = -(-len(losses) // _POINTS)
    parts = [losses[first : first + size] for first in range(0, len(losses), max(size, 1))]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def draw_curve(out: Path) -> Path | None:
    """Draw what OUT/metrics.jsonl holds; the picture's path, None without matplotlib or rows."""
    rows = read_metrics(out)
    train = training_curve(rows)
    held = [(row["step"], row["valid_loss"]) for row in rows if "valid_loss" in row]
    plt = open_pyplot() if train else None
    if plt is None:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axis.plot(*zip(*train, strict=True), lw=1.2, label="training")
    if held:
        axis.plot(*zip(*held, strict=True), "o-", ms=4, label="held out")
    axis.set(xlabel="step", ylabel="loss (nats a predicted token)", title=out.name)
    axis.grid(alpha=0.3)
    axis.legend()
    path = out / CURVE_FILE
    temporary = path.with_name(f".{CURVE_FILE}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path
