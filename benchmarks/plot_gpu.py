"""Plots of the GPU benchmarks from their rows.

    python benchmarks/plot_gpu.py benchmarks/results/DATE-h200

Reads training-rows.jsonl and inference-rows.jsonl of that folder and writes gpu-training.png,
gpu-inference.png and the plotted numbers, gpu-plots.json, beside them. Errors leave gaps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dry_run import add_tiny, newest_results

from nomatmul.evaluate.rows import read_rows

SIDES = {"packed": "MatMul-free, 2 bits", "dense": "Transformer++, bf16"}
COLOURS = {"packed": "tab:blue", "dense": "tab:orange"}


def latest(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The last good row of every combination of `keys`, in the order of the first ones."""
    out: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        name = tuple(str(row.get(key)) for key in keys)
        if "machine" not in row and ("error" not in row or name not in out):
            out[name] = row
    return out


def machine_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the last run says of its machine."""
    found = [row["machine"] for row in rows if "machine" in row]
    return found[-1] if found else None


def training(rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Bars of peak memory and tokens/s, a row of panels for each size."""
    import matplotlib.pyplot as plt

    good = [row for row in latest(rows, "size", "variant").values() if "error" not in row]
    sizes = list(dict.fromkeys(row["size"] for row in good))
    numbers: dict[str, Any] = {}
    figure, grid = plt.subplots(
        len(sizes), 2, figsize=(10, 0.6 + 3.1 * len(sizes)), layout="constrained", squeeze=False
    )
    for axes, size in zip(grid, sizes, strict=True):
        mine = [row for row in good if row["size"] == size][::-1]
        names = [row["variant"] for row in mine]
        colours = ["tab:blue" if row["arch"] == "mlgru" else "tab:orange" for row in mine]
        memory = [row["peak_bytes"] / 1e9 for row in mine]
        speed = [row["tokens_per_second"] for row in mine]
        for panel, values, label, form in (
            (axes[0], memory, "peak memory, GB", "%.1f"),
            (axes[1], [value / 1e3 for value in speed], "thousand tokens/s", "%.0f"),
        ):
            panel.bar_label(panel.barh(names, values, color=colours), fmt=form, padding=2)
            panel.set(title=f"{size}: {label}")
            panel.margins(x=0.15)
        numbers[size] = {
            name: {"peak_gb": gb, "tokens_per_second": rate}
            for name, gb, rate in zip(names, memory, speed, strict=True)
        }
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return numbers


def inference(rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Peak memory and prompt latency against size, decoded tokens/s as bars."""
    import matplotlib.pyplot as plt

    found = latest(rows, "size", "side")
    sizes = list(dict.fromkeys(size for size, _ in found))
    parts: dict[str, Callable[[dict[str, Any]], float]] = {
        "peak memory, GB": lambda row: row["peak_bytes"] / 1e9,
        "latency of the prompt, ms": lambda row: 1e3 * row["prefill_seconds"],
        "decoded tokens/s": lambda row: row["decode_tokens_per_second"],
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    numbers: dict[str, Any] = {}
    for panel, (label, value) in zip(axes, parts.items(), strict=True):
        for place, side in enumerate(SIDES):
            have = [(n, found.get((size, side), {"error": ""})) for n, size in enumerate(sizes)]
            points = [(n, value(row)) for n, row in have if "error" not in row]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            if "tokens/s" in label:
                shifted = [n + 0.4 * (place - 0.5) for n in x]
                bars = panel.bar(shifted, y, 0.38, color=COLOURS[side], label=SIDES[side])
                panel.bar_label(bars, fmt="{:,.0f}", fontsize=7)
            else:
                panel.plot(x, y, "o-", color=COLOURS[side], label=SIDES[side])
            numbers.setdefault(label, {})[side] = {sizes[n]: v for n, v in points}
        panel.set(xticks=range(len(sizes)), xticklabels=sizes, yscale="log", title=label)
        panel.grid(alpha=0.3, axis="y", which="both")
        panel.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return numbers


def draw(folder: Path) -> dict[str, Any]:
    """All plots that the folder's rows allow; the numbers in them."""
    import matplotlib

    matplotlib.use("Agg")
    numbers: dict[str, Any] = {}
    for name, make in (("training", training), ("inference", inference)):
        rows = read_rows(folder / f"{name}-rows.jsonl")
        if any("machine" not in row and "error" not in row for row in rows):
            numbers[name] = make(rows, folder / f"gpu-{name}.png")
    (folder / "gpu-plots.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="rows, and where the plots go")
    parser.add_argument("--out", type=Path, help="with --tiny: where a copy of the rows is plotted")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.folder is None and not args.tiny:
        parser.error("the folder of the rows is needed")
    print(f"plotted: {', '.join(draw(args.folder or newest_results(args.out)))}")


if __name__ == "__main__":
    main()
