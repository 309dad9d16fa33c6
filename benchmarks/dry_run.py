"""What the dry runs (--tiny) of all scripts share: the option, a folder, invented texts.

A library. A dry run needs no other argument, no GPU and no data; it says that a script starts and
writes what it should, and nothing about speed or quality.
"""

from __future__ import annotations

import argparse
import bz2
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

_WORDS = ("a", "the", "old", "lamp", "river", "signal", "under", "near", "opens", "keeps", "slowly")


def add_tiny(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tiny", action="store_true",
        help="dry run: toy sizes on the CPU, into a temporary folder without --out",
    )  # fmt: skip


def temporary() -> Path:
    """A new folder that stays, for whoever wants to look at what a dry run wrote."""
    return Path(tempfile.mkdtemp(prefix="nomatmul-tiny-"))


def write_texts(folder: Path, names: Iterable[str], articles: int = 60) -> None:
    """NAME.txt.bz2 of invented articles in `folder`, in the form of the studies' texts."""
    choose = random.Random(0)
    for name in names:
        parts = []
        for number in range(articles):
            lines = [" ".join(choose.choices(_WORDS, k=12)).capitalize() for _ in range(8)]
            parts.append(f"= Article {number} =\n" + ".\n".join(lines) + ".\n")
        path = folder / f"{name}.txt.bz2"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bz2.compress("".join(parts).encode()))


def shrink(args: argparse.Namespace, parser: argparse.ArgumentParser, **values: object) -> None:
    """Give options the values of a dry run where the command line left their defaults."""
    for name, value in values.items():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, value)


def newest_results(target: Path | None) -> Path:
    """A copy of the newest GPU results of the repository, in `target` or a temporary folder."""
    folder = max(Path(__file__).parent.glob("results/*-h200"))
    return Path(shutil.copytree(folder, target or temporary(), dirs_exist_ok=True))


def folders(args: argparse.Namespace, texts: Iterable[str]) -> None:
    """--out, --work and --data of a dry run where they were not given; invents the texts."""
    args.out = args.out or temporary()
    args.work = args.work or args.out / "work"
    if args.data is None:
        args.data = args.out / "data"
        write_texts(args.data, texts)


def write_glue(folder: Path) -> None:
    """Invented files of CoLA and SST-2 in GLUE's own form."""
    choose = random.Random(1)
    for part, count in (("train", 48), ("dev", 16)):
        texts = [" ".join(choose.choices(_WORDS, k=6)) for _ in range(count)]
        cola = [f"x\t{n % 2}\t\t{text}" for n, text in enumerate(texts)]
        sst2 = ["sentence\tlabel", *(f"{text}\t{n % 2}" for n, text in enumerate(texts))]
        for task, lines in (("CoLA", cola), ("SST-2", sst2)):
            path = folder / task / f"{part}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", "utf-8")
