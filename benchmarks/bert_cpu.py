"""Whole encoders on a CPU: BERT-base with an FFF, its dense twin, and Hugging Face's BERT in torch.

12 layers x 768, 12 heads, sequences of 128 tokens; the FFF is one tree of depth 11 (4095 nodes, 12
visited), the twin has an FFN of 3072. Random weights: speed does not depend on their values, except
that real texts may agree on paths more than random ones do (then an FFF is faster). Everybody
computes final hidden states; a vocabulary head is timed apart. All contenders take turns in one
process, so that a noisy machine disturbs them alike; ratios are medians over rounds.

    python benchmarks/bert_cpu.py                         # about five minutes on two cores
    python benchmarks/bert_cpu.py --quick --out /tmp      # two rounds, batch 1 only
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dry_run import add_tiny, shrink, temporary
from kernels import machine

from nomatmul.engine.backends.native import NativeBackend
from nomatmul.engine.blas import blas_name
from nomatmul.engine.encoder_model import EncoderModel
from nomatmul.engine.weights import Weights
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderHead, EncoderReading
from nomatmul.formats.files.safetensors import NUMPY_DTYPES
from nomatmul.formats.packed import Forms, packed_tensors

LENGTH = 128
SIZES: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "max_position_embeddings": LENGTH,
    "token_mixer": "attention",
    "linear": "dense",
    "causal": False,
    "norm": "layer",
    "norm_eps": 1e-12,
    "positions": "sinusoidal",
    "embedding_norm": True,
    "tie_embeddings": True,
}
TREE: dict[str, Any] = {
    "channel_mixer": "fff",
    "fff_trees": 1,
    "fff_depth": 11,
    "fff_bias": True,
}
DENSE: dict[str, Any] = {"channel_mixer": "ffn", "intermediate_size": 3072}
TINY_SIZES = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 2}
TINY_DIALS = {"fff": {"fff_depth": 3}, "ffn": {"intermediate_size": 128}}
OURS = {
    "FFF": (TREE, "f32"),
    "dense twin": (DENSE, "f32"),
    "FFF, int8": (TREE, "int8"),
    "dense twin, int8": (DENSE, "int8"),
}
READING = EncoderReading("masked", EncoderHead(), ())
TORCH = ("torch float32", "torch bfloat16", "torch int8")


def random_tensors(config: ModelConfig, forms: Forms) -> dict[str, Any]:
    """Random weights of a masked language model in the forms asked for."""
    rng, found = np.random.default_rng(0), {}
    for name, (dtype, shape) in packed_tensors(config, forms, READING).items():
        if dtype == "I8":
            found[name] = rng.integers(-127, 128, shape, dtype=np.int8)
        elif name.endswith("norm.weight"):
            found[name] = np.ones(shape, np.float32)
        elif name.endswith("scale"):
            found[name] = np.full(shape, 0.03 / 73, np.float32)
        else:
            assert NUMPY_DTYPES[dtype] == np.float32
            found[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.03)
    return found


def our_model(dials: dict[str, Any], form: str, threads: int, tiny: bool) -> EncoderModel:
    """One of our encoders with random weights."""
    small = {**TINY_SIZES, **TINY_DIALS[dials["channel_mixer"]]} if tiny else {}
    config = ModelConfig(**{**SIZES, **dials, **small})
    forms = Forms.of(config, dense=form, rows=form, embedding="f32")
    weights = Weights(random_tensors(config, forms))
    return EncoderModel(
        NativeBackend(config, forms, weights, threads=threads),
        config,
        READING,
        fingerprint="random",
        forms=forms,
        path=Path(),
    )


def torch_models(tiny: bool) -> dict[str, Any]:
    """Hugging Face's BERT-base without pooler: float32, bfloat16, int8 dynamic."""
    import torch
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {}
    if tiny:
        sizes = {
            "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 128,
        }  # fmt: skip

    def build() -> Any:
        torch.manual_seed(0)
        return BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()

    quantised = torch.ao.quantization.quantize_dynamic(
        build(), {torch.nn.Linear}, dtype=torch.qint8
    )
    return dict(zip(TORCH, (build(), build().bfloat16(), quantised), strict=True))


def torch_call(model: Any, ids: np.ndarray) -> Callable[[], None]:
    import torch

    tensor = torch.from_numpy(ids)

    def call() -> None:
        with torch.inference_mode():
            model(tensor)

    return call


def measure(
    calls: dict[str, Callable[[], None]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call in each round, taking turns; stops early after `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    return times


def bfloat16_pays(torches: dict[str, Any], ids: np.ndarray) -> bool:
    """False where the CPU has no bfloat16 products: then torch is ten times slower with them."""
    seconds = []
    for name in TORCH[:2]:
        call = torch_call(torches[name], ids)
        call()
        before = time.process_time()  # a busy machine must not decide who takes part
        call()
        seconds.append(time.process_time() - before)
    return seconds[1] < 3 * seconds[0]


def cell(threads: int, batch: int, torches: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """Rows of one (threads, batch): every contender, and its paired ratios."""
    import torch

    torch.set_num_threads(threads)
    words = (TINY_SIZES if options.tiny else SIZES)["vocab_size"]
    ids = np.random.default_rng(1).integers(0, words, (batch, LENGTH))
    models = {name: our_model(*what, threads, options.tiny) for name, what in OURS.items()}
    calls: dict[str, Callable[[], None]] = {
        name: (lambda m=model: m.hidden(ids)) for name, model in models.items()
    }
    calls |= {name: torch_call(model, ids) for name, model in torches.items()}
    if not bfloat16_pays(torches, ids[:1]):
        del calls[TORCH[1]]
    times = measure(calls, options.rounds, options.seconds)
    parts = {name: profile_of(model, ids, 3 if batch > 1 else 9) for name, model in models.items()}
    rows = []
    for name, taken in times.items():
        row: dict[str, Any] = {"threads": threads, "batch": batch, "model": name}
        row["milliseconds"] = 1e3 * statistics.median(taken)
        row["rounds"] = len(taken)
        for other, label in (("FFF", "fff"), ("FFF, int8", "fff_int8")):
            row[f"times_{label}"] = paired(taken, times[other])
        if name in parts:
            row["parts_ms"] = {part: 1e3 * s for part, s in parts[name].items()}
        rows.append(row)
        print(
            f"{threads} threads, batch {batch:2}: {name:18} {row['milliseconds']:9.1f} ms", end=""
        )
        print(
            f"   {row['times_fff']:.2f} x FFF, {row['times_fff_int8']:.2f} x FFF int8", flush=True
        )
    return rows


def paired(taken: list[float], other: list[float]) -> float:
    """Median over rounds of one contender's time over another's."""
    return statistics.median(a / b for a, b in zip(taken, other, strict=True))


def profile_of(model: EncoderModel, ids: np.ndarray, repeats: int) -> dict[str, float]:
    """Median seconds of each part of a pass."""
    found = [model.profile(ids) for _ in range(repeats)]
    return {part: statistics.median(f[part] for f in found) for part in found[0]}


PARTS = ("projections", "attention core", "channel mixer", "norms", "embedding")


def page(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Whole encoders on a CPU: FFF against dense",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['date']}, commit {where['commit']};"
        f" BLAS of our engine: {where['blas']}; torch {where['torch']},"
        f" transformers {where['transformers']}",
        "",
        "[How it was measured](README.md#whole-encoders-on-a-cpu-bert_cpupy)",
        "",
        "| threads | batch | model | ms | x FFF | x FFF int8 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['threads']} | {row['batch']} | {row['model']} | {row['milliseconds']:.1f} |"
            f" {row['times_fff']:.2f} | {row['times_fff_int8']:.2f} |"
        )
    lines += ["", "## Where the time goes, milliseconds", ""]
    lines += [
        f"| threads | batch | model | {' | '.join(PARTS)} | vocabulary head |",
        "|" + "---|" * (len(PARTS) + 4),
    ]
    for row in rows:
        if "parts_ms" not in row:
            continue
        parts, total = row["parts_ms"], sum(row["parts_ms"].get(p, 0.0) for p in PARTS)
        cells = [f"{parts.get(p, 0):.1f} ({100 * parts.get(p, 0) / total:.0f} %)" for p in PARTS]
        head = parts.get("vocabulary head", 0.0)
        lines.append(
            f"| {row['threads']} | {row['batch']} | {row['model']} | {' | '.join(cells)} |"
            f" {head:.1f} |"
        )
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=45, help="stop a cell after this long")
    parser.add_argument("--quick", action="store_true", help="three rounds of batch 1, one thread")
    parser.add_argument("--out", type=Path, help="folder of the results (default: beside this)")
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(options, parser, threads=[1], batch=[1], rounds=3)
        options.out = options.out or temporary()
    return options


def main(argv: list[str] | None = None) -> None:
    import torch
    import transformers

    options = parse(argv)
    if options.quick:
        options.threads, options.batch, options.rounds = [1], [1], 3
    where = machine() | {
        "blas": blas_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    torches = torch_models(options.tiny)
    rows = [
        row
        for threads in options.threads
        for batch in options.batch
        for row in cell(threads, batch, torches, options)
    ]
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    folder = options.out or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{today}-bert-cpu"
    document = {"machine": where, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(page(rows, where))
    print(f"wrote {stem}.md and .json; {os.path.basename(__file__)} is done")


if __name__ == "__main__":
    main()
