"""Curves and plots of the scaling study, made from its rows (scaling.py fit)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import describe, read_rows, table

NAMES = {"mlgru": "MatMul-free LM", "transformer": "Transformer++"}
TEXTS = {"bpb": "both texts", "bpb_wikipedia": "Wikipedia", "bpb_novels": "novels"}


def summarise(rows: list[dict[str, Any]], key: str = "bpb") -> list[dict[str, Any]]:
    """One entry for each architecture and size: mean and spread of its final runs."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["stage"] == "final" and row["status"] == "ok":
            groups.setdefault((row["arch"], row["size"]), []).append(row)
    out = []
    for (arch, size), runs in groups.items():
        values = [run[key] for run in runs]
        out.append(
            {
                "arch": arch,
                "size": size,
                "non_embedding": runs[0]["non_embedding"],
                "parameters": runs[0]["parameters"],
                "flops": float(np.mean([run["flops"] for run in runs])),
                "tokens": runs[0]["tokens"],
                "learning_rate": runs[0]["learning_rate"],
                "runs": len(runs),
                "values": values,
                "mean": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
        )
    return sorted(out, key=lambda entry: (entry["arch"], entry["non_embedding"]))


def seed_spread(entries: list[dict[str, Any]]) -> tuple[float, int]:
    """Standard deviation of a run over seeds, pooled over all cells, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for entry in entries:
        values = np.asarray(entry["values"])
        squares += float(((values - values.mean()) ** 2).sum())
        freedom += len(values) - 1
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def fit_curve(entries: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    """loss = E + A / (x / 1e7 or 1e17)^alpha through the runs of one architecture.

    Least squares over runs. With sizes - 3 = 0 degrees of freedom the curve only interpolates.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    sizes = len(entries)
    out: dict[str, Any] = {"sizes": sizes, "freedom_of_sizes": sizes - 3}
    if sizes < 3:
        return out | {"note": "fewer than three sizes: no curve"}
    unit = 1e7 if axis == "non_embedding" else 1e17
    x = np.concatenate([np.full(len(e["values"]), e[axis] / unit) for e in entries])
    y = np.concatenate([np.asarray(e["values"]) for e in entries])

    def curve(x: Any, floor: float, scale: float, power: float) -> Any:
        return floor + scale * x**-power

    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            found, covariance = curve_fit(
                curve, x, y, p0=(y.min() * 0.8, y.min() * 0.2, 0.3),
                bounds=((0, 0, 0.01), (y.min(), 10 * y.max(), 3)), max_nfev=20_000,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        return out | {"note": f"no curve: {error}"}
    errors = np.sqrt(np.diag(covariance))
    return out | {
        "at_bound": bool(found[2] < 0.0101 or found[2] > 2.99 or found[0] < 1e-6),
        "unit": unit,
        "E": float(found[0]),
        "A": float(found[1]),
        "alpha": float(found[2]),
        "standard_errors": [float(e) if np.isfinite(e) else None for e in errors],
        "residual_rms": float(np.sqrt(np.mean((curve(x, *found) - y) ** 2))),
    }


def gaps(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """MatMul-free minus Transformer++ at each size, and the slope of that over log10 of size."""
    spread, freedom = seed_spread(entries)
    cells = {(e["arch"], e["size"]): e for e in entries}
    out: list[dict[str, Any]] = []
    for (arch, size), ours in cells.items():
        twin = cells.get(("transformer", size))
        if arch != "mlgru" or twin is None:
            continue
        error = spread * math.sqrt(1 / ours["runs"] + 1 / twin["runs"])
        out.append(
            {
                "size": size,
                "non_embedding": ours["non_embedding"],
                "gap": ours["mean"] - twin["mean"],
                "error": None if math.isnan(error) else error,
                "share": ours["mean"] / twin["mean"] - 1,
            }
        )
    result: dict[str, Any] = {"sizes": out, "seed_sd": None, "seed_freedom": freedom}
    if not math.isnan(spread):
        result["seed_sd"] = spread
    if len(out) < 2 or any(g["error"] is None for g in out):
        return result
    x = np.log10([g["non_embedding"] for g in out])
    y = np.asarray([g["gap"] for g in out])
    centred = x - x.mean()
    weight = centred / (centred**2).sum()
    slope = float(weight @ y)
    from_seeds = float(np.sqrt((weight**2) @ np.asarray([g["error"] ** 2 for g in out])))
    rest = y - y.mean() - slope * centred
    scatter = float(np.sqrt((rest @ rest) / max(len(out) - 2, 1) / (centred**2).sum()))
    return result | {
        "slope_per_tenfold": slope,
        "slope_error_seeds": from_seeds,
        "slope_error_scatter": scatter if len(out) > 2 else None,
    }


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
    verdict = "widens" if slope > 0 else "narrows"
    if abs(slope) < 2 * error:
        verdict = "shows no trend beyond twice its error"
    return (
        f"{text}; over {len(sizes)} sizes the gap {verdict} ({slope:+.4f} ± {error:.4f} bits per "
        "byte for ten times the parameters, one standard error, the larger of seed spread and "
        "scatter around the line). This says nothing about larger models or more tokens."
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
        if "E" in curve:
            line = np.geomspace(min(x), max(x), 100)
            scaled = curve["E"] + curve["A"] * (line / curve["unit"]) ** -curve["alpha"]
            axes.plot(line, scaled, "-", color=colour, lw=1)
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
            ]
        )  # fmt: skip
    header = ["architecture", "size", "non-embedding", "rate", "tokens", "seeds", "bits per byte"]
    lines = [*table([*header, "sd", *(TEXTS[key] for key in document["texts"])], rows), ""]
    for arch, fits in document["fits"].items():
        curve = fits["non_embedding"]
        if "E" not in curve:
            lines.append(f"- {NAMES[arch]}: {curve['note']}")
            continue
        values = (
            f"{name} {curve[name]:.3f}" + (f" ± {error:.3f}" if error is not None else " ± ?")
            for name, error in zip(("E", "A", "alpha"), curve["standard_errors"], strict=True)
        )
        lines.append(
            f"- {NAMES[arch]}: loss = E + A / (N / 10M)^alpha with {', '.join(values)}; "
            f"{curve['sizes']} sizes for 3 parameters: {curve['freedom_of_sizes']} degrees of "
            f"freedom, root mean square residual {curve['residual_rms']:.4f}"
            + ("; at the edge of what was allowed: not determined" if curve["at_bound"] else "")
        )
    return [*lines, "", document["sentence"], "", *tuning(document["tuning"])]


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


def report(out: Path) -> None:
    """scaling.json, scaling.md, scaling-parameters.png and scaling-flops.png in `out`."""
    rows = read_rows(out / "scaling-rows.jsonl")
    entries = summarise(rows)
    about = json.loads((out / "scaling-machine.json").read_text())
    fits: dict[str, Any] = {}
    for arch in NAMES:
        mine = [entry for entry in entries if entry["arch"] == arch]
        fits[arch] = {axis: fit_curve(mine, axis) for axis in ("non_embedding", "flops")}
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
        "tuning": [
            {k: row.get(k) for k in ("arch", "size", "learning_rate", "status", "bpb")}
            for row in rows
            if row["stage"] == "tune"
        ],
    }
    (out / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = ["# Scaling study", "", describe(about), "", *page(document)]
    (out / "scaling.md").write_text("\n".join(lines) + "\n")
    if entries:
        plot(entries, fits, "non_embedding", out / "scaling-parameters.png")
        plot(entries, fits, "flops", out / "scaling-flops.png")
    print("\n".join(lines))
