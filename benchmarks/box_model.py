"""Make the model in the box again: texts, tokens, two training runs, packing, scores, card.

    python benchmarks/box_model.py prepare --data ../shared/data --work runs/box
    python benchmarks/box_model.py train   --work runs/box --seconds 466 --gpus 0,1
    python benchmarks/box_model.py pack    --work runs/box
    python benchmarks/box_model.py score   --work runs/box --data ../shared/data

`train` runs recipe `box` (MatMul-free LM) and its twin `transformer_box` (Transformer++) on the
same tokens, side by side on two GPUs or one after the other on one; `--recipes box` runs the first
alone, as the model in the box was made. The schedule follows the clock, so both get the same time.
`score` writes the held-out bits per byte of both, and of the packed model. --tiny takes all four
steps with a toy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from documents import target, write_documents
from dry_run import add_tiny, folders
from with_parent import with_parent

VOCABULARY = 8192
TRAIN = (
    *(f"wikipedia-en-2015/train-{part:02d}" for part in range(6)),
    "english-novels-98/train",
    "eltec-eng/train",
)
HELD_OUT = (
    "wikipedia-en-2015/valid",
    "wikipedia-en-2015/test",
    "english-novels-98/valid",
    "english-novels-98/test",
)
RUNS = {"box": "mlgru", "transformer_box": "transformer"}  # recipe -> folder


def prepare(args: argparse.Namespace) -> None:
    """Texts to JSONL (a row a document), a tokenizer unless one is given, token shards."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import build_shards
    from nomatmul.train.tokenizer import load_tokenizer, train_tokenizer

    started = time.monotonic()
    (args.work / "texts").mkdir(parents=True, exist_ok=True)
    jobs = [
        (args.data / f"{name}.txt.bz2", target(args.work / "texts", name))
        for name in TRAIN + HELD_OUT
        if not (args.partial and not (args.data / f"{name}.txt.bz2").exists())
    ]
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(write_documents, jobs))
    print(f"texts: {sum(sizes):,} characters, {time.monotonic() - started:.0f} s", flush=True)

    training = [target(args.work / "texts", name) for name in TRAIN]
    sources = find_sources([str(path) for path in training if path.exists()])
    file = args.work / "tokenizer.json"
    if args.tokenizer:
        file.write_bytes(args.tokenizer.read_bytes())
    elif not file.exists():
        train_tokenizer(sources, VOCABULARY).save(str(file))
        print(f"tokenizer: {time.monotonic() - started:.0f} s", flush=True)
    if args.no_tokens:
        return
    tokenizer = load_tokenizer(file)
    held_out = [target(args.work / "texts", name) for name in HELD_OUT if name.endswith("valid")]
    build_shards(sources, tokenizer, args.work / "tokens")
    build_shards(find_sources([str(path) for path in held_out]), tokenizer, args.work / "valid")
    index = json.loads((args.work / "tokens" / "index.json").read_text())
    print(f"tokens: {index['tokens']:,}, {time.monotonic() - started:.0f} s", flush=True)


def train(args: argparse.Namespace) -> None:
    """The runs: side by side when two GPUs are named, else one after the other."""
    gpus = args.gpus.split(",")
    running: list[subprocess.Popen[bytes]] = []
    for number, recipe in enumerate(args.recipes):
        folder = RUNS[recipe]
        command = [
            sys.executable, "-m", "nomatmul", "train", recipe,
            "--data", str(args.work / "tokens"), "--valid", str(args.work / "valid"),
            "--out", str(args.work / folder), "--set", f"time_limit={args.seconds}", *args.extra,
        ]  # fmt: skip
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
        with open(args.work / f"{folder}.log", "ab") as log:
            running.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    preexec_fn=with_parent(),
                )
            )  # fmt: skip
        if len(gpus) == 1:
            running[-1].wait()
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"training ended with exit codes {codes}; see {args.work}/*.log")


def pack(args: argparse.Namespace) -> None:
    """Pack the MatMul-free model as the package carries it: 1.6 bits a weight, int8 embedding."""
    subprocess.run(
        [sys.executable, "-m", "nomatmul", "pack", str(args.work / "mlgru"),
         str(args.work / "packed"), "--packing", "1.6bit", "--embedding", "int8"],
        check=True,
    )  # fmt: skip


def score(args: argparse.Namespace) -> None:
    """Bits per byte on the held-out texts, one file a model: scores-MODEL.json."""
    for label in args.models:
        model = args.work / label / ("" if label == "packed" else "model")
        scores = {}
        for name in HELD_OUT:
            command = [
                sys.executable, "-m", "nomatmul", "eval", "--json", "--model", str(model),
                "--text", str(args.data / f"{name}.txt.bz2"),
            ]  # fmt: skip
            if args.max_tokens:
                command += ["--max-tokens", str(args.max_tokens)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            scores[name] = json.loads(result.stdout)
            print(name, label, f"{scores[name]['bits_per_byte']:.4f}", flush=True)
        (args.work / f"scores-{label}.json").write_text(json.dumps(scores, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="with --tiny: folder of the experiment")
    add_tiny(parser)
    steps = parser.add_subparsers(metavar="STEP")
    for step in (prepare, train, pack, score):
        sub = steps.add_parser(step.__name__, help=(step.__doc__ or "").strip())
        sub.set_defaults(step=step)
        sub.add_argument("--work", type=Path, required=True, help="folder of this experiment")
        if step in (prepare, score):
            sub.add_argument("--data", type=Path, required=True, help="folder of the texts")
        if step is prepare:
            sub.add_argument("--tokenizer", type=Path, help="use this tokenizer.json")
            sub.add_argument("--partial", action="store_true", help="skip texts that are absent")
            sub.add_argument("--no-tokens", action="store_true", help="stop after the tokenizer")
        if step is train:
            sub.add_argument("--seconds", type=int, default=466, help="of each run's loop")
            sub.add_argument("--recipes", nargs="+", choices=RUNS, default=list(RUNS))
            sub.add_argument("--gpus", default="0", help="one or two device numbers: 0 or 0,1")
            sub.add_argument("extra", nargs="*", help="more options of `nomatmul train`, after --")
        if step is score:
            sub.add_argument("--models", nargs="+", default=["mlgru", "transformer", "packed"])
            sub.add_argument("--max-tokens", type=int, default=0, help="score this many at most")
    args = parser.parse_args(argv)
    if args.tiny:
        return rehearse(args.out)
    if not hasattr(args, "step"):
        parser.error("a step is needed: prepare, train, pack or score")
    args.step(args)


def rehearse(out: Path | None) -> None:
    """All steps on invented texts: one toy model, trained for a few steps."""
    args = argparse.Namespace(out=out, work=None, data=None)
    folders(args, (*TRAIN, *HELD_OUT))
    settings = {
        "model.hidden_size": 64, "model.num_layers": 1, "sequence_length": 16, "batch_size": 4,
        "micro_batch_size": 4, "warmup_steps": 1, "eval_interval": 0, "sample_interval": 0,
        "diagnostics_interval": 0, "compile": "off",
    }  # fmt: skip
    extra = ["--device", "cpu", "--steps", "3", "--override-config", "--quiet"]
    extra += [f"--set={name}={value}" for name, value in settings.items()]
    dials = {
        "tokenizer": None, "partial": False, "no_tokens": False, "seconds": 0, "recipes": ["box"],
        "gpus": "", "extra": extra, "models": ["packed"], "max_tokens": 64,
    }  # fmt: skip
    for name, value in dials.items():
        setattr(args, name, value)
    for step in (prepare, train, pack, score):
        print(f"{step.__name__}: {(step.__doc__ or '').splitlines()[0]}", flush=True)
        step(args)


if __name__ == "__main__":
    main()
