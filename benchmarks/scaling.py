"""Does it learn? MatMul-free LM and Transformer++ at several sizes on the same tokens.

    python benchmarks/scaling.py plan
    python benchmarks/scaling.py all --data ../shared/data --work runs/scaling --out runs/out

`all` is prepare (texts to token shards, about half a minute on 32 cores), run and fit, one after
the other, and ends --seconds after its start. Each architecture has the same number of learning
rates to try at each size on a short budget; the best one trains the final runs, one for each seed.
Sizes share layers and width, so their parameter counts differ only by norms and gates' bounds.
Rows go to OUT/scaling-rows.jsonl as they are measured; `fit` makes scaling.json, scaling.md and
the plots of them.

One process holds one architecture at one size. Each GPU has two lanes of processes, so that one
computes while the other compiles; the first GPU has MatMul-free models and the second, if there is
one, their twins, so that a run that is cut short is cut alike for both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import scaling_fit
from box_model import _write_documents
from gpu_common import ROOT, environment, table

TRAIN = ("wikipedia-en-2015/train-00", "wikipedia-en-2015/train-01", "english-novels-98/train")
HELD_OUT = {"wikipedia": "wikipedia-en-2015/valid", "novels": "english-novels-98/valid"}
TOKENIZER = ROOT / "src/nomatmul/box/tokenizer.json"
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


def prepare(args: argparse.Namespace) -> None:
    """Texts to JSONL (a row a document) to token shards, with the box's tokenizer."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import build_shards, read_index
    from nomatmul.train.tokenizer import load_tokenizer

    began = time.monotonic()
    texts = args.work / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    names = args.train or TRAIN
    target = {n: texts / (n.replace("/", "-") + ".jsonl") for n in (*names, *HELD_OUT.values())}
    jobs = [(args.data / f"{n}.txt.bz2", path) for n, path in target.items() if not path.exists()]
    with ProcessPoolExecutor(min(len(jobs) or 1, os.cpu_count() or 1)) as pool:
        list(pool.map(_write_documents, jobs))
    print(f"texts: {time.monotonic() - began:.0f} s", flush=True)
    tokenizer = load_tokenizer(TOKENIZER)
    build_shards(find_sources([str(target[n]) for n in names]), tokenizer, args.work / "train")
    for label, name in HELD_OUT.items():
        sources = find_sources([str(target[name])])
        build_shards(sources, tokenizer, args.work / f"valid-{label}", workers=1)
    tokens = read_index(args.work / "train")["tokens"]
    print(f"tokens: {tokens:,}, {time.monotonic() - began:.0f} s", flush=True)


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


def lanes(work: list[dict[str, Any]], devices: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Two lanes an architecture: (device, cells one after the other), of about equal length.

    With one device all four lanes share it.
    """
    out = []
    for number, arch in enumerate(CENTRE):
        mine = sorted((c for c in work if c["arch"] == arch), key=predicted, reverse=True)
        pair: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for cell in mine:
            min(pair, key=lambda lane: sum(map(predicted, lane))).append(cell)
        for lane in pair:
            out.append((devices[number % len(devices)], sorted(lane, key=predicted)))
    return [lane for lane in out if lane[1]]


def plan(args: argparse.Namespace) -> None:
    """Print the cells, the lanes and the time that they are expected to take."""
    work = cells(args)
    rows = []
    for cell in work:
        model = cell["model"]
        shape = f"{model['num_layers']} x {model['hidden_size']}"
        tries = ", ".join(f"{rate:g}" for rate in cell["rates"])
        rows.append([cell["arch"], cell["size"], shape, tries, f"{predicted(cell):.0f}"])
    print("\n".join(table(["architecture", "size", "shape", "rates", "GPU seconds"], rows)))
    print(
        f"\nsteps of {args.batch} x {args.length} tokens; {args.rates} tuning runs of "
        f"{args.tune_tokens / 1e6:g}M tokens and {args.seeds} final runs of {args.tokens / 1e6:g}M "
        "a cell, at most one epoch; one more rate where the best lies at the edge"
    )
    for device, lane in lanes(work, args.devices):
        names = ", ".join(f"{c['arch']} {c['size']}" for c in lane)
        print(f"{device}: {names}: {sum(map(predicted, lane)):.0f} s of the GPU")
    total = sum(map(predicted, work)) / len(args.devices)
    print(f"expected: {total:.0f} s on {len(args.devices)} GPUs, and 20-60 s to compile")


def run(args: argparse.Namespace) -> None:
    """All cells, then more seeds while there is time; a lane is a thread that starts processes."""
    args.out.mkdir(parents=True, exist_ok=True)
    about = environment(args.commit)
    (args.out / "scaling-machine.json").write_text(json.dumps(about, indent=1) + "\n")
    deadline = args.began + args.seconds
    log = open(args.out / "scaling.log", "ab")  # noqa: SIM115 (all lanes write to it)
    threads = [
        threading.Thread(target=_lane, args=(args, device, work, number, deadline, log))
        for number, (device, work) in enumerate(lanes(cells(args), args.devices))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    print((args.out / "scaling.log").read_text("utf-8", "replace")[-8000:])


def _lane(
    args: argparse.Namespace,
    device: str,
    work: list[dict[str, Any]],
    number: int,
    deadline: float,
    log: Any,
) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")]),
        "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "6",
        "TRITON_CACHE_DIR": str(args.work / "triton"),
        "NOMATMUL_OPS": args.ops,
        "OMP_NUM_THREADS": "1" if device == "cpu" else "6",
        "PYTHONUNBUFFERED": "1",
    }
    if device != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    first = [{**cell, "tune": True} for cell in work]
    more = [
        {**cell, "tune": False, "seeds": [args.seeds + n]}
        for n in range(1, 1 + args.more_seeds)
        for cell in work
    ]
    for cell in first + more:
        left = deadline - time.time()
        # Not worth a start: the process needs some 20 s before its first step.
        if left < (1 if device == "cpu" else 20 + predicted(cell) / 4):
            continue
        cell = {**cell, "deadline": deadline, "device": "cpu" if device == "cpu" else "cuda"}
        command = [sys.executable, str(ROOT / "benchmarks/scaling_cell.py"), json.dumps(cell)]
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                code = process.wait(timeout=left + 15)
            except subprocess.TimeoutExpired:
                process.kill()
                code = -9
        if code:
            print(f"lane {number}: {cell['arch']} {cell['size']} ended with {code}", flush=True)


def fit(args: argparse.Namespace) -> None:
    """Curves, gaps, plots and the page from the rows in --out."""
    scaling_fit.report(args.out)


def everything(args: argparse.Namespace) -> None:
    """prepare, run and fit."""
    prepare(args)
    plan(args)
    run(args)
    fit(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"prepare": prepare, "plan": plan, "run": run, "fit": fit, "all": everything}
    parser.add_argument("step", choices=steps)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), help="tokens, caches")
    parser.add_argument("--out", type=Path, default=Path("runs/out"), help="rows, plots")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="cuda:0,cuda:1 or cpu")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--tokens", type=float, default=40e6, help="of a final run")
    parser.add_argument("--tune-tokens", type=float, default=10e6, help="of a tuning run")
    parser.add_argument("--rates", type=int, default=3, help="learning rates to try in each cell")
    parser.add_argument("--seeds", type=int, default=2, help="final runs of each cell")
    parser.add_argument("--more-seeds", type=int, default=2, help="at most, if there is time")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=80, help="optimiser steps")
    parser.add_argument("--eval-tokens", type=float, default=2e6, help="at most, a held-out text")
    parser.add_argument("--seconds", type=float, default=530, help="training ends then")
    parser.add_argument("--compile", choices=("blocks", "whole", "off"), default="blocks")
    parser.add_argument("--ops", choices=("", "naive", "triton"), default="", help="NOMATMUL_OPS")
    parser.add_argument("--train", nargs="+", help="other training texts, below --data")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a dry run")
    args = parser.parse_args()
    args.began = time.time()
    args.sizes = args.sizes.split(",")
    args.devices = args.devices.split(",")
    args.action = steps[args.step]
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"unknown size {unknown.pop()!r}: choose of {', '.join(SIZES)}")
    return args


def main() -> None:
    args = parse()
    args.action(args)


if __name__ == "__main__":
    main()
