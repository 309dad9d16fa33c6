"""The texts of the model in the box: its tokenizer, and the conversations that it is tuned on.

    python studies/box/texts.py tokenizer --data ../shared/data --out runs/box
    python studies/box/texts.py chat      --data ../shared/data --out runs/box

The tokenizer is trained on a sample of everything that the model reads: encyclopaedia, novels,
stories, and what is said in dialogues. Every document of it is cleaned as the training texts are.
`chat` writes OUT/chat-train.jsonl.bz2 and OUT/chat-valid.jsonl.bz2, rows of messages, and prints
what they are made of.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.documents import documents
from benchmarks.dry_run import add_tiny, temporary
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.special_tokens import CHAT_TOKENS
from nomatmul.train.documents import find_sources
from nomatmul.train.tokenizer import train_tokenizer
from studies.box import conversations, stories
from studies.box.tiny import write_data
from studies.recipes.clean import clean

VOCABULARY = 3968  # of 4,096 both decoders and the encoder would be above 30 MB (ship.py)
# Characters of each kind in the tokenizer's sample.
SAMPLE = {"wikipedia": 16_000_000, "novels": 8_000_000, "stories": 6_000_000,
          "dialogues": 6_000_000}  # fmt: skip
HEAD = 100_000  # of them from one document at most: many books rather than a few whole ones
KINDS = {
    "wikipedia": tuple(f"wikipedia-en-2015/train-0{number}" for number in range(6)),
    "novels": ("english-novels-98/train",),
    "stories": tuple(f"stories-open/{name}/train"
                     for name in ("childrens-books", "fables", "fairytales", "storybooks")),
    "dialogues": tuple(f"dialogues-{name}/train" for name in ("self", "topical", "storyqa")),
}  # fmt: skip
_SPEAKER = re.compile(r"^(?:A|B|User|Assistant): ", re.MULTILINE)


def read(data: Path, name: str) -> str:
    """The text of DATA/NAME.txt.bz2."""
    file = data / f"{name}.txt.bz2"
    return bz2.decompress(file.read_bytes()).decode("utf-8").replace("\r\n", "\n")


def sample(data: Path, kind: str) -> Iterator[str]:
    """Cleaned documents of a kind, drawn by seed; of a long one, a book, the head only."""
    names = KINDS[kind]
    share = SAMPLE[kind] // len(names)
    for number, name in enumerate(names):
        found = list(documents(read(data, name)))
        random.Random(f"{kind} {number}").shuffle(found)
        left = share
        for document in found:
            text = clean(document[:HEAD])
            yield _SPEAKER.sub("", text) if kind == "dialogues" else text
            left -= len(text)
            if left <= 0:
                break


def tokenizer(args: argparse.Namespace) -> None:
    """Byte-level BPE of VOCABULARY entries, the tokens of conversations at ids 2 to 5."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{kind}.jsonl" for kind in KINDS]
        for kind, file in zip(KINDS, files, strict=True):
            rows = (json.dumps({"text": text}) + "\n" for text in sample(args.data, kind))
            file.write_text("".join(rows), "utf-8")
        made = train_tokenizer(find_sources(list(map(str, files))), args.vocabulary, CHAT_TOKENS)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "tokenizer.json"
    write_file(file, made.to_str().encode("utf-8"))
    print(f"{made.get_vocab_size()} entries: {file}")


DIALOGUES = ("self", "topical", "sgd", "storyqa")
# Dialogues of bookings repeat their templates: a small share of them.
BOOKINGS = {"train": 1500, "valid": 50}
GREETINGS = {"train": 1500, "valid": 40}


def conversation_rows(data: Path, part: str) -> dict[str, list[conversations.Messages]]:
    """{kind: conversations} of the training or the held-out texts."""
    draw = random.Random(part)
    chat, about = conversations.chat, conversations.about_passage
    found = {}
    for name in DIALOGUES:
        form = about if name == "storyqa" else chat
        texts = list(documents(read(data, f"dialogues-{name}/{part}")))
        if name == "sgd":
            texts = draw.sample(texts, min(BOOKINGS[part], len(texts)))
        found[name] = list(conversations.rows(texts, form, draw))
    for name, lengths in stories.KINDS.items():
        texts = list(documents(read(data, f"stories-open/{name}/{part}")))
        often = lengths if part == "train" else dataclasses.replace(lengths, times=1)
        found[name] = list(stories.stories(texts, often, draw))
    found["greetings"] = list(stories.greetings(GREETINGS[part], draw))
    return found


def chat(args: argparse.Namespace) -> None:
    """The conversations, shuffled, compressed: what travels."""
    args.out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        found = conversation_rows(args.data, part)
        every = [messages for kind in found.values() for messages in kind]
        random.Random(0).shuffle(every)
        lines = [json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in every]
        file = args.out / f"chat-{part}.jsonl.bz2"
        write_file(file, bz2.compress("".join(lines).encode("utf-8"), 9))
        for kind, rows in found.items():
            size = sum(len(m["content"].encode("utf-8")) for messages in rows for m in messages)
            print(f"{part} {kind}: {len(rows):,} conversations, {size:,} bytes of text")
        print(f"{file}: {len(every):,} conversations, {file.stat().st_size:,} bytes")


def tiny(args: argparse.Namespace) -> None:
    """Both of invented texts."""
    args.out, args.vocabulary = args.out or temporary(), 300
    args.data = args.out / "data"
    dialogues = {f"dialogues-{name}/{part}" for name in DIALOGUES for part in ("train", "valid")}
    told = {f"stories-open/{name}/valid" for name in stories.KINDS}
    every = {name for names in KINDS.values() for name in names}
    write_data(args.data, sorted(dialogues | told | every))
    tokenizer(args)
    chat(args)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"tokenizer": tokenizer, "chat": chat}
    parser.add_argument("step", choices=steps, nargs="?")
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path)
    add_tiny(parser)
    args = parser.parse_args(words)
    args.vocabulary = VOCABULARY
    if args.tiny:
        tiny(args)
    elif args.step is None or args.data is None or args.out is None:
        parser.error("name what to make, --data and --out")
    else:
        steps[args.step](args)


if __name__ == "__main__":
    main()
