"""What do fast feedforward layers give, and what do they cost? The controls, trained.

    python studies/fff/run.py plan
    python studies/fff/run.py all --data ../shared/data --work runs/fff --out runs/out
    python studies/fff/run.py train --parts deep,middle --devices cuda:0 --lanes 3 --after 15
    python studies/fff/run.py report --out benchmarks/results/DATE-DEVICE

`all` is prepare (texts to token shards, byte pairs for the causal models and WordPiece for the
encoders), train (every cell of plan.py through `nomatmul compare`'s own code, two at a
time on each GPU), glue (the kept encoders on SST-2 and CoLA) and ship (the best union model beside
its GLU twin at equal parameters and tokens), and ends --seconds after its start. Rows go to
OUT/fff-study-rows.jsonl as they are measured and are not measured again: the same command goes on
where an earlier one ran out of time. `report` needs the rows only (page.py, page.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks import dry_run
from benchmarks.documents import HELD_OUT, TRAIN, target, write_missing
from benchmarks.gpu_common import environment, git_commit
from benchmarks.with_parent import with_parent
from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows
from nomatmul.formats.cpus import usable_cpus
from studies.compare.arguments import settle, study_parser
from studies.compare.plan import BYTE_PAIRS, missing
from studies.compare.pool import PoolOptions, run_pool
from studies.fff import page, ship
from studies.fff.glue import fine_tune
from studies.fff.plan import AGAIN, CHECKED, FINE_TUNED, FIRST, VOCABULARY, plan

WORK = "runs/fff"
KINDS = ("bytes", "pieces")


def prepare(args: argparse.Namespace) -> None:
    """Texts to JSONL (a row a document), then both kinds of tokens, side by side.

    Where --data has tokens-bytes.tar.xz and tokens-pieces.tar.xz (see `archive`) those are taken.
    """
    began = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    archives = [file for kind in KINDS for file in args.data.glob(f"tokens-{kind}.tar.*")]
    if len(archives) == len(KINDS):
        words = [["tar", "-xf", str(file), "-C", str(args.work)] for file in archives]
        children = [subprocess.Popen(command) for command in words]
        codes = [child.wait() for child in children]
        if any(codes):
            raise SystemExit("the archives of tokens could not be read; see above")
        print(f"tokens: {time.monotonic() - began:.0f} s", flush=True)
        return
    names = (*(args.train or TRAIN), *HELD_OUT.values())
    write_missing(args.data, names, args.work / "texts")
    print(f"texts: {time.monotonic() - began:.0f} s", flush=True)
    # Two processes: each of them has a pool of its own, and neither may be a daemon of the other.
    words = [sys.executable, str(Path(__file__)), "tokens", "--data", str(args.data)]
    words += ["--work", str(args.work), *(["--train", *args.train] if args.train else []), "--kind"]
    children = [subprocess.Popen([*words, kind], preexec_fn=with_parent()) for kind in KINDS]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit("the texts could not be made into tokens; see above")
    print(f"tokens: {time.monotonic() - began:.0f} s", flush=True)


def tokens(args: argparse.Namespace) -> None:
    """The shards of one kind: "bytes" (byte pairs, the box's tokenizer) or "pieces" (WordPiece)."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import build_shards, read_index
    from nomatmul.train.tokenizer import load_tokenizer, train_word_piece

    texts = args.work / "texts"
    sources = find_sources([str(target(texts, name)) for name in args.train or TRAIN])
    if args.kind == "bytes":
        tokenizer = load_tokenizer(BYTE_PAIRS)
    elif (args.data / "wordpiece-8192.json").exists():
        # Made by the line below from the same texts: half a minute that a GPU need not wait for.
        tokenizer = load_tokenizer(args.data / "wordpiece-8192.json")
    else:
        tokenizer = train_word_piece(sources, VOCABULARY)
    workers = max(usable_cpus() // 2, 1)
    build_shards(sources, tokenizer, args.work / f"train-{args.kind}", workers=workers)
    for label, name in HELD_OUT.items():
        held = find_sources([str(target(texts, name))])
        build_shards(held, tokenizer, args.work / f"valid-{args.kind}-{label}", workers=1)
    count = read_index(args.work / f"train-{args.kind}")["tokens"]
    print(f"{args.kind}: {count:,} tokens", flush=True)


def archive(args: argparse.Namespace) -> None:
    """tokens-KIND.tar.xz in --data from what `prepare` made in --work: a GPU need not wait."""
    for kind in KINDS:
        names = [f"train-{kind}", *(f"valid-{kind}-{label}" for label in HELD_OUT)]
        file = args.data / f"tokens-{kind}.tar.xz"
        subprocess.run(["tar", "-cJf", str(file), "-C", str(args.work), *names], check=True)
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB", flush=True)


def show_plan(args: argparse.Namespace) -> None:
    """Print the cells in the order in which they are trained."""
    rows = []
    total = 0.0
    for cell in plan(args):
        config = cell.train_config
        amount = config.steps * config.tokens_per_step * len(cell.seeds)
        total += amount
        seeds = ", ".join(map(str, cell.seeds))
        rate = f"{config.learning_rate:g}"
        numbers = [cell.neurons, cell.active, f"{amount / 1e6:.0f}M"]
        rows.append([cell.section, cell.stage, cell.label, *numbers, seeds, rate])
    header = ["section", "stage", "channel mixer", "neurons", "active", "tokens", "seeds", "rate"]
    print("\n".join(table(header, rows)))
    print(f"\n{len(rows)} cells, {total / 1e6:.0f}M tokens; at most {args.seconds:.0f} s")


def train(args: argparse.Namespace) -> None:
    """All runs that --out has no row of yet, until the time that the later stages need."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows_file = args.out / "fff-study-rows.jsonl"
    todo = missing(read_rows(rows_file), plan(args))
    print(f"to do: {sum(len(cell.seeds) for cell in todo)} runs", flush=True)
    with open(args.out / "fff-study.log", "ab") as log:
        options = PoolOptions(
            args.devices,
            lanes=args.lanes,
            ahead=args.ahead,
            deadline=args.began + args.seconds - args.after,
            cache=args.work,
            program="studies.fff.trainer",
        )
        if failed := run_pool(todo, options, log, lambda text: _log(args, text)):
            print(f"{len(failed)} cells failed; the log's end:", flush=True)
            print((args.out / "fff-study.log").read_text("utf-8", "replace")[-3000:], flush=True)
    done = [row for row in read_rows(rows_file) if row["status"] == "ok"]
    print(f"{_clock(args)} {len(done)} runs have ended", flush=True)


def glue_and_ship(args: argparse.Namespace) -> None:
    """The last stage: fine-tuning on all GPUs, and the two long runs beside it."""
    pair = ship.commands(args) if args.ship else []
    jobs = [subprocess.Popen(command, env=env, preexec_fn=with_parent()) for command, env in pair]
    try:
        fine_tune(args)
    finally:
        for job in jobs:
            try:
                job.wait(timeout=max(args.began + args.seconds + 25 - time.time(), 1))
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()


def _log(args: argparse.Namespace, text: str) -> None:
    print(f"{_clock(args)} {text}", flush=True)


def _clock(args: argparse.Namespace) -> str:
    return f"[{time.time() - args.began:4.0f} s]"


def write_machine(args: argparse.Namespace) -> None:
    """What the rows were measured on; machines of earlier runs are kept beside it."""
    file = args.out / "fff-study-machine.json"
    about: dict[str, Any] = environment(args.commit)
    about["devices"] = list(args.devices)
    if file.exists():
        earlier = json.loads(file.read_text())
        about["earlier"] = [*earlier.pop("earlier", []), earlier]
    file.write_text(json.dumps(about, indent=1) + "\n")


def report(args: argparse.Namespace) -> None:
    """Tables of page.md and the plots from the rows in --out."""
    page.write(args.out, args.page)


def everything(args: argparse.Namespace) -> None:
    """prepare, train, glue and ship; a short table last."""
    args.out.mkdir(parents=True, exist_ok=True)
    write_machine(args)
    prepare(args)
    print(f"{_clock(args)} prepared", flush=True)
    train(args)
    glue_and_ship(args)
    page.short_table(args.out)
    print(f"{_clock(args)} end", flush=True)


# Of a dry run: one encoder, trained for a few steps and fine-tuned on invented tasks.
TINY: dict[str, Any] = {
    "step": "all", "devices": "cpu", "sections": "encoder", "cells": ["encoder:dense:1"],
    "probes": "", "encoder_tokens": 512.0, "length": 64, "batch": 2, "warmup": 1,
    "eval_tokens": 200.0, "points": 1, "lanes": 1, "ahead": 0, "after": 60, "glue_seeds": 1,
    "glue_models": "dense", "jobs": 2, "seconds": 600.0,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this study alone is asked."""
    parser.add_argument("--page", type=Path, default=page.PAGE, help="of `report`")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time on a GPU")
    parser.add_argument("--ahead", type=int, default=4, help="further cells that compile")
    parser.add_argument("--sections", default=",".join(FIRST))
    parser.add_argument("--tokens", type=float, default=26e6, help="of a run")
    parser.add_argument("--encoder-tokens", type=float, default=16e6, help="of an encoder's run")
    parser.add_argument("--ternary-tokens", type=float, default=13e6, help="of a ternary run")
    parser.add_argument("--cells", nargs="+", help="these alone, as SECTION:VARIANT:SEED,SEED")
    parser.add_argument("--parts", default="", help=f"of the second look: {','.join(AGAIN)}")
    parser.add_argument("--rate-tokens", type=float, default=5e6, help="of a try of a rate")
    parser.add_argument("--probes", default=",".join(CHECKED), help="sections to try rates in")
    parser.add_argument("--probe-first", action="store_true", help="rates before more variants")
    parser.add_argument("--first-only", action="store_true", help="no variants with one seed")
    parser.add_argument("--ship", action="store_true", help="train the union pair last")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each main variant")
    parser.add_argument("--more-seeds", type=int, default=1, help="at most, if there is time")
    parser.add_argument("--length", type=int, default=512, help="causal; an encoder has a quarter")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--warmup", type=int, default=80, help="optimiser steps")
    parser.add_argument("--eval-tokens", type=float, default=1e6, help="at most, a held-out text")
    parser.add_argument("--points", type=int, default=8, help="looks at the held-out text")
    parser.add_argument("--implementation", default="masked", help="of trees in training")
    parser.add_argument("--seconds", type=float, default=300, help="of all stages")
    parser.add_argument("--after", type=float, default=75, help="of these, for the last stage")
    parser.add_argument("--glue-seeds", type=int, default=3, help="fine-tuning runs of a task")
    parser.add_argument("--glue-models", default=",".join(FINE_TUNED))
    parser.add_argument("--jobs", type=int, default=6, help="fine-tuning processes a GPU")
    parser.add_argument("--ship-rate", type=float, default=3.4e-3)
    parser.add_argument("--kind", choices=("bytes", "pieces"), default="bytes")


def parse(argv: list[str] | None) -> argparse.Namespace:
    steps = {
        "prepare": prepare, "tokens": tokens, "archive": archive, "plan": show_plan, "train": train,
        "last": glue_and_ship, "all": everything, "report": report,
    }  # fmt: skip
    parser = study_parser(__doc__, steps, WORK)
    add_options(parser)
    args = parser.parse_args(argv)
    if settle(args, parser, steps, WORK, TINY):
        dry_run.write_glue(args.data / "glue")
    args.sections = args.sections.split(",")
    args.probes = [name for name in args.probes.split(",") if name]
    args.parts = [name for name in args.parts.split(",") if name]
    if unknown := set(args.parts) - set(AGAIN):
        parser.error(f"unknown part {unknown.pop()!r}: choose of {', '.join(AGAIN)}")
    args.commit = args.commit or git_commit()
    if unknown := set(args.sections) - set(FIRST) - {"none"}:
        parser.error(f"unknown section {unknown.pop()!r}: choose of {', '.join(FIRST)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.action(args)


if __name__ == "__main__":
    main()
