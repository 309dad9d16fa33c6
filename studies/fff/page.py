"""Tables of studies/fff/page.md and a plot a section, made from the study's rows.

    python studies/fff/run.py report --out benchmarks/results/DATE-DEVICE

Reads fff-study-rows.jsonl, fff-study-glue.jsonl and fff-study-machine.json in OUT. The words of the
page are written by hand.

A library of run.py.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu_common import describe
from nomatmul.evaluate.compare_report import plot_name, table, with_error
from nomatmul.evaluate.rows import read_rows
from studies.compare.plot import plot
from studies.compare.summary import Entry, difference, summarise
from studies.fff.glue import TASKS, name_of

PAGE = Path(__file__).with_name("page.md")
SECTIONS = ("causal", "encoder", "union", "ternary")
# Runs of these commits shared each GPU with three to five others of all kinds: their seconds say
# nothing.
CROWDED = {"25229b0"}


def load(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Rows of the study, rows of fine-tuning, the machine."""
    machines = [json.loads(file.read_text()) for file in sorted(out.glob("fff-study-machine*"))]
    about = {**machines[0], "commit": ", ".join(m["commit"] for m in machines)} if machines else {}
    # Rows of the first try fine-tuned encoders that had learnt nothing but frequencies.
    glue = [r for r in read_rows(out / "fff-study-glue.jsonl") if r.get("of") == "encoder"]
    rows = read_rows(out / "fff-study-rows.jsonl")
    return [{**row, "timed": row["commit"] not in CROWDED} for row in rows], glue, about


def short_table(out: Path) -> None:
    """Scores in a few lines, for the end of a log."""
    rows, glue, _ = load(out)
    for section in (*SECTIONS, "mlm"):
        for entry in summarise(rows, section):
            print(f"{section:7} {entry.label:34} {entry.active:5} {with_error(entry)}")
    for line in glue_table(glue, {}):
        print(line)


def minus(entry: Entry, other: Entry | None) -> str | None:
    """The difference of two scores, with its standard error where one is known."""
    if other is None or entry is other:
        return None
    gap, error = difference(entry, other)
    return f"{round(gap, 3) + 0.0:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def score_table(entries: list[Entry]) -> list[str]:
    """One line a variant, best first: the question of the page."""
    if not entries:
        return []
    by_name = {e.variant: e for e in entries}
    whole = by_name.get("dense")
    rows = []
    for e in entries:
        control = by_name.get(e.control) if e.kind == "fff" else None
        worth = None if math.isnan(e.worth) else f"{e.worth:.0f}"
        share = None if whole is None else f"{e.flops_per_token / whole.flops_per_token:.2f}"
        gaps = [minus(e, other) for other in (whole, control, by_name.get("none"))]
        score = with_error(e)
        rows.append([e.label, e.neurons, e.active, len(e.values), score, *gaps, worth, share])
    metric = "bits per byte" if entries[0].metric == "bpb" else "masked loss, nats"
    header = ["channel mixer", "neurons", "active", "seeds", metric, "minus whole"]
    return table([*header, "minus dense of active width", "minus none", "worth", "FLOPs"], rows)


def budget_table(entries: list[Entry]) -> list[str]:
    """The same runs at equal tokens, FLOPs and time, in nats a token."""
    rows = [
        [
            e.label,
            f"{e.at_flops:.3f}" if not math.isnan(e.at_flops) else None,
            f"{e.at_seconds:.3f}" if not math.isnan(e.at_seconds) else None,
            f"{e.flops_per_token / 1e6:.0f}", f"{e.flops_masked_per_token / 1e6:.0f}",
            f"{e.tokens_per_second:,.0f}" if not math.isnan(e.tokens_per_second) else None,
        ]
        for e in entries
    ]  # fmt: skip
    header = ["channel mixer", "loss at equal FLOPs", "loss at equal time", "MFLOPs a token"]
    return table([*header, "as executed (masked)", "tokens/s in training"], rows)


def rate_table(rows: list[dict[str, Any]]) -> list[str]:
    """Short runs at half, once and twice the section's rate."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if row["stage"] == "rate" and row["status"] == "ok":
            score = row.get("bpb", row["loss"])
            found.setdefault((row["section"], row["label"]), {})[row["learning_rate"]] = score
    lines = [
        [
            section,
            label,
            ", ".join(f"{rate:g}: {s:.4f}" for rate, s in sorted(tried.items())),
        ]
        for (section, label), tried in sorted(found.items())
    ]
    return table(["section", "channel mixer", "rate: score"], lines) if lines else []


def glue_table(glue: list[dict[str, Any]], losses: dict[str, float]) -> list[str]:
    """Median of the fine-tuning seeds, lowest and highest; a line a pre-trained variant."""
    variants = list(dict.fromkeys(row["variant"] for row in glue))
    lines = []
    for variant in sorted(variants, key=lambda v: losses.get(v, math.inf)):
        cells: list[Any] = [name_of(variant)]
        cells.append(f"{losses[variant]:.3f}" if variant in losses else None)
        for task, _, _ in TASKS.values():
            scores = [r["score"] for r in glue if (r["variant"], r["task"]) == (variant, task)]
            cells.append(_median(scores))
        lines.append(cells)
    header = ["channel mixer", "masked loss"]
    header += [f"{task} ({metric})" for task, _, metric in TASKS.values()]
    return table(header, lines) if lines else []


def _median(scores: list[float]) -> str | None:
    if not scores:
        return None
    low, high = min(scores) * 100, max(scores) * 100
    if len(scores) == 1:
        return f"{low:.1f} (1 run)"
    return f"{statistics.median(scores) * 100:.1f} ({low:.1f} to {high:.1f}, {len(scores)} runs)"


def plateau_table(rows: list[dict[str, Any]]) -> list[str]:
    """The first try of the encoders, which says nothing about layers."""
    found = [r for r in rows if (r["section"], r["status"]) == ("mlm", "ok")]
    lines = [[r["label"], r["seed"], r["steps"], f"{r['loss']:.3f}"] for r in found]
    return table(["channel mixer", "seed", "steps", "masked loss"], lines) if lines else []


def ship_table(rows: list[dict[str, Any]]) -> list[str]:
    """The longer pair of union models."""
    lines = [
        [
            r["label"], r["active"], f"{r['parameters'] / 1e6:.2f}M",
            f"{r['tokens'] / 1e6:.0f}M", f"{r['bpb_wikipedia']:.4f}", f"{r['bpb_novels']:.4f}",
            f"{r['bpb']:.4f}", f"{r['seconds']:.0f}",
        ]
        for r in rows
        if (r["stage"], r["status"]) == ("ship", "ok")
    ]  # fmt: skip
    header = ["channel mixer", "active", "parameters", "tokens", "Wikipedia", "novels", "both"]
    return table([*header, "seconds"], lines) if len(lines) > 1 else []  # one has no twin


def all_tables(out: Path) -> dict[str, list[str]]:
    """Every block of the page, from the rows in `out`."""
    rows, glue, about = load(out)
    found = {"machine": [describe(about)] if about else [], "rates": rate_table(rows)}
    for name in SECTIONS:
        entries = summarise(rows, name)
        found[name] = score_table(entries)
        found[f"{name}, equal budgets"] = budget_table(entries) if entries else []
    losses = {entry.variant: entry.score for entry in summarise(rows, "encoder")}
    found |= {"GLUE": glue_table(glue, losses), "plateau": plateau_table(rows)}
    return found | {"trained longer": ship_table(rows)}


def write(out: Path, page: Path) -> None:
    """The page's tables, and the plots beside the rows."""
    rows, _, _ = load(out)
    for name in SECTIONS:
        if entries := summarise(rows, name):
            plot(rows, entries, out / f"fff-{plot_name(name).removeprefix('compare-')}")
    tables.fill(page, all_tables(out))
