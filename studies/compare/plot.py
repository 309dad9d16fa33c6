"""The plot of a study's section, from its rows: scores, and losses at equal FLOPs and time.

A library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nomatmul.evaluate.compare_report import METRICS, timed
from nomatmul.train.curve import open_pyplot
from studies.compare.summary import Entry


def plot(rows: list[dict[str, Any]], entries: list[Entry], path: Path) -> bool:
    """Score against active neurons, loss against FLOPs and seconds; False without matplotlib."""
    plt = open_pyplot()
    if plt is None:
        return False
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    colours = dict(zip([e.variant for e in entries], _colours(plt, len(entries)), strict=True))
    _plot_scores(axes[0], entries, colours)
    for axis, label, key in (
        (axes[1], "training FLOPs (path only)", "flops"),
        (axes[2], "seconds of training", "seconds"),
    ):
        _plot_curves(axis, rows, entries, colours, key)
        axis.set(xlabel=label, ylabel="held-out loss (nats a token)", xscale="log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[1].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=72)
    plt.close(figure)
    return True


def _colours(plt: Any, count: int) -> list[Any]:
    """Strong colours first, then their pale brothers, then again."""
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return [plt.get_cmap("tab20")(order[n % 20]) for n in range(count)]


def _plot_scores(axis: Any, entries: list[Entry], colours: dict[str, Any]) -> None:
    dense = sorted((e for e in entries if e.kind == "dense"), key=lambda e: e.active)
    axis.errorbar(
        [e.active for e in dense], [e.score for e in dense],
        yerr=[e.error or 0.0 for e in dense], fmt="s-", color="black", ms=5, label="dense",
    )  # fmt: skip
    for entry in entries:
        if entry.kind == "none":
            axis.axhline(entry.score, color="grey", ls=":", label="none")
        if entry.kind != "fff":
            continue
        axis.errorbar(
            [entry.active], [entry.score], yerr=[entry.error or 0.0], fmt="o",
            color=colours[entry.variant], ms=6,
        )  # fmt: skip
        axis.annotate(
            entry.label.removeprefix("FFF "), (entry.active, entry.score),
            textcoords="offset points", xytext=(5, 4), fontsize=7,
        )  # fmt: skip
    axis.set(
        xscale="log",
        xlabel="active neurons of a layer",
        ylabel=f"held-out {METRICS[entries[0].metric]}",
        title="trees (dots) and dense layers (squares)",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def _plot_curves(
    axis: Any,
    rows: list[dict[str, Any]],
    entries: list[Entry],
    colours: dict[str, Any],
    key: str,
) -> None:
    """The first seed's held-out curve of each variant."""
    for entry in entries:
        mine = [
            row
            for row in rows
            if (row["section"], row["variant"], row["status"], row["stage"])
            == (entry.section, entry.variant, "ok", "final")
            and row["tokens"] == entry.tokens
            and row.get("held_out_curve")
            and (key == "flops" or timed(row))
        ]
        if not mine:
            continue
        row = min(mine, key=lambda row: row["seed"])
        step_flops = row["flops_per_token"] * row["tokens"] / row["steps"]
        curve = row["held_out_curve"]
        x = [point[0] * step_flops if key == "flops" else point[2] for point in curve]
        style = "--" if entry.kind == "dense" else ":" if entry.kind == "none" else "-"
        axis.plot(
            x, [p[1] for p in curve], style, color=colours[entry.variant], lw=1.2, label=entry.label
        )
