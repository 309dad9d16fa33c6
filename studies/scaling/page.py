"""Tables and plots of the scaling study, made from its rows; page.md has the words.

A library of run.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_common import describe
from benchmarks.tables import fill
from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows
from studies.scaling.fit import UNIT, fit_curve, fit_power, gaps, kernels, summarise

NAMES = {"mlgru": "MatMul-free LM", "transformer": "Transformer++"}
TEXTS = {"bpb": "both texts", "bpb_wikipedia": "Wikipedia", "bpb_novels": "novels"}
PAGE = Path(__file__).with_name("page.md")


def plot(entries: list[dict[str, Any]], fits: dict[str, Any], axis: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for arch, colour in (("mlgru", "tab:blue"), ("transformer", "tab:orange")):
        mine = [e for e in entries if e["arch"] == arch]
        if not mine:
            continue
        for entry in mine:
            axes.plot([entry[axis]] * entry["runs"], entry["values"], "_", color=colour, ms=9)
        x = [e[axis] for e in mine]
        axes.plot(x, [e["mean"] for e in mine], "o", color=colour, label=NAMES[arch])
        curve = fits[arch][axis]
        curve = curve["floor"] if curve["floor"]["determined"] else curve["power"]
        if "A" in curve:
            line = np.geomspace(min(x), max(x), 100)
            scaled = curve["A"] * (line / curve["unit"]) ** -curve["alpha"]
            axes.plot(line, curve.get("E", 0.0) + scaled, "-", color=colour, lw=1)
    label = "non-embedding parameters" if axis == "non_embedding" else "training FLOPs"
    axes.set(xscale="log", xlabel=label, ylabel="held-out bits per byte")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def all_tables(document: dict[str, Any]) -> dict[str, list[str]]:
    """The blocks of the page."""
    machine = document["machine"]
    about = [[describe(one)] for one in [*machine.get("earlier", []), machine]]
    return {
        "scaling": score_table(document),
        "scaling, gaps": gap_table(document),
        "scaling, curves": curve_table(document["fits"]),
        "scaling, again": again_table(document["again"]),
        "scaling, rates": tuning(document["tuning"]),
        "scaling, machines": table(["machine"], about),
    }


def score_table(document: dict[str, Any]) -> list[str]:
    """Mean of the final runs of each architecture and size."""
    rows, texts = [], document["texts"]
    for entry in document["entries"]:
        rows.append(
            [
                NAMES[entry["arch"]], entry["size"], f"{entry['non_embedding'] / 1e6:.2f}M",
                f"{entry['learning_rate']:.2g}", f"{entry['tokens'] / 1e6:.1f}M", entry["runs"],
                f"{entry['mean']:.4f}", None if entry["sd"] is None else f"{entry['sd']:.4f}",
                *(f"{texts[key][entry['arch']][entry['size']]:.4f}" for key in texts),
                ", ".join(entry["kernels"]),
            ]
        )  # fmt: skip
    header = ["architecture", "size", "non-embedding", "rate", "tokens", "seeds", "bits per byte"]
    return table([*header, "sd", *(TEXTS[key] for key in texts), "run as"], rows)


def gap_table(document: dict[str, Any]) -> list[str]:
    """MatMul-free minus Transformer++ at each size, for both texts together and each alone."""
    alone = document["gaps_of_texts"]
    rows = []
    for place, gap in enumerate(document["gaps"]["sizes"]):
        error = "" if gap["error"] is None else f" ± {gap['error']:.4f}"
        each = [f"{alone[key]['sizes'][place]['gap']:+.4f}" for key in alone]
        both = [f"{gap['gap']:+.4f}{error}", f"{gap['share']:+.2%}", *each]
        rows.append([gap["size"], f"{gap['non_embedding'] / 1e6:.2f}M", *both])
    found = document["gaps"]
    if "slope_per_tenfold" in found:
        error = max(found["slope_error_seeds"], found["slope_error_scatter"] or 0.0)
        slope = f"{found['slope_per_tenfold']:+.4f} ± {error:.4f}"
        rows.append(["ten times the size", None, slope, *[None] * (1 + len(alone))])
    header = ["size", "non-embedding", "MatMul-free minus Transformer++", "share"]
    return table([*header, *(TEXTS[key] for key in alone)], rows) if rows else []


def curve_table(fits: dict[str, Any]) -> list[str]:
    """The fits of both architectures; a dash where the runs do not determine one."""
    rows = []
    for arch, found in fits.items():
        power, floor = (found["non_embedding"][kind] for kind in ("power", "floor"))
        cells: list[Any] = [None] * 3
        if "A" in power:
            errors = power["standard_errors"]
            cells = [
                f"{power['A']:.3f} ± {errors[0]:.3f}",
                f"{power['alpha']:.4f} ± {errors[1]:.4f}",
                f"{power['largest_miss']:.1%}",
            ]
        names = zip(("E", "A", "alpha"), floor.get("standard_errors", ()), strict=False)
        rest = [f"{floor[name]:.3f} ± {error:.3f}" for name, error in names]
        rows.append([NAMES[arch], power["sizes"], *cells, *(rest or [None] * 3)])
    header = ["architecture", "sizes", "A", "alpha", "largest miss"]
    return table([*header, "with a floor: E", "A", "alpha"], rows)


def again(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that were made twice: the same rate, weights and batches, with other kernels."""
    keys = ("arch", "size", "seed", "learning_rate", "steps")
    return [
        {"first": first, "again": row, "spread": _spread(first, rows)}
        for row in rows
        for first in rows
        if (row["stage"], row["status"]) == ("check", "ok")
        and (first["stage"], first["status"]) == ("final", "ok")
        and all(first[key] == row[key] for key in keys)
    ]


def _spread(first: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """How far the seeds of the same cell lie apart."""
    keys = ("arch", "size", "learning_rate", "steps", "stage", "status")
    scores = [r["bpb"] for r in rows if all(r[key] == first[key] for key in keys)]
    return max(scores) - min(scores) if len(scores) > 1 else None


def again_table(pairs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for pair in pairs:
        for row in (pair["first"], pair["again"]):
            look = row["curve"][0] if row.get("curve") else (None, None)
            spread = None if pair["spread"] is None else f"{pair['spread']:.4f}"
            name = [NAMES[row["arch"]], row["size"], row["seed"], kernels(row)]
            lines.append([*name, f"{row['bpb']:.4f}", *look, spread])
    header = ["architecture", "size", "seed", "run as", "bits per byte", "step"]
    return table([*header, "training loss there", "seeds lie apart"], lines) if lines else []


def tuning(rows: list[dict[str, Any]]) -> list[str]:
    """What the short runs gave: every rate that was tried, with its bits per byte."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["learning_rate"]):
        score = row["status"] if row["bpb"] is None else f"{row['bpb']:.4f}"
        cells.setdefault((row["arch"], row["size"]), []).append(
            f"{row['learning_rate']:.2g}: {score}"
        )
    lines = [[NAMES[arch], size, ", ".join(tried)] for (arch, size), tried in cells.items()]
    return table(["architecture", "size", "rates tried: bits per byte"], sorted(lines))


def report(out: Path) -> dict[str, Any]:
    """scaling.json, scaling.md, scaling-parameters.png and scaling-flops.png in `out`."""
    about = json.loads((out / "scaling-machine.json").read_text())
    # Rows that no later run has adopted are of the commit that the machine's file names.
    rows = [{"commit": about["commit"], **r} for r in read_rows(out / "scaling-rows.jsonl")]
    entries = summarise(rows)
    fits: dict[str, Any] = {}
    for arch in NAMES:
        mine = [entry for entry in entries if entry["arch"] == arch]
        fits[arch] = {
            axis: {"power": fit_power(mine, axis), "floor": fit_curve(mine, axis)} for axis in UNIT
        }
    texts: dict[str, dict[str, dict[str, float]]] = {}
    for key in ("bpb_wikipedia", "bpb_novels"):
        for entry in summarise(rows, key):
            texts.setdefault(key, {}).setdefault(entry["arch"], {})[entry["size"]] = entry["mean"]
    document = {
        "machine": about,
        "entries": entries,
        "texts": texts,
        "fits": fits,
        "gaps": gaps(entries),
        "gaps_of_texts": {key: gaps(summarise(rows, key)) for key in texts},
        "again": again(rows),
        "tuning": [
            {k: row.get(k) for k in ("arch", "size", "learning_rate", "status", "bpb")}
            for row in rows
            if row["stage"] == "tune" and row["status"] != "cut"
        ],
    }
    (out / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = ["# Scaling study"]
    for block in all_tables(document).values():
        lines += ["", *block] if block else []
    (out / "scaling.md").write_text("\n".join(lines) + "\n")
    if entries:
        plot(entries, fits, "non_embedding", out / "scaling-parameters.png")
        plot(entries, fits, "flops", out / "scaling-flops.png")
    return document


def write(out: Path, page: Path = PAGE) -> None:
    """The page's tables from what `report` makes of the rows in `out`."""
    fill(page, all_tables(report(out)))
