"""Speed of the ternary product alone: GMAC/s and GB/s of packed weights, per instruction set.

Packing "2bit" and "1.6bit" have one scale a matrix; "groups" has a scale for each 128 inputs of a
row (weights-only models), "int8" a scale a row (heads).

Weights are rotated through more copies than fit in cache, so each call reads its weights from
memory, as a decoder's layers do. A row of the table is the median of the repeats.

    python benchmarks/kernels.py                    # all shapes, both packings, 1 and 2 threads
    python benchmarks/kernels.py --isa amx --tokens 1 16 512 --json
    python benchmarks/kernels.py --in-cache         # one small matrix, read again and again
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dry_run import add_tiny, shrink, temporary

SHAPES = ((2560, 2560), (2560, 13824), (6912, 2560))  # K x N of the 2.7B model
TOKENS = (1, 4, 16, 64, 512)
TINY_SHAPES = ((256, 64),)
PANELS = {"groups": (128, "2bit"), "int8": (0, "int8")}  # inputs of a scale (0: all), stored form
CHUNK = 256  # tokens of one product of panels

Timer = Callable[[int], "list[float]"]
CACHE_BYTES = 192 << 20  # rotate through at least this much


def random_weights(rng: np.random.Generator, copies: int, n: int, row: int, form: str) -> Any:
    """Return legal random packed bytes [copies, n, row]."""
    if form == "2bit":
        legal = np.array(
            [b for b in range(256) if all((b >> s) & 3 != 3 for s in (0, 2, 4, 6))], np.uint8
        )
    else:
        legal = np.array([(v * 256 + 242) // 243 for v in range(243)], np.uint8)
    one = legal[rng.integers(0, len(legal), (n, row), dtype=np.uint8) % len(legal)]
    weights = np.empty((copies, n, row), np.uint8)
    weights[:] = one
    return weights


def row_bytes(k: int, form: str) -> int:
    """Return the bytes of a packed row of k values."""
    per_row = 128 if form == "2bit" else 160
    return -(-k // per_row) * 32


def measure(
    kernels: Any, isa: str, form: str, k: int, n: int, m: int, threads: int, options: Any
) -> dict[str, Any]:
    """Time one combination and return a row of the table."""
    rng = np.random.default_rng(1)
    q = rng.integers(-127, 128, (m, k), dtype=np.int8)
    if form in PANELS:
        row, time = panels(kernels, isa, form, n, q, threads, options)
    else:
        row, time = rows(kernels, isa, form, n, q, threads, options)
    time(2)
    once = statistics.median(time(3))
    repeats = int(min(2000, max(5, options.seconds / once)))
    seconds = statistics.median(time(repeats))
    return {
        "isa": isa,
        "packing": form,
        "k": k,
        "n": n,
        "tokens": m,
        "threads": threads,
        "microseconds": seconds * 1e6,
        "gmac_per_s": m * n * k / seconds / 1e9,
        "gweights_per_s": n * k / seconds / 1e9,
        "gbytes_per_s": n * row / seconds / 1e9,
    }


def rows(
    kernels: Any, isa: str, form: str, n: int, q: Any, threads: int, options: Any
) -> tuple[float, Timer]:
    """Packed rows with one scale: bytes of a row, and what times so many products."""
    row = row_bytes(q.shape[1], form)
    copies = 1 if options.in_cache or options.tiny else max(2, -(-CACHE_BYTES // (n * row)))
    weights = random_weights(np.random.default_rng(2), copies, n, row, form)
    return row, lambda repeats: kernels.time_product(isa, form, weights, q, threads, repeats)


def panels(
    kernels: Any, isa: str, form: str, n: int, q: Any, threads: int, options: Any
) -> tuple[float, Timer]:
    """The same of rows with scales of groups, or of rows of int8; chunks of 256 tokens."""
    rng, (m, k) = np.random.default_rng(2), q.shape
    group, stored = PANELS[form]
    group = group or k
    if form == "int8":
        values = rng.integers(-127, 128, (n, k), dtype=np.int8)
    else:
        values = random_weights(rng, 1, n, row_bytes(k, stored), stored)[0]
    scale = rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float32 if group == k else np.float16)
    row = values.shape[1] + scale.nbytes / n
    few = options.in_cache or options.tiny
    copies = 1 if few else max(2, -(-CACHE_BYTES // int(n * row)))
    matrix = kernels.Panels(isa, stored, values, scale, k, copies)
    chunks = [q[at : at + CHUNK] for at in range(0, m, CHUNK)]
    steps = [np.full((len(chunk), k // group), 0.01, np.float32) for chunk in chunks]

    def time(repeats: int) -> list[float]:
        parts = [matrix.time(*both, threads, repeats) for both in zip(chunks, steps, strict=True)]
        return [sum(part) for part in zip(*parts, strict=True)]

    return row, time


def machine() -> dict[str, Any]:
    """Return what a table of figures must say about where it was measured."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name"]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--isa", nargs="+", help="default: all that run here but scalar")
    parser.add_argument("--packing", nargs="+", default=["2bit", "1.6bit", *PANELS])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.3, help="per figure, roughly")
    parser.add_argument("--in-cache", action="store_true", help="one 2560 x 512 matrix")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for kernels.json, beside what is printed")
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(options, parser, tokens=[1, 4], threads=[1], seconds=0.001)
        options.out = options.out or temporary()
    return options


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    from nomatmul import _native

    options = parse(argv)
    kernels = _native.kernels
    isas = options.isa or [isa for isa in kernels.isas() if isa != "scalar"]
    where = machine()
    if not options.json:
        print(f"{where['cpu']}, {where['cores']} cores, {where['date']}, commit {where['commit']}")
        print(f"{'isa':11} {'packing':7} {'K x N':>12} {'tok':>4} {'thr':>3}", end=" ")
        print(f"{'us':>10} {'GMAC/s':>8} {'Gw/s':>7} {'GB/s':>6}")
    rows = []
    shapes = TINY_SHAPES if options.tiny else ((2560, 512),) if options.in_cache else SHAPES
    for isa in isas:
        for form in options.packing:
            for k, n in shapes:
                for m in options.tokens:
                    for threads in options.threads:
                        row = measure(kernels, isa, form, k, n, m, threads, options)
                        rows.append(row)
                        if not options.json:
                            print(
                                f"{isa:11} {form:7} {f'{k}x{n}':>12} {m:4} {threads:3}"
                                f" {row['microseconds']:10.1f} {row['gmac_per_s']:8.1f}"
                                f" {row['gweights_per_s']:7.1f} {row['gbytes_per_s']:6.2f}",
                                flush=True,
                            )
    text = json.dumps({"machine": where, "rows": rows}, indent=1) + "\n"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels.json").write_text(text)
    if options.json:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
