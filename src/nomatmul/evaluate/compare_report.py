"""What the rows of a comparison say: means over seeds with their errors, as a table and a plot.

Nothing here needs torch; the plot needs matplotlib and is left out where that is not installed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nomatmul.evaluate.rows import read_rows, renamed
from nomatmul.train.curve import open_pyplot

METRICS = {"bpb": "bits per byte", "loss": "loss (nats a guessed token)"}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant of a section, all its finished seeds together.

    score: held-out bits per byte of a causal model, nats a guessed token of an encoder; lower is
    better. error: standard error of the mean, from the spread of seeds pooled over all variants of
    the section (two seeds of one variant alone would give a very rough one); None if no variant has
    two. tokens_per_second: nan where no run had its device for itself.
    """

    section: str
    variant: str
    label: str
    metric: str
    score: float
    error: float | None
    values: tuple[float, ...]
    tokens: int
    parameters: int
    neurons: int
    active: int
    flops_per_token: float
    flops_masked_per_token: float
    tokens_per_second: float
    learning_rate: float
    diverged: int = 0

    @property
    def kind(self) -> str:
        """dense (a control of some width, gated or not), none or fff (trees of either neurons)."""
        first = self.variant.split("-")[0]
        return {"glu": "dense", "gated": "fff"}.get(first, first)


def of_section(rows: Sequence[Row], section: str, stage: str = "final") -> list[Row]:
    """The rows of one section whose length most runs have (the longer one of two).

    Short trials must not mix with the study.
    """
    mine = [r for r in rows if (r["section"], r["stage"]) == (section, stage)]
    lengths = [r["steps_planned"] for r in mine if r["status"] == "ok"]
    usual = max(set(lengths), key=lambda n: (lengths.count(n), n)) if lengths else 0
    return [r for r in mine if r["steps_planned"] == usual]


def summarise(rows: Sequence[Row], section: str, stage: str = "final") -> list[Entry]:
    """The entries of one section, best score first."""
    rows, entries = of_section(rows, section, stage), []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        if done := [row for row in mine if row["status"] == "ok"]:
            entries.append(_entry(done, sum(row["status"] == "diverged" for row in mine)))
    return sorted(_with_errors(entries), key=lambda entry: entry.score)


def timed(row: Row) -> bool:
    """Do the seconds of this run compare with others'? Not if it shared its device with more."""
    return bool(row.get("timed", True))


def _entry(rows: Sequence[Row], diverged: int) -> Entry:
    first = rows[0]
    metric = "bpb" if "bpb" in first else "loss"
    # The same seed twice (other kernels, another machine) is one seed.
    values = list({row["seed"]: float(row[metric]) for row in rows}.values())
    speeds = [row["tokens_per_second"] for row in rows if timed(row)]
    measured = {"metric", "score", "error", "values", "tokens_per_second", "diverged"}
    names = {field.name for field in dataclasses.fields(Entry)} - measured
    return Entry(
        metric=metric,
        score=statistics.fmean(values),
        error=None,
        values=tuple(values),
        tokens_per_second=statistics.fmean(speeds) if speeds else math.nan,
        diverged=diverged,
        **{name: first[name] for name in names},
    )


def _with_errors(entries: list[Entry]) -> list[Entry]:
    """The entries with their standard errors: the seeds' pooled deviation over sqrt(seeds)."""
    degrees = sum(len(e.values) - 1 for e in entries)
    if not degrees:
        return entries
    several = [e.values for e in entries if len(e.values) > 1]
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    deviation = math.sqrt(squares / degrees)
    return [dataclasses.replace(e, error=deviation / math.sqrt(len(e.values))) for e in entries]


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


def summary_table(entries: Sequence[Entry]) -> list[str]:
    """One line a variant, best first."""
    whole = next((e for e in entries if e.variant == "dense"), None)
    rows = [
        [
            e.label, e.neurons, e.active, f"{e.parameters / 1e6:.2f}M", len(e.values),
            e.diverged or None, with_error(e),
            None if whole is None or e is whole else f"{e.score - whole.score:+.4f}",
            f"{e.flops_per_token / 1e6:.0f}", f"{e.flops_masked_per_token / 1e6:.0f}",
            None if math.isnan(e.tokens_per_second) else f"{e.tokens_per_second:,.0f}",
        ]
        for e in entries
    ]  # fmt: skip
    header = [
        "channel mixer", "neurons", "active", "parameters", "seeds", "diverged",
        METRICS[entries[0].metric], "minus whole layer", "MFLOPs a token", "as masked", "tokens/s",
    ]  # fmt: skip
    return table(header, rows)


def write_report(out: Path, title: str = "Comparison", about: str = "") -> dict[str, Any]:
    """report.md, summary.json and a plot a section in `out`, from its rows.jsonl."""
    rows = read_rows(out / "rows.jsonl")
    document: dict[str, Any] = {"sections": {}}
    lines = [f"# {title}", "", about, ""]
    if words := renamed(rows):
        lines += [f"The {words}.", ""]
    for name in dict.fromkeys(row["section"] for row in rows):
        entries = summarise(rows, name)
        document["sections"][name] = [as_json(entry) for entry in entries]
        if entries:
            lines += [f"## {name}, {entries[0].tokens / 1e6:.2f}M tokens each", ""]
            lines += [*summary_table(entries), ""]
            if plot(of_section(rows, name), entries, out / plot_name(name)):
                lines += [f"![{name}]({plot_name(name)})", ""]
    (out / "report.md").write_text("\n".join(lines), "utf-8")
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry as plain values; NaN, which JSON does not know, becomes null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in vars(entry).items()
    }


def plot_name(section: str) -> str:
    return f"compare-{''.join(c if c.isalnum() or c in '-_' else '-' for c in section)}.png"


def plot(rows: Sequence[Row], entries: Sequence[Entry], path: Path) -> bool:
    """Score against active neurons, held-out loss against FLOPs; False without matplotlib."""
    plt = open_pyplot()
    if plt is None:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for place, entry in enumerate(entries):
        colour = plt.get_cmap("tab20")(place % 20)
        mark = {"dense": "s", "fff": "o"}.get(entry.kind, "x")
        left.errorbar(
            [entry.active], [entry.score], yerr=[entry.error or 0.0], fmt=mark, color=colour
        )
        mine = [r for r in rows if (r["variant"], r["status"]) == (entry.variant, "ok")]
        row = min(mine, key=lambda row: row["seed"])
        step = row["flops_per_token"] * row["tokens"] / row["steps"]
        x = [point[0] * step for point in row["held_out_curve"]]
        losses = [point[1] for point in row["held_out_curve"]]
        right.plot(x, losses, f"{mark}-", ms=3, lw=1, color=colour, label=entry.label)
    metric = METRICS[entries[0].metric]
    left.set(xscale="symlog", xlabel="active neurons of a layer", ylabel=f"held-out {metric}")
    right.set(xscale="log", xlabel="training FLOPs (path only)", ylabel="held-out loss (nats)")
    right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
