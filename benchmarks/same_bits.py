"""Did a change keep the bits? Two source trees compute the same things on one machine.

For each tree, a process with that tree's `src` on its path: losses, logits and gradients of torch
models (every mixer; float32, on a GPU also bfloat16 autocast and every recompute mode), losses of
short training runs and a fine-tuning, logits and states of packed models in the engine. Floats of
torch and of a GPU are promised for one machine and one build only, so both trees run here, now; a
table says for each whether all bits are equal, else how far apart they are.

    python benchmarks/same_bits.py --old OLD_TREE/src --new src --device cuda --out results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dry_run import add_tiny, temporary, write_texts
from with_parent import kill_group, with_parent

ROOT = Path(__file__).resolve().parents[1]
WORKER = "import same_bits_worker; same_bits_worker.main()"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="folder with the former package in it")
    parser.add_argument("--new", type=Path, default=ROOT / "src", help="the same of the new one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--out", type=Path, help="folder for same-bits.json and same-bits.md")
    parser.add_argument("--only", nargs="*", default=[], help="groups: torch, train, engine")
    parser.add_argument("--seconds", type=float, default=280, help="limit of each process")
    add_tiny(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.old, options.only, options.device = options.new, ["engine"], "cpu"
        options.out = options.out or temporary()
    if options.old is None or options.out is None:
        parser.error("--old and --out are needed, or --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_texts(data, ["train", "valid"])
        old, old_ended = _observe(options.old, data / "old", data, options)
        new, new_ended = _observe(options.new, data / "new", data, options)
    rows = compare(old, new)
    table = to_table(rows)
    print(table)
    (options.out / "same-bits.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "same-bits.md").write_text(table)
    whole = old_ended and new_ended and bool(rows)
    return int(not whole or any(row["difference"] != 0 for row in rows))


def _observe(
    tree: Path, work: Path, data: Path, options: argparse.Namespace
) -> tuple[dict[str, np.ndarray], bool]:
    """What a tree computed, by name, and whether it came to the end of all that was asked."""
    work.mkdir()
    command = [sys.executable, "-c", WORKER, str(work), str(data), options.device, *options.only]
    path = os.pathsep.join([str(tree.resolve()), str(ROOT / "benchmarks")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(command, env=env, preexec_fn=with_parent())
    try:
        process.wait(timeout=options.seconds)
    except subprocess.TimeoutExpired:
        print(f"{tree}: cut after {options.seconds:.0f} s", file=sys.stderr)
    finally:
        kill_group(process)
    if process.returncode:
        print(f"{tree}: not all of it was computed", file=sys.stderr)
    found = {path.stem: np.load(path) for path in sorted(work.glob("*.npy"))}
    return found, process.returncode == 0


def compare(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> list[dict]:
    """A row a name; "difference" is 0 for equal bits, else the relative error, None in one tree."""
    rows = []
    for name in sorted(old.keys() | new.keys()):
        row: dict = {"name": name, "values": None, "difference": None}
        if name in old and name in new and old[name].shape == new[name].shape:
            a, b = old[name], new[name]
            row["values"] = int(a.size)
            row["difference"] = 0 if a.tobytes() == b.tobytes() else _error(a, b)
        rows.append(row)
    return rows


def _error(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-300)) or float("nan")


def to_table(rows: list[dict]) -> str:
    lines = ["| what | values | bits |", "| --- | --- | --- |"]
    for row in rows:
        d = row["difference"]
        words = "in one tree only" if d is None else "equal" if d == 0 else f"differ, {d:.2e}"
        lines.append(f"| {row['name']} | {row['values'] or '-'} | {words} |")
    equal = sum(row["difference"] == 0 for row in rows)
    return "\n".join([*lines, "", f"{equal} of {len(rows)} equal.", ""])


if __name__ == "__main__":
    sys.exit(main())
