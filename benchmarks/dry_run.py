"""What the dry runs (--tiny) of all scripts share: the option, a folder, invented texts.

A library. A dry run needs no other argument, no GPU and no data; it says that a script starts and
writes what it should, and nothing about speed or quality.
"""

from __future__ import annotations

import argparse
import bz2
import json
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


def write_conversations(file: Path, count: int) -> Path:
    """Invented conversations, rows of messages."""
    choose = random.Random(0)

    def said() -> str:
        return " ".join(choose.choices(_WORDS, k=6)).capitalize() + "."

    roles = ("user", "assistant", "user", "assistant")
    rows = [{"messages": [{"role": role, "content": said()} for role in roles]}
            for _ in range(count)]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def write_talker(directory: Path, conversations: Path) -> Path:
    """A packed model of random weights with a chat template, its tokenizer from conversations."""
    from nomatmul.engine.random_weights import random_weights
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.packed import Forms, PackedWriter
    from nomatmul.formats.special_tokens import CHAT_TOKENS
    from nomatmul.train.conversations import DEFAULT_TEMPLATE, write_chat
    from nomatmul.train.documents import find_sources
    from nomatmul.train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(find_sources([str(conversations)]), 300, CHAT_TOKENS)
    beside = directory.with_name(f"{directory.name}-tokenizer")
    beside.mkdir(parents=True)
    tokenizer.save(str(beside / "tokenizer.json"))
    write_chat(beside, tokenizer, DEFAULT_TEMPLATE)
    config = ModelConfig(
        vocab_size=300, hidden_size=32, num_layers=1, intermediate_size=32, bos_token_id=0,
        eos_token_id=[5, 0], pad_token_id=1,
    )  # fmt: skip
    forms = Forms.of(config, ternary="1.6bit", embedding="int8", head="int8")
    weights = random_weights(config, forms, seed=0).arrays
    with PackedWriter(directory, config, forms, tokenizer_path=beside / "tokenizer.json") as writer:
        for name in writer.names:
            writer.add(name, weights[name])
    return directory


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
