"""What the scaling study trains: sizes, rates, cells, and what earlier rows leave to do.

A cell is one architecture at one size, as plain values. Nothing here needs torch.

A library of run.py.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.gpu_common import git_commit

VOCABULARY = 8192
# layers, width, heads of the twin (64 elements each); non-embedding 4, 12, 27 and 71 million
SIZES = {"S": (5, 256, 4), "M": (7, 384, 6), "L": (8, 512, 8), "XL": (10, 768, 12)}
TOY_SIZES = {"S": (1, 32, 2), "M": (2, 48, 2), "L": (2, 64, 2), "XL": (2, 96, 2)}
# The middle of the three rates at width 640, where the model in the box was trained; other widths
# are scaled by sqrt(640 / width). Factor 2 between the rates.
CENTRE = {"mlgru": 6e-3, "transformer": 2e-3}
# One H200: seconds a token = HEAD + LAYER * layers * width, from 894,000 tokens/s of the model in
# the box (9 x 640); only `plan` uses it.
HEAD, LAYER = 0.10e-6, 1.02e-6 / 5760


def model_config(arch: str, size: tuple[int, int, int], length: int) -> dict[str, Any]:
    """Values of a ModelConfig: the same layers, width and channel mixer for both architectures."""
    layers, width, heads = size
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_layers": layers,
        "hidden_size": width,
        "max_position_embeddings": length,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if arch == "transformer":
        values |= {"token_mixer": "attention", "linear": "dense", "num_heads": heads}
    return values


def rates(arch: str, width: int, count: int = 3) -> list[float]:
    """`count` rates, factor 2 apart, around the guess for this width (two digits are enough)."""
    centre = CENTRE[arch] * (640 / width) ** 0.5
    return [float(f"{centre * 2.0 ** (n - count // 2):.2g}") for n in range(count)]


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every (architecture, size) is to do, smaller sizes first, without device and time."""
    sizes = TOY_SIZES if args.tiny else SIZES
    return [
        {
            "arch": arch,
            "size": name,
            "model": model_config(arch, sizes[name], args.length),
            "rates": rates(arch, sizes[name][1], args.rates),
            "tune_tokens": int(args.tune_tokens),
            "final_tokens": int(args.tokens),
            "seeds": list(range(1, 1 + args.seeds)),
            "sequence_length": args.length,
            "batch_size": args.batch,
            "warmup_steps": args.warmup,
            "eval_tokens": int(args.eval_tokens),
            "work": str(args.work),
            "rows": str(args.out / "scaling-rows.jsonl"),
            "stage": "final",
            "commit": args.commit or git_commit(),
            "compile": args.compile,
        }
        for name in args.sizes
        for arch in CENTRE
    ]


def predicted(cell: dict[str, Any]) -> float:
    """Seconds of one H200 for a cell that it has for itself, without start and compilation."""
    model = cell["model"]
    tokens = len(cell["rates"]) * cell["tune_tokens"] + len(cell["seeds"]) * cell["final_tokens"]
    return tokens * (HEAD + LAYER * model["num_layers"] * model["hidden_size"])


def step_count(cell: dict[str, Any], tokens: int, stream_tokens: int) -> int:
    """Optimiser steps of a run on `tokens` tokens, one epoch at most."""
    return max(min(tokens, stream_tokens) // (cell["batch_size"] * cell["sequence_length"]), 1)


def find_run(
    rows: list[dict[str, Any]], cell: dict[str, Any], stage: str, rate: float, seed: int, steps: int
) -> dict[str, Any] | None:
    """The row of this very run if one has ended. Cut ones never count, diverged ones as tuning."""
    for row in rows:
        same = (row["arch"], row["size"], row["stage"]) == (cell["arch"], cell["size"], stage)
        if not same or (row["seed"], row["learning_rate"]) != (seed, rate):
            continue
        if row["status"] == "ok" and row["steps"] == steps:
            return row
        if row["status"] == "diverged" and stage == "tune":
            return row
    return None


def best_rate(rows: list[dict[str, Any]], cell: dict[str, Any], steps: int) -> float | None:
    """The rate of the best tuning run of this cell, None if there is none."""
    wanted = (cell["arch"], cell["size"], "tune", "ok", steps)
    tuned = [
        row
        for row in rows
        if (row["arch"], row["size"], row["stage"], row["status"], row["steps"]) == wanted
    ]
    return min(tuned, key=lambda row: row["bpb"])["learning_rate"] if tuned else None


def beyond(cell: dict[str, Any], best: float | None) -> float | None:
    """The best of three rates at an edge: the next one there, the same rule for all cells."""
    tried = cell["rates"]
    if best not in (min(tried), max(tried)) or len(tried) < 3:
        return None
    factor = tried[1] / tried[0]
    return float(f"{best * factor if best == max(tried) else best / factor:.2g}")


def missing(rows: list[dict[str, Any]], cell: dict[str, Any], stream_tokens: int) -> list[str]:
    """The cell's runs that no earlier row has, in words; a final run counts at the best rate."""
    tune = step_count(cell, cell["tune_tokens"], stream_tokens)
    final = step_count(cell, cell["final_tokens"], stream_tokens)
    left = [r for r in cell["rates"] if find_run(rows, cell, "tune", r, 0, tune) is None]
    best = best_rate(rows, cell, tune)
    further = None if left else beyond(cell, best)
    if further is not None and find_run(rows, cell, "tune", further, 0, tune) is None:
        left.append(further)
    seeds = [
        seed
        for seed in cell["seeds"]
        if best is None or left or find_run(rows, cell, "final", best, seed, final) is None
    ]
    return [f"rate {rate:g}" for rate in left] + [f"seed {seed}" for seed in seeds]


def order(rows: list[dict[str, Any]], work: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What matters most first: cells without any final run, then the rest; small before large.

    Where earlier rows exist the MatMul-free LM, which takes longer, comes before its twin.
    """

    def rank(cell: dict[str, Any]) -> tuple[int, int, float]:
        name = (cell["arch"], cell["size"], "final", "ok")
        have = any((r["arch"], r["size"], r["stage"], r["status"]) == name for r in rows)
        place = list(CENTRE).index(cell["arch"]) if have else 0
        model = cell["model"]
        return int(have), place, float(model["num_layers"] * model["hidden_size"])

    return sorted(work, key=rank)
