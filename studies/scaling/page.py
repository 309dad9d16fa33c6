"""The scaling study in words, tables and plots, made from its rows (run.py fit).

A library of run.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_common import describe, table
from nomatmul.evaluate.rows import read_rows
from studies.scaling.fit import UNIT, fit_curve, fit_power, gaps, kernels, summarise

NAMES = {"mlgru": "MatMul-free LM", "transformer": "Transformer++"}
TEXTS = {"bpb": "both texts", "bpb_wikipedia": "Wikipedia", "bpb_novels": "novels"}
# Held-out Wikipedia, from the card of the model in the box (src/nomatmul/box/README.md): its
# predecessor, which saw as many tokens as the control.
BOX = {"mlgru": 1.267, "transformer": 1.169, "tokens": 361e6, "parameters": 53e6}


def sentence(found: dict[str, Any], tokens: float) -> str:
    """What the numbers say about the gap and its trend, and no more."""
    sizes = found["sizes"]
    if not sizes:
        return "No size has final runs of both architectures, so nothing can be said of the gap."

    def show(gap: dict[str, Any]) -> str:
        error = "" if gap["error"] is None else f" ± {gap['error']:.4f}"
        return (
            f"{gap['gap']:+.4f}{error} bits per byte ({gap['share']:+.1%}) at "
            f"{gap['non_embedding'] / 1e6:.1f}M"
        )

    text = (
        f"After {tokens / 1e6:.0f}M tokens the held-out loss of the MatMul-free LM minus that of "
        f"its twin is {show(sizes[0])}"
    )
    if len(sizes) > 1:
        text += f" and {show(sizes[-1])} non-embedding parameters"
    if "slope_per_tenfold" not in found:
        return text + "; there are too few runs to speak of a trend."
    slope = found["slope_per_tenfold"]
    error = max(found["slope_error_seeds"], found["slope_error_scatter"] or 0.0)
    side = NAMES["transformer"] if slope > 0 else f"the {NAMES['mlgru']}"
    verdict = f"moves in favour of {side} with size"
    if abs(slope) < 2 * error:
        verdict = "shows no trend with size beyond twice its error"
    return (
        f"{text}; over {len(sizes)} sizes the difference {verdict} ({slope:+.4f} ± {error:.4f} "
        "bits per byte for ten times the parameters, one standard error, the larger of seed spread "
        "and scatter around the line)."
    )


def context(entries: list[dict[str, Any]]) -> str:
    """How far these runs are from what the sizes could use, and the one longer pair there is."""
    if not entries:
        return ""
    shares = [entry["tokens"] / entry["non_embedding"] for entry in entries]
    tokens = max(entry["tokens"] for entry in entries)
    ours, twin = BOX["mlgru"], BOX["transformer"]
    return (
        f"These are short runs: {tokens / 1e6:.0f}M tokens, part of one epoch of the texts, is "
        f"{max(shares):.1f} tokens for each non-embedding parameter of the smallest model and "
        f"{min(shares):.1f} of the largest, where some 20 would serve best (arXiv 2203.15556). "
        "They tell who learns faster at first, not who ends lower. The one longer pair, the former "
        f"model in the box and its control ({BOX['parameters'] / 1e6:.0f}M parameters in all, "
        f"{BOX['tokens'] / 1e6:.0f}M tokens, one run each, other rates and texts; "
        f"src/nomatmul/box/README.md), ended at {ours:.3f} (packed) against {twin:.3f} bits per "
        f"byte of Wikipedia: {ours / twin - 1:+.0%}. So a small or negative difference here must "
        "not be read as parity: with more tokens that pair had Transformer++ well ahead."
    )


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


def page(document: dict[str, Any]) -> list[str]:
    """The study as Markdown lines."""
    rows = []
    for entry in document["entries"]:
        spread = "-" if entry["sd"] is None else f"{entry['sd']:.4f}"
        texts = document["texts"]
        rows.append(
            [
                NAMES[entry["arch"]], entry["size"], f"{entry['non_embedding'] / 1e6:.2f}M",
                f"{entry['learning_rate']:.2g}", f"{entry['tokens'] / 1e6:.1f}M", entry["runs"],
                f"{entry['mean']:.4f}", spread,
                *(f"{texts[key][entry['arch']][entry['size']]:.4f}" for key in texts),
                ", ".join(entry["kernels"]),
            ]
        )  # fmt: skip
    header = ["architecture", "size", "non-embedding", "rate", "tokens", "seeds", "bits per byte"]
    columns = [*header, "sd", *(TEXTS[key] for key in document["texts"]), "run as"]
    lines = [*table(columns, rows), "", *gap_table(document), ""]
    for arch, fits in document["fits"].items():
        lines += curves(arch, fits["non_embedding"])
    lines += document["checks"]
    lines += ["", document["sentence"], "", document["context"], ""]
    return [*lines, *tuning(document["tuning"])]


def gap_table(document: dict[str, Any]) -> list[str]:
    """MatMul-free minus Transformer++ at each size, for both texts together and each alone."""
    alone = document["gaps_of_texts"]
    rows = []
    for place, gap in enumerate(document["gaps"]["sizes"]):
        error = "" if gap["error"] is None else f" ± {gap['error']:.4f}"
        each = [f"{alone[key]['sizes'][place]['gap']:+.4f}" for key in alone]
        both = [f"{gap['gap']:+.4f}{error}", f"{gap['share']:+.2%}", *each]
        rows.append([gap["size"], f"{gap['non_embedding'] / 1e6:.2f}M", *both])
    header = ["size", "non-embedding", "MatMul-free minus Transformer++", "share"]
    return table([*header, *(TEXTS[key] for key in alone)], rows) if rows else []


def curves(arch: str, fits: dict[str, Any]) -> list[str]:
    """The fits of one architecture in words; one that is not determined is not given in numbers."""
    power, floor = fits["power"], fits["floor"]
    if "note" in power:
        return [f"- {NAMES[arch]}: {power['note']}."]
    errors = power["standard_errors"]
    text = (
        f"- {NAMES[arch]}: loss = A (N / 10M)^-alpha with A {power['A']:.3f} ± {errors[0]:.3f}, "
        f"alpha {power['alpha']:.4f} ± {errors[1]:.4f}; {power['sizes']} sizes for 2 parameters, "
        f"largest miss {power['largest_miss']:.1%}."
    )
    if floor["determined"]:
        values = ", ".join(
            f"{name} {floor[name]:.3f} ± {error:.3f}"
            for name, error in zip(("E", "A", "alpha"), floor["standard_errors"], strict=True)
        )
        return [f"{text} With a floor, loss = E + A (N / 10M)^-alpha: {values}."]
    return [f"{text} A curve with a floor is not determined by these runs: {floor['note']}."]


def checks(rows: list[dict[str, Any]]) -> list[str]:
    """Runs that were made twice: the same rate, weights and batches, with other kernels."""
    lines = []
    for again in rows:
        keys = ("arch", "size", "seed", "learning_rate", "steps")
        for first in rows if (again["stage"], again["status"]) == ("check", "ok") else ():
            same = all(first[key] == again[key] for key in keys)
            if same and (first["stage"], first["status"]) == ("final", "ok"):
                lines.append(
                    f"- {NAMES[again['arch']]} {again['size']}, seed {again['seed']}, made twice: "
                    f"{first['bpb']:.4f} bits per byte ({kernels(first)}) and {again['bpb']:.4f} "
                    f"({kernels(again)})." + _beside(first, again, rows)
                )
    return lines


def _beside(first: dict[str, Any], again: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Training losses of both at their first look, and what other seeds of the cell make."""
    text = ""
    looks = [row["curve"][0] for row in (first, again) if row.get("curve")]
    if len(looks) == 2:
        (step, before), (_, after) = looks
        text += f" Their training losses after {step} steps: {before} and {after}."
    keys = ("arch", "size", "learning_rate", "steps", "stage", "status")
    scores = [r["bpb"] for r in rows if all(r[key] == first[key] for key in keys)]
    if len(scores) > 1:
        text += f" Seeds of this cell lie {max(scores) - min(scores):.4f} apart."
    return text


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
    found = gaps(entries)
    document = {
        "machine": about,
        "entries": entries,
        "texts": texts,
        "fits": fits,
        "gaps": found,
        "gaps_of_texts": {key: gaps(summarise(rows, key)) for key in texts},
        "sentence": sentence(found, max((e["tokens"] for e in entries), default=0)),
        "context": context(entries),
        "checks": checks(rows),
        "tuning": [
            {k: row.get(k) for k in ("arch", "size", "learning_rate", "status", "bpb")}
            for row in rows
            if row["stage"] == "tune" and row["status"] != "cut"
        ],
    }
    (out / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = ["# Scaling study", "", describe(about), "", *page(document)]
    (out / "scaling.md").write_text("\n".join(lines) + "\n")
    if entries:
        plot(entries, fits, "non_embedding", out / "scaling-parameters.png")
        plot(entries, fits, "flops", out / "scaling-flops.png")
    return document
