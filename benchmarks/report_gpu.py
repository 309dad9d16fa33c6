"""Write the measured tables into docs/gpu.md, between their markers; draw the plots before.

    python benchmarks/report_gpu.py benchmarks/results/DATE-h200

The folder holds what gpu_tests.py, training_gpu.py, inference_gpu.py, scaling.py and many_gpus.py
wrote. Each part of the page lies between <!-- NAME: begin --> and <!-- NAME: end -->; what has not
been measured says so. No figure on the page is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dry_run import add_tiny, newest_results
from gpu_common import ROOT, describe, table
from plot_gpu import SIDES, draw, latest, machine_of

sys.path.insert(0, str(ROOT))

from nomatmul.evaluate.rows import read_rows
from studies.scaling import page as scaling_page

PAGE = ROOT / "docs/gpu.md"
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


def training(folder: Path, link: Callable[[str], str]) -> list[str]:
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
    lines = [describe(machine_of(rows) or {}) + ".", "", *table(header, cells), ""]
    lines.append(f"![Peak memory and tokens/s of every path]({link('gpu-training.png')})")
    failed = [row for row in latest(rows, "size", "variant").values() if "error" in row]
    lines += ["", *(f"- {row['size']} {path_of(row)}: {row['error']}" for row in failed)]
    lines += [
        f"- Rows from {text}." for text in sorted({r["source"] for r in found if "source" in r})
    ]
    if (folder / "training-profile.txt").exists():
        lines += ["", f"The longest kernels of a fused step: [{'training-profile.txt'}]"]
        lines[-1] += f"({link('training-profile.txt')})."
    return lines


def inference(folder: Path, link: Callable[[str], str]) -> list[str]:
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
    band = sorted(row["copy_bandwidth"] for row in found)[len(found) // 2] / 1e12
    lines = [describe(machine_of(rows) or {}) + f". Copy bandwidth {band:.2f} TB/s.", ""]
    lines += [*table(header, cells), ""]
    lines.append(f"![Memory, latency and tokens/s against size]({link('gpu-inference.png')})")
    failed = [row for row in latest(rows, "size", "side").values() if "error" in row]
    return [*lines, "", *(f"- {r['size']} {SIDES[r['side']]}: {r['error']}" for r in failed)]


def scaling(folder: Path, link: Callable[[str], str]) -> list[str]:
    if not read_rows(folder / "scaling-rows.jsonl"):
        return []
    document = scaling_page.report(folder)
    plots = [
        f"![Held-out bits per byte against {what}]({link(name)})"
        for what, name in (
            ("parameters", "scaling-parameters.png"), ("training FLOPs", "scaling-flops.png")
        )
    ]  # fmt: skip
    machine = document["machine"]
    runs = [describe(about) + "." for about in [*machine.get("earlier", []), machine]]
    return [" ".join(runs), "", *scaling_page.page(document), "", *plots]


def tests(folder: Path, link: Callable[[str], str]) -> list[str]:
    file = folder / "gpu-tests.json"
    if not file.exists():
        return []
    document = json.loads(file.read_text())
    found = document["tests"].values()
    fates = ("passed", "failed", "skipped", "not_run")  # the last one is not in older files
    count = {key: sum(t.get(key, 0) for t in found) for key in fates}
    left = f", {count['not_run']} not run" if count["not_run"] else ""
    about = describe(document["machine"]) if document["machine"] else "A run that was cut"
    return [
        f"{about}: {len(found)} tests, {count['passed']} cases passed, "
        f"{count['failed']} failed, {count['skipped']} skipped{left}; [the table]"
        f"({link('gpu-tests.md')})."
    ]


def many(folder: Path, link: Callable[[str], str]) -> list[str]:
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
    return ["", "Part (b) later: " + describe(machine_of(rows) or {}), "", *table(header, cells)]


PARTS = {
    "training": training, "inference": inference, "scaling": scaling,
    "many-gpus": many, "tests": tests,
}  # fmt: skip


def fill(text: str, name: str, lines: list[str]) -> str:
    """Replace what stands between the markers of `name`. Raises ValueError if they are absent."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{PAGE} lacks the markers of {name!r}")
    body = "\n".join(lines) if lines else "Not measured yet."
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="what the scripts wrote")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--out", type=Path, help="with --tiny: for copies of results and page")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        args.folder = args.folder or newest_results(args.out)
        if args.page == PAGE:
            args.page = args.folder / "page.md"
            args.page.write_text(PAGE.read_text("utf-8"), "utf-8")
    if args.folder is None:
        parser.error("the folder of the results is needed")
    draw(args.folder)

    def link(name: str) -> str:
        return Path(os.path.relpath(args.folder / name, args.page.parent)).as_posix()

    text = args.page.read_text("utf-8")
    for name, make in PARTS.items():
        text = fill(text, name, make(args.folder, link))
    args.page.write_text(text, "utf-8")
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
