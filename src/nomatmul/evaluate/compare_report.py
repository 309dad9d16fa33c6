"""A comparison in words, as a table and as a plot, made from its rows.

Nothing here needs torch; the plot needs matplotlib and is left out where that is not installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nomatmul.evaluate.compare_summary import Entry, difference, sections, summarise, timed
from nomatmul.evaluate.rows import read_rows
from nomatmul.train.curve import open_pyplot

METRICS = {"bpb": "bits per byte", "loss": "loss (nats a guessed token)"}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; None and NaN become a dash."""

    def show(cell: Any) -> str:
        empty = cell is None or (isinstance(cell, float) and math.isnan(cell))
        return "-" if empty else str(cell)

    return [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(" --- " for _ in header) + "|",
        *("| " + " | ".join(map(show, row)) + " |" for row in rows),
    ]


def with_error(entry: Entry) -> str:
    """The score with its standard error, as far as one is known."""
    error = "" if entry.error is None else f" ± {entry.error:.4f}"
    return f"{entry.score:.4f}{error}" + (" (1 seed)" if len(entry.values) == 1 else "")


def summary_table(entries: list[Entry]) -> list[str]:
    """One line a variant, best first."""
    if not entries:
        return ["No run has ended yet."]
    whole = next((e for e in entries if e.variant == "dense"), None)
    rows = []
    for e in entries:
        gap = "" if whole is None or e is whole else f"{e.score - whole.score:+.4f}"
        rows.append(
            [
                e.label, e.neurons, e.active, f"{e.parameters / 1e6:.2f}M", len(e.values),
                with_error(e), gap or None,
                None if math.isnan(e.worth) else f"{e.worth:.0f}",
                _fixed(e.at_flops), _fixed(e.at_seconds),
                f"{e.flops_per_token / 1e6:.0f}", f"{e.flops_masked_per_token / 1e6:.0f}",
                None if math.isnan(e.tokens_per_second) else f"{e.tokens_per_second:,.0f}",
            ]
        )  # fmt: skip
    metric = METRICS[entries[0].metric]
    header = [
        "channel mixer", "neurons", "active", "parameters", "seeds", metric, "minus whole layer",
        "worth (dense neurons)", "loss at equal FLOPs", "loss at equal time",
        "MFLOPs a token", "as masked", "tokens/s",
    ]  # fmt: skip
    return table(header, rows)


def _fixed(value: float) -> str | None:
    return None if math.isnan(value) else f"{value:.4f}"


NOTES = """\
- *active*: neurons on a token's path in one layer, which conditional inference computes; *neurons*:
  all that a layer has; a gated neuron of a GLU has three rows of weights and counts as 1.5.
  Levels count neurons on a path: FFF 16 x 7 is 16 trees of 7 levels.
- *worth*: the width of the dense layer that would score the same, read from the dense controls of
  this table; a dash where the score lies outside of them.
- ± is one standard error of the mean over seeds; the seeds' spread is pooled over all variants of
  the table.
- *loss at equal FLOPs* and *at equal time*: held-out nats a token at the point of each curve where
  it had used as much as the cheapest variant did in all. There the learning rate of the dearer ones
  had not yet come down, so these two columns flatter the cheap ones. FLOPs count the path only.
- *MFLOPs a token*: of a training step, multiply-adds x 6, the path only; *as masked*: if all nodes
  are computed, as the reference form does.
"""


def verdicts(entries: list[Entry]) -> list[str]:
    """What the numbers allow to say about trees, one sentence a line, and no more."""
    by_name = {entry.variant: entry for entry in entries}
    lines = []
    for entry in entries:
        if entry.kind != "fff":
            continue
        for name, words in (
            (entry.control, f"a dense layer of its active width, {entry.active}"),
            ("none", "no channel mixer"),
            ("dense", "the whole layer"),
        ):
            other = by_name.get(name)
            if other is not None:
                lines.append(f"{entry.label} against {words}: {compared(entry, other)}.")
    return lines


def compared(a: Entry, b: Entry) -> str:
    """a minus b in words, with the error where seeds give one."""
    gap, error = difference(a, b)
    unit = "bits per byte" if a.metric == "bpb" else "nats"
    side = "better" if gap < 0 else "worse"
    if error is None:
        return f"{abs(gap):.4f} {unit} {side} (single seeds: no error known)"
    clear = "" if abs(gap) > 2 * error else ", within twice the error of the seeds: no difference"
    return f"{abs(gap):.4f} ± {error:.4f} {unit} {side}{clear}"


def page(rows: list[dict[str, Any]], title: str, about: str) -> list[str]:
    """The report as Markdown lines."""
    lines = [f"# {title}", "", about, ""]
    for section in sections(rows):
        entries = summarise(rows, section)
        if not entries:
            continue
        lines += [f"## {section}", "", _setting(entries), "", *summary_table(entries), ""]
        lines += [f"- {text}" for text in verdicts(entries)]
        if failed := [e for e in entries if e.diverged]:
            lines += [f"- {e.label}: {e.diverged} more runs diverged." for e in failed]
        lines += ["", f"![{section}]({plot_name(section)})", ""]
    return [*lines, "How to read it:", "", NOTES.rstrip()]


def _setting(entries: list[Entry]) -> str:
    rates = sorted({e.learning_rate for e in entries})
    shown = ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"{entries[0].tokens / 1e6:.2f}M tokens each, learning rate {shown} for all; only the "
        "channel mixer differs; a seed draws the same order of the tokens for all."
    )


def plot_name(section: str) -> str:
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in section)
    return f"compare-{safe}.png"


def write_report(out: Path, title: str = "Comparison", about: str = "") -> dict[str, Any]:
    """report.md, table.md, summary.json and a plot a section in `out`, from its rows.jsonl."""
    rows = read_rows(out / "rows.jsonl")
    names = sections(rows)
    document: dict[str, Any] = {"sections": {}}
    tables: list[str] = []
    for name in names:
        entries = summarise(rows, name)
        document["sections"][name] = [as_json(entry) for entry in entries]
        tables += [f"## {name}", "", *summary_table(entries), ""]
        if entries:
            plot(rows, entries, out / plot_name(name))
    (out / "table.md").write_text("\n".join(tables) + "\n", "utf-8")
    (out / "report.md").write_text("\n".join(page(rows, title, about)) + "\n", "utf-8")
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry as plain values; NaN, which JSON does not know, becomes null."""
    values = {k: getattr(entry, k) for k in entry.__dataclass_fields__}
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


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
    figure.savefig(path, dpi=110)
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
