"""Means, curves and gaps of the scaling study; page.py puts them in words.

A library of run.py.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

UNIT = {"non_embedding": 1e7, "flops": 1e17}


def kernels(row: dict[str, Any]) -> str:
    """What ran, and at which commit: "fused, CUDA graph f00ba42"."""
    plain = row.get("fallback") or row.get("ops") == "naive" or not row.get("fused", True)
    kind = "plain PyTorch" if plain else "fused"
    how = {"blocks": ", compiled", "whole": ", compiled", "graph": ", CUDA graph"}
    kind += how.get(row.get("compiled", ""), "")
    return f"{kind} {row.get('commit', 'unknown')}"


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
                "kernels": sorted({kernels(run) for run in runs}),
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


def fit_power(entries: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    """loss = A * (x / 1e7 or 1e17)^-alpha, a line through the logarithms of the sizes' means."""
    sizes, unit = len(entries), UNIT[axis]
    if sizes < 3:
        return {"sizes": sizes, "note": f"{sizes} sizes measured: too few for a curve"}
    x = np.log([entry[axis] / unit for entry in entries])
    y = np.log([entry["mean"] for entry in entries])
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    variance = float(rest @ rest) / (sizes - 2)
    error = math.sqrt(variance / float(centred @ centred))
    at_unit = float(y.mean() - slope * x.mean())
    error_at_unit = math.sqrt(variance * (1 / sizes + x.mean() ** 2 / float(centred @ centred)))
    return {
        "sizes": sizes,
        "unit": unit,
        "A": math.exp(at_unit),
        "alpha": -slope,
        "standard_errors": [math.exp(at_unit) * error_at_unit, error],
        "largest_miss": float(np.abs(np.expm1(rest)).max()),
    }


def fit_curve(entries: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    """loss = E + A / (x / 1e7 or 1e17)^alpha through the runs of one architecture.

    Least squares over runs. With sizes - 3 = 0 degrees of freedom the curve only interpolates.
    determined: whether the errors leave anything to say: E and alpha both beyond twice theirs.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    sizes, unit = len(entries), UNIT[axis]
    out: dict[str, Any] = {"sizes": sizes, "freedom_of_sizes": sizes - 3, "determined": False}
    if sizes < 4:
        return out | {"note": f"{sizes} sizes for 3 parameters"}
    x = np.concatenate([np.full(len(e["values"]), e[axis] / unit) for e in entries])
    y = np.concatenate([np.asarray(e["values"]) for e in entries])

    def curve(x: Any, floor: float, scale: float, power: float) -> Any:
        return floor + scale * x**-power

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            found, covariance = curve_fit(
                curve, x, y, p0=(y.min() * 0.8, y.min() * 0.2, 0.3),
                bounds=((0, 0, 0.01), (y.min(), 10 * y.max(), 3)), max_nfev=20_000,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        return out | {"note": f"the fit does not end: {error}"}
    errors = np.sqrt(np.diag(covariance))
    inside = bool(0.0101 < found[2] < 2.99 and 1e-6 < found[0] < 0.999 * y.min())
    clear = bool(
        np.isfinite(errors).all() and found[0] > 2 * errors[0] and found[2] > 2 * errors[2]
    )
    values = {
        "unit": unit,
        "E": float(found[0]),
        "A": float(found[1]),
        "alpha": float(found[2]),
        "standard_errors": [float(e) if np.isfinite(e) else None for e in errors],
        "residual_rms": float(np.sqrt(np.mean((curve(x, *found) - y) ** 2))),
    }
    if inside and clear:
        return out | {"determined": True} | values
    return out | {"note": "its floor and exponent lie within twice their errors", "found": values}


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
