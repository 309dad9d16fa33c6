"""docs/fff.md: what fast feedforward layers give and cost, made from the study's rows.

    python studies/fff/run.py report --out benchmarks/results/DATE-DEVICE

Reads fff-study-rows.jsonl, fff-study-glue.jsonl and fff-study-machine.json in OUT; writes the page
and, beside the rows, a plot a section. Numbers and verdicts come from the rows; the words between
them are here.

A library of run.py.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import ROOT, describe
from nomatmul.evaluate.compare_report import plot_name, table, with_error
from nomatmul.evaluate.rows import read_rows
from studies.compare.plot import plot
from studies.compare.summary import Entry, summarise
from studies.fff import verdicts, words
from studies.fff.glue import BATCH, RATE, TASKS

TITLES = {
    "causal": "Causal language model, attention, dense weights",
    "encoder": "Encoder, masked language modelling",
    "union": "The union: MatMul-free LM (MLGRU, ternary) with ternary trees",
    "ternary": "Ternary weights with attention: first runs",
}
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
    for section in (*TITLES, "mlm"):
        for entry in summarise(rows, section):
            print(f"{section:7} {entry.label:34} {entry.active:5} {with_error(entry)}")
    for line in glue_table(glue, {}):
        print(line)


def score_table(entries: list[Entry]) -> list[str]:
    """One line a variant, best first: the question of the page."""
    whole = next((e for e in entries if e.variant == "dense"), None)
    rows = []
    for e in entries:
        gap = None
        if whole is not None and e is not whole:
            gap = f"{round(e.score - whole.score, 3) + 0.0:+.3f}"
        worth = None if math.isnan(e.worth) else f"{e.worth:.0f}"
        share = None if whole is None else f"{e.flops_per_token / whole.flops_per_token:.2f}"
        rows.append([e.label, e.neurons, e.active, len(e.values), with_error(e), gap, worth, share])
    metric = "bits per byte" if entries and entries[0].metric == "bpb" else "masked loss, nats"
    header = ["channel mixer", "neurons", "active", "seeds", metric, "minus whole", "worth"]
    return table([*header, "FLOPs"], rows)


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
        [section, label, ", ".join(f"{rate:g}: {s:.4f}" for rate, s in sorted(tried.items()))]
        for (section, label), tried in sorted(found.items())
    ]
    return table(["section", "channel mixer", "rate: score"], lines) if lines else []


def glue_table(glue: list[dict[str, Any]], losses: dict[str, float]) -> list[str]:
    """Median of the fine-tuning seeds, lowest and highest; a line a pre-trained variant."""
    variants = list(dict.fromkeys(row["variant"] for row in glue))
    lines = []
    for variant in sorted(variants, key=lambda v: losses.get(v, math.inf)):
        cells: list[Any] = [words.name_of(variant)]
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


def glue_section(glue: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    if not glue:
        return []
    losses = {entry.variant: entry.score for entry in summarise(rows, "encoder")}
    epochs = ", ".join(f"{count} for {task}" for task, count, _ in TASKS.values())
    return [
        "## GLUE", "",
        f"The encoders of the table above, fine-tuned (epochs: {epochs}; batch {BATCH}, peak rate "
        f"{RATE:g}, no search), scored on the development sets; median (lowest to highest) over "
        "the seeds of fine-tuning and of pre-training. x 100.", "",
        *glue_table(glue, losses), "", *[f"- {text}" for text in verdicts.glue_verdict(glue)], "",
    ]  # fmt: skip


def section(name: str, rows: list[dict[str, Any]], out: Path, page: Path) -> list[str]:
    """One study of the three: what was trained, the tables, the verdicts, the plot."""
    entries = summarise(rows, name)
    if not entries:
        return []
    file = out / f"fff-{plot_name(name).removeprefix('compare-')}"
    plot(rows, entries, file)
    picture = os.path.relpath(file, page.parent)
    return [
        f"## {TITLES[name]}", "", words.setting(name, entries), "",
        *score_table(entries), "",
        *[f"- {line}" for line in verdicts.verdicts(entries) + verdicts.cut_short(name, rows)], "",
        f"![{TITLES[name]}]({picture})", "",
        "<details><summary>At equal FLOPs and equal time</summary>", "",
        *budget_table(entries), "", words.BUDGETS, "", "</details>", "",
    ]  # fmt: skip


def plateau_section(rows: list[dict[str, Any]]) -> list[str]:
    """The first try of the encoders, which says nothing about layers."""
    found = [r for r in rows if (r["section"], r["status"]) == ("mlm", "ok")]
    if not found:
        return []
    lines = [[r["label"], r["seed"], r["steps"], f"{r['loss']:.3f}"] for r in found]
    return [
        "## A try that says nothing", "", words.PLATEAU, "",
        *table(["channel mixer", "seed", "steps", "masked loss"], lines), "",
    ]  # fmt: skip


def ship_section(rows: list[dict[str, Any]]) -> list[str]:
    """The longer pair of union models."""
    found = [r for r in rows if r["stage"] == "ship" and r["status"] == "ok"]
    if len(found) < 2:
        return []
    lines = [
        [
            r["label"], r["active"], f"{r['parameters'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.0f}M",
            f"{r['bpb_wikipedia']:.4f}", f"{r['bpb_novels']:.4f}", f"{r['bpb']:.4f}",
            f"{r['seconds']:.0f}",
        ]
        for r in found
    ]  # fmt: skip
    header = ["channel mixer", "active", "parameters", "tokens", "Wikipedia", "novels", "both"]
    return [
        "### Trained longer", "",
        "The union at the shape that the rule picks (fewest active neurons within 0.02 bits of the "
        "best, at equal parameters) and its GLU twin on equal tokens, one run each; held-out bits "
        "per byte before packing.", "",
        *table([*header, "seconds"], lines), "",
    ]  # fmt: skip


def write(out: Path, page: Path) -> None:
    """The page and the plots."""
    rows, glue, about = load(out)
    entries = {name: summarise(rows, name) for name in TITLES}
    lines = ["# Fast feedforward layers: what they give, what they cost", ""]
    lines += [words.INTRODUCTION, ""]
    lines += verdicts.summary(entries, glue, rows)
    lines += ["## How it was measured", "", words.METHOD, ""]
    if about:
        lines += [f"Machine: {describe(about)}. Rows: `{_relative(out, page)}`.", ""]
    for name in TITLES:
        lines += section(name, rows, out, page)
        if name == "encoder":
            lines += glue_section(glue, rows)
        if name == "union":
            lines += ship_section(rows)
    lines += plateau_section(rows)
    if rates := rate_table(rows):
        lines += ["## Is one rate for all fair?", "", words.RATES, "", *rates, ""]
    lines += ["## What was not measured", "", words.NOT_MEASURED, ""]
    lines += ["## Speed", "", words.SPEED, "", *speed_links(page), ""]
    page.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def speed_links(page: Path) -> list[str]:
    """The newest table of each kind, or the script that makes one."""
    lines = []
    for what, pattern, script in words.TABLES:
        found = sorted((ROOT / "benchmarks/results").rglob(pattern))
        target = found[-1] if found else ROOT / "benchmarks" / script
        lines.append(f"- {what}: [{target.name}]({os.path.relpath(target, page.parent)})")
    return lines


def _relative(out: Path, page: Path) -> str:
    return os.path.relpath(out / "fff-study-rows.jsonl", page.parent)
