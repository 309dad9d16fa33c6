"""Draw the plots, and write the measured tables into pages whose words are by hand.

    python benchmarks/report_gpu.py benchmarks/results/DATE-h200

The folder holds what gpu_tests.py, training_gpu.py, inference_gpu.py and many_gpus.py wrote; the
pages are docs/gpu.md and docs/many-gpus.md. What has not been measured leaves its block as it is
(tables.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from dry_run import add_tiny, newest_results
from gpu_common import ROOT, describe
from plot_gpu import SIDES, draw, latest, machine_of
from tables import fill

from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows

PAGES = ROOT / "docs"
PATHS = {
    "fused": "fused kernels",
    "fused-launched": "fused kernels",
    "naive-compiled": "plain PyTorch, compiled",
    "naive": "plain PyTorch, eager",
    "transformer": "Transformer++, compiled",
    "transformer-launched": "Transformer++, compiled",
    "transformer-logits": "Transformer++, compiled, all logits at once",
    "transformer-whole": "Transformer++, compiled as one graph",
    "transformer-autotune": "Transformer++, max-autotune",
}
Rows = list[dict[str, Any]]


def good(rows: Rows, *keys: str) -> Rows:
    return [row for row in latest(rows, *keys).values() if "error" not in row]


def path_of(row: dict[str, Any]) -> str:
    """The path of a training row in words; a name that is not known here stands for itself."""
    mode = row.get("recompute", "none")
    name = row["variant"].removesuffix(f"-{mode}")
    words = PATHS.get(name, name) + ("" if mode == "none" else f", recompute {mode}")
    if row.get("graph"):
        words += ", replayed"
    elif row.get("graph_failed"):
        words += " (could not be recorded)"
    return words + (" (fell back to plain PyTorch)" if row.get("fallback") else "")


def training(folder: Path) -> list[str]:
    rows = read_rows(folder / "training-rows.jsonl")
    found = good(rows, "size", "variant")
    if not found:
        return []
    places = {name: place for place, name in enumerate(PATHS)}

    def place(row: dict[str, Any]) -> tuple[bool, int]:
        name = row["variant"].removesuffix(f"-{row.get('recompute')}")
        return row["size"] != "370m", places.get(name, len(places))

    cells = []
    for row in sorted(found, key=place):
        cells.append(
            [
                row["size"].replace("m", "M").replace("b", "B"), path_of(row),
                f"{row['peak_bytes'] / 1e9:.1f}",
                f"{row['reserved_bytes'] / 1e9:.1f}" if "reserved_bytes" in row else None,
                f"{row['tokens_per_second']:,}", f"{row['utilisation']:.0%}", row.get("steps"),
            ]
        )  # fmt: skip
    header = ["size", "path", "peak GB", "reserved GB", "tokens/s", "FLOP/s used", "steps"]
    for row in latest(rows, "size", "variant").values():
        if "error" in row:
            cells.append([row["size"], f"{path_of(row)}: {row['error']}", *[None] * 5])
    return [describe(machine_of(rows) or {}), "", *table(header, cells)]


def inference(folder: Path) -> list[str]:
    rows = read_rows(folder / "inference-rows.jsonl")
    found = good(rows, "size", "side")
    if not found:
        return []
    sizes = list(dict.fromkeys(row["size"] for row in found))
    cells = []
    for size in sizes:
        for row in (row for row in found if row["size"] == size):
            generate = row.get("generate_tokens_per_second")
            cells.append(
                [
                    size, SIDES[row["side"]], f"{row['peak_bytes'] / 1e9:.2f}",
                    f"{1e3 * row['prefill_seconds']:.1f}",
                    f"{row['decode_tokens_per_second']:,.0f}",
                    f"{row['decode_call_tokens_per_second']:,.0f}",
                    f"{generate:,.0f}" if generate else None,
                    f"{row['bandwidth_share']:.0%}", row["backend"],
                ]
            )  # fmt: skip
    header = [
        "size", "model", "peak GB", "2048 tokens, ms", "decode, tokens/s", "a call each",
        "generate", "of the limit", "how",
    ]  # fmt: skip
    for row in latest(rows, "size", "side").values():
        if "error" in row:
            cells.append([row["size"], f"{SIDES[row['side']]}: {row['error']}", *[None] * 7])
    band = sorted(row["copy_bandwidth"] for row in found)[len(found) // 2] / 1e12
    about = f"{describe(machine_of(rows) or {})}; copy bandwidth {band:.2f} TB/s"
    return [about, "", *table(header, cells)]


def tests(folder: Path) -> list[str]:
    file = folder / "gpu-tests.json"
    if not file.exists():
        return []
    document = json.loads(file.read_text())
    found = document["tests"].values()
    fates = ("passed", "failed", "skipped", "not_run")  # the last one is not in older files
    count = {key: sum(t.get(key, 0) for t in found) for key in fates}
    about = describe(document["machine"]) if document["machine"] else "-"
    header = ["machine", "tests", "passed", "failed", "skipped", "not run"]
    return table(header, [[about, len(found), *count.values()]])


def many(folder: Path) -> list[str]:
    file = folder / "many-gpus.md"
    if not file.exists():
        return []
    lines = file.read_text("utf-8").strip().splitlines()
    lines = lines[1:] if lines and lines[0].startswith("# ") else lines
    lines = [f"#{line}" if line.startswith("##") else line for line in lines]
    return [*lines, *_many_again(read_rows(folder / "many-gpus-again.jsonl"))]


def _many_again(rows: Rows) -> list[str]:
    """Later runs of many_gpus_speed.py alone, whose rows were kept beside the page."""
    cells = [
        [
            row["size"], row["ranks"], row["recompute"], f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        for row in rows
        if "size" in row and "error" not in row
    ]  # fmt: skip
    if not cells:
        return []
    header = ["size", "GPUs", "recompute", "tokens/s", "step ms", "peak GB a GPU"]
    return ["", describe(machine_of(rows) or {}), "", *table(header, cells)]


PARTS = {
    "gpu.md": {"training": training, "inference": inference, "tests": tests},
    "many-gpus.md": {"many GPUs": many},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="what the scripts wrote")
    parser.add_argument("--pages", type=Path, default=PAGES, help="their folder (default: docs)")
    parser.add_argument("--out", type=Path, help="with --tiny: for copies of results and pages")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        args.folder = args.folder or newest_results(args.out)
        if args.pages == PAGES:
            args.pages = args.folder / "pages"
            args.pages.mkdir()
            for name in PARTS:
                shutil.copyfile(PAGES / name, args.pages / name)
    if args.folder is None:
        parser.error("the folder of the results is needed")
    draw(args.folder)
    for name, parts in PARTS.items():
        fill(args.pages / name, {part: make(args.folder) for part, make in parts.items()})
        print(f"wrote {args.pages / name}")


if __name__ == "__main__":
    main()
