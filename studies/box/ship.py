"""Put a packed model into the box: its files, its card, its attribution.

    python studies/box/ship.py --packed DIR --to src/nomatmul/box-talk --data TEXTS \\
        --judged judge.json --tuned tune.json --cell NAME --base "330M tokens of ..."
    python studies/box/ship.py --packed DIR --to src/nomatmul/box-encoder --data TEXTS \\
        --scores benchmarks/results/2026-12-01-recipes-encoder
    python studies/box/ship.py --packed DIR --to src/nomatmul/box --data TEXTS --card CARD.md

--judged (benchmarks/judge.py) and --tuned (tune.py) fill card-talk.md, --scores (those of
recipes/encoder.py) card-encoder.md; --card is a card that is written already. The folder at --to is
replaced as a whole, and only where all models of the package stay within 30 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks import judge
from benchmarks.dry_run import add_tiny, temporary, write_conversations, write_talker
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import directory_bytes
from nomatmul.formats.packed.reader import PackedReader
from studies.recipes import encoder_page

HERE = Path(__file__).parent
TOTAL = 30 * 10**6  # bytes of all models in the package
_TASKS = """Tasks: the weights before
packing, fine-tuned on {rows:,} rows for {epochs} epoch(s) of bfloat16 with batches of 32, the rate
chosen on held-out training rows; scored on the development set, whose labels chose no setting."""
AUTHORS = "stories-open/storybooks/ATTRIBUTION.tsv"


def card(args: argparse.Namespace, size: int) -> str:
    """card-talk.md with the figures of the model."""
    config = PackedReader(args.packed).config
    judged = json.loads(args.judged.read_text("utf-8"))
    rows = json.loads(args.tuned.read_text("utf-8"))
    (row,) = [row for row in rows if row["cell"] == args.cell]
    weights = (
        config.vocab_size * config.hidden_size * 2
        + config.num_layers
        * config.hidden_size
        * (4 * config.hidden_size + 3 * config.intermediate_size)
    )
    figures: dict[str, Any] = {
        "millions": weights / 1e6, "layers": config.num_layers, "width": config.hidden_size,
        "intermediate": config.intermediate_size, "vocabulary": config.vocab_size,
        "size": size / 1e6, "base": args.base, "cells": len(rows), **judged["settings"], **row,
        "tokens": row["tokens_seen"] // row["epochs"], "table": judge.table(judged),
        "samples": judge.samples(judged),
    }  # fmt: skip
    return (HERE / "card-talk.md").read_text("utf-8").format(**figures)


def encoder_card(args: argparse.Namespace, size: int) -> str:
    """card-encoder.md with the figures of the model."""
    reader = PackedReader(args.packed)
    config = reader.config
    tree, master = 2 ** (config.fff_depth + 1) - 1, config.fff_master_width
    tuned = encoder_page.read(args.scores, "sst2").get("trees", {})
    tasks = _TASKS.format(**tuned) if tuned else "SST-2 was not measured."
    figures: dict[str, Any] = {
        "active": config.fff_trees * (config.fff_depth + 1) + master, "trees": config.fff_trees,
        "neurons": config.fff_trees * tree + master, "depth": config.fff_depth, "master": master,
        "layers": config.num_layers, "width": config.hidden_size, "heads": config.num_heads,
        "positions": config.max_position_embeddings, "vocabulary": config.vocab_size,
        "millions": config.param_count() / 1e6, "size": size / 1e6, "tasks": tasks,
        "table": encoder_page.table(args.scores),
    }  # fmt: skip
    return (HERE / "card-encoder.md").read_text("utf-8").format(**figures)


def authors(data: Path) -> str:
    """Title, makers and licence of each storybook; their places in the collections left out."""
    lines = (data / AUTHORS).read_text("utf-8").splitlines()
    return "".join(line.partition("\t")[2] + "\n" for line in lines)


def ship(args: argparse.Namespace) -> None:
    new = args.to.with_name(args.to.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(args.packed, new)
    write_file(new / "ATTRIBUTION.md", (HERE / "attribution.md").read_bytes())
    write_file(new / "storybooks.tsv", authors(args.data).encode("utf-8"))
    if args.card:
        written = args.card.read_text("utf-8")
    else:
        written = (encoder_card if args.scores else card)(args, directory_bytes(new))
    write_file(new / "README.md", written.encode("utf-8"))
    boxes = {
        path.name: directory_bytes(path) for path in args.to.parent.glob("box*") if path != new
    }
    boxes[args.to.name] = directory_bytes(new)
    if sum(boxes.values()) > TOTAL:
        shutil.rmtree(new)
        raise ValueError(
            f"the models of the package would have {sum(boxes.values()):,} bytes: {boxes}"
        )
    PackedReader(new)  # raises ValueError for what is damaged
    if args.to.exists():
        shutil.rmtree(args.to)
    new.rename(args.to)
    print(f"{args.to}: {boxes[args.to.name]:,} bytes; all models {sum(boxes.values()):,}")


def tiny(args: argparse.Namespace) -> None:
    """A talker of random weights with figures that judge.py counted."""
    work = (args.out or temporary()) / "work"
    file = write_conversations(work / "chat.jsonl", 8)
    args.packed, args.to = write_talker(work / "model", file), work.parent / "box-talk"
    words = [str(args.packed), "--held-out", str(file), "--turns", "3", "--max-tokens", "5"]
    judge.write(judge.judge(judge.parse([*words, "--threads", "1"])), work)
    row = {"cell": "tiny", "rate": 1e-3, "epochs": 1, "steps": 1, "seconds": 1.0,
           "conversations": 8, "tokens_seen": 100}  # fmt: skip
    args.judged, args.tuned = work / "judge.json", work / "tune.json"
    args.tuned.write_text(json.dumps([row]))
    args.cell, args.base, args.data = "tiny", "invented words.", work / "data"
    (args.data / AUTHORS).parent.mkdir(parents=True)
    (args.data / AUTHORS).write_text("source file\ttitle\ttext by\nx.md\tA lamp\tNobody\n")
    ship(args)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packed", type=Path, help="the packed model")
    parser.add_argument("--to", type=Path, help="the folder in the package")
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--judged", type=Path, help="figures of benchmarks/judge.py")
    parser.add_argument("--tuned", type=Path, help="rows of tune.py")
    parser.add_argument("--cell", help="the row of this model")
    parser.add_argument("--base", help="what the base was trained on, a sentence or two")
    parser.add_argument("--scores", type=Path, help="folder of an encoder's scores")
    parser.add_argument("--card", type=Path, help="a card in place of card-talk.md")
    parser.add_argument("--out", type=Path, help="folder of a dry run")
    add_tiny(parser)
    args = parser.parse_args(words)
    if args.tiny:
        tiny(args)
        return
    needed = ["packed", "to", "data"] + (
        [] if args.card or args.scores else ["judged", "tuned", "cell", "base"]
    )
    if missing := [name for name in needed if getattr(args, name) is None]:
        parser.error(f"--{missing[0]} is missing")
    ship(args)


if __name__ == "__main__":
    main()
