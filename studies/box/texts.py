"""The texts of the model in the box: its tokenizer, and the conversations that it is tuned on.

    python studies/box/texts.py tokenizer --data ../shared/data --out runs/box/tokenizer.json

The tokenizer is trained on a sample of everything that the model reads: encyclopaedia, novels,
stories, and what is said in dialogues. Every document of it is cleaned as the training texts are.
"""

from __future__ import annotations

import argparse
import bz2
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.documents import documents
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.special_tokens import CHAT_TOKENS
from nomatmul.train.documents import find_sources
from nomatmul.train.tokenizer import train_tokenizer
from studies.recipes.clean import clean

VOCABULARY = 4096
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
        made = train_tokenizer(find_sources(list(map(str, files))), VOCABULARY, CHAT_TOKENS)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, made.to_str().encode("utf-8"))
    print(f"{made.get_vocab_size()} entries: {args.out}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"tokenizer": tokenizer}
    parser.add_argument("step", choices=steps)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    steps[args.step](args)


if __name__ == "__main__":
    main()
