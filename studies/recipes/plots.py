"""The recipe study in one picture: what each change gives, held-out loss along a run, and sizes.

A library of page.py. Rows that several files repeat are taken once.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nomatmul.train.curve import open_pyplot

Row = dict[str, Any]
SIDES = {"MLGRU": "C0", "Transformer++": "C1"}
# recipe: {marker, {side: its variants}}
RECIPES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "today's recipe": ("o", {
        "MLGRU": ("mlgru-S", "mlgru-M", "mlgru-L", "base"),
        "Transformer++": ("transformer-S", "transformer-M", "transformer-L", "twin"),
    }),
    "best recipe without a teacher": ("s", {
        "MLGRU": ("M-dense-30-gains", "dense-30-gains"),
        "Transformer++": ("M-twin-gains", "twin-gains"),
    }),
}  # fmt: skip


def draw(rows: Sequence[Row], changes: Sequence[tuple[str, float, float]], path: Path) -> None:
    """changes: (label, percent against today's recipe, its standard error). Raises ValueError
    where matplotlib is missing."""
    plt = open_pyplot()
    if plt is None:
        raise ValueError("a plot needs matplotlib: pip install matplotlib")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "recipes", "font.size": 8})
    figure, axes = plt.subplots(
        1, 3, figsize=(14, 0.17 * len(changes) + 1.4), width_ratios=(1.5, 1, 1)
    )
    _changes(axes[0], changes)
    _runs(axes[1], rows)
    _sizes(axes[2], rows)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _changes(axis: Any, changes: Sequence[tuple[str, float, float]]) -> None:
    """One change at a time, size S, 40M tokens; bars are two standard errors."""
    ordered = sorted(changes, key=lambda change: -change[1])
    places = range(len(ordered))
    values, errors = [c[1] for c in ordered], [2 * c[2] for c in ordered]
    axis.errorbar(values, places, xerr=errors, fmt="o", markersize=3, linewidth=0.8)
    axis.set_yticks(places, [c[0] for c in ordered], fontsize=6.5)
    axis.axvline(0, color="grey", linewidth=0.6)
    axis.set_xlabel("bits per byte against today's recipe, %: lower is better")
    axis.set_title("S, 40M tokens (bars: two standard errors)", fontsize=8)
    axis.grid(axis="x", alpha=0.3)


def _runs(axis: Any, rows: Sequence[Row]) -> None:
    """Held-out loss of the box's size along its run, on all of the text and on half."""
    for row in rows:
        if row["section"] != "largest" or row["status"] != "ok" or "gains" not in row["variant"]:
            continue
        side = "Transformer++" if row["variant"].startswith("twin") else "MLGRU"
        half = row["variant"].endswith("half")
        points = [(step * row["tokens_per_step"] / 1e6, loss)
                  for step, loss, *_ in row["held_out_curve"]]  # fmt: skip
        label = f"{side}{', half of the text' if half else ''}"
        axis.plot(*zip(*points, strict=True), "--" if half else "-", marker="o", markersize=3,
                  color=SIDES[side], label=label)  # fmt: skip
    axis.set_xlabel("million tokens (38M unique ones, half: 19M)")
    axis.set_ylabel("held-out nats a token, raw and cleaned texts")
    axis.set_title("9 x 640, best recipes: repeated text", fontsize=8)
    axis.legend(fontsize=6.5)
    axis.grid(alpha=0.3)


def _sizes(axis: Any, rows: Sequence[Row]) -> None:
    """Bits per byte against parameters: S to L after 80M tokens, the box's size after 330M."""
    for recipe, (marker, sides) in RECIPES.items():
        for side, variants in sides.items():
            found: dict[tuple[int, int], list[float]] = {}
            for row in rows:
                if row["section"] == "teacher":  # its weights were not rounded
                    continue
                if row["variant"] in variants and row.get("tokens", 0) > 70e6:
                    key = round(row["parameters"], -5), round(row["tokens"], -7)
                    found.setdefault(key, []).append(_bits(row))
            for tokens, style in ((80e6, "-"), (330e6, "")):
                points = sorted((n, statistics.fmean(b)) for (n, t), b in found.items()
                                if t == tokens)  # fmt: skip
                if points:
                    sizes, bits = zip(*points, strict=True)
                    axis.plot([size / 1e6 for size in sizes], bits, style, marker=marker,
                              markersize=4, color=SIDES[side],
                              label=f"{side}, {recipe}" if style else None)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks([], minor=True)
    axis.set_xticks([8.5, 19, 36, 48], ["8.5", "19", "36", "48"])
    axis.set_xlabel("million parameters; 80M tokens, the largest 330M")
    axis.set_ylabel("bits per byte")
    axis.set_title("distance to the twin by size", fontsize=8)
    axis.legend(fontsize=6.5)
    axis.grid(alpha=0.3)


def _bits(row: Row) -> float:
    return statistics.fmean(row[f"bpb_{text}"] for text in ("wikipedia", "novels", "stories"))
