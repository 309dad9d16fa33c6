"""The texts of the recipe study: chosen on a machine that has them, made into tokens on the GPU's.

`gather` writes compressed texts of 36 MiB and a small tokenizer: what travels. Tokens of 16 bits
would hold half as much text in those bytes, and one text serves all kinds of tokens; 16 cores make
them in half a minute.

A library of run.py.
"""

from __future__ import annotations

import bz2
import dataclasses
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.documents import write_documents
from nomatmul.formats.cpus import usable_cpus
from studies.compare.plan import BYTE_PAIRS
from studies.recipes.clean import clean

HELD_OUT = ("wikipedia", "novels", "stories")
SMALL_VOCABULARY = 4096
NOVELS = 20_000_000  # characters: whole books of different authors until they are reached
_NEXT = "\n<|endoftext|>\n"
STORIES = ("childrens-books", "fables", "fairytales", "storybooks")
_SMALL = f"tokenizer-{SMALL_VOCABULARY}.json"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Tokens of one kind: of cleaned or raw texts, with one tokenizer."""

    cleaned: bool
    small: bool = False  # the small tokenizer, else that of 8,192 entries
    half: bool = False  # every second document of the training texts
    every: bool = False  # all texts, in three parts (studies/box/base.py)

    @property
    def name(self) -> str:
        if self.every:
            return "all" if self.cleaned else "all-raw"
        words = ["clean" if self.cleaned else "raw", "small" if self.small else "box"]
        return "-".join([*words, "half"] if self.half else words)

    @property
    def train(self) -> tuple[str, ...]:
        """Directories of the training tokens, below WORK."""
        parts = ("a", "b", "c") if self.every else ("",)
        return tuple("-".join(filter(None, ("train", self.name, part))) for part in parts)


CLEAN, RAW, SMALL = Kind(True), Kind(False), Kind(True, small=True)
HALF = Kind(True, small=True, half=True)
ALL = Kind(True, small=True, every=True)
KINDS = (CLEAN, RAW, SMALL, HALF, Kind(False, small=True))
TRAINED = (CLEAN, RAW, SMALL, HALF)  # the last kind is of held-out texts only


def gather(data: Path, work: Path) -> None:
    """WORK/texts from the folder of texts, and the small tokenizer, made of the cleaned ones."""
    texts = work / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for name in ("train-00", "train-01", "valid"):
        (texts / f"wikipedia-{name}.txt.bz2").write_bytes(
            (data / f"wikipedia-en-2015/{name}.txt.bz2").read_bytes()
        )
    (texts / "novels-valid.txt.bz2").write_bytes(
        (data / "english-novels-98/valid.txt.bz2").read_bytes()
    )
    _write(texts / "novels-train.txt.bz2", _some_novels(_read(data / "english-novels-98/train")))
    for part in ("train", "valid"):
        parts = [_read(data / f"stories-open/{name}/{part}").strip() for name in STORIES]
        _write(texts / f"stories-{part}.txt.bz2", _NEXT.join(parts))
    _small_tokenizer(work)


def _read(path: Path) -> str:
    return bz2.decompress(path.with_name(path.name + ".txt.bz2").read_bytes()).decode("utf-8")


def _write(path: Path, text: str) -> None:
    path.write_bytes(bz2.compress(text.encode("utf-8"), 9))


def _some_novels(text: str) -> str:
    """Every third book first: the file is in the order of authors' names."""
    books = text.split(_NEXT)
    chosen, length = [], 0
    for book in [*books[::3], *books[1::3], *books[2::3]]:
        if length + len(book) <= NOVELS:
            chosen.append(book)
            length += len(book)
    return _NEXT.join(chosen)


def _small_tokenizer(work: Path) -> None:
    from nomatmul.train.documents import find_sources
    from nomatmul.train.tokenizer import train_tokenizer

    files = [str(path) for path in documents(work, cleaned=True) if "-valid" not in path.name]
    train_tokenizer(find_sources(files), SMALL_VOCABULARY).save(str(work / _SMALL))


def documents(work: Path, *, cleaned: bool) -> list[Path]:
    """WORK's texts as JSONL, a row a document; those that are there are not made again."""
    folder = work / ("clean" if cleaned else "raw")
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((work / "texts").glob("*.txt.bz2"))
    if not sources:
        raise ValueError(f"{work / 'texts'} holds no .txt.bz2: run `gather` first")
    targets = [folder / f"{path.name.removesuffix('.txt.bz2')}.jsonl" for path in sources]
    jobs = [job for job in zip(sources, targets, strict=True) if not job[1].exists()]
    edit = clean if cleaned else str
    with ProcessPoolExecutor(min(len(jobs) or 1, usable_cpus())) as pool:
        list(pool.map(partial(write_documents, edit=edit), jobs))
    return targets


def prepare(work: Path) -> None:
    """WORK/train-KIND and WORK/valid-KIND-TEXT: token shards of every kind, all side by side."""
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda yes: documents(work, cleaned=yes), (True, False)))
    files = dict(zip((True, False), made, strict=True))
    with ThreadPoolExecutor(len(KINDS)) as pool:
        list(pool.map(lambda kind: _tokens(work, kind, files[kind.cleaned]), KINDS))


def _tokens(work: Path, kind: Kind, files: list[Path]) -> None:
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import build_shards
    from nomatmul.train.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(work / _SMALL if kind.small else BYTE_PAIRS)
    train = [str(path) for path in files if "-valid" not in path.name]
    if kind.half:
        train = [_every_second(Path(path)) for path in train]
    if kind in TRAINED:
        workers = min(len(train) * 2, usable_cpus())
        build_shards(find_sources(train), tokenizer, work / f"train-{kind.name}", workers=workers)
    for text in HELD_OUT:
        (file,) = [path for path in files if path.name == f"{text}-valid.jsonl"]
        target = work / f"valid-{kind.name}-{text}"
        build_shards(find_sources([str(file)]), tokenizer, target, workers=1)


def _every_second(documents: Path) -> str:
    """The first, third, ... row of a JSONL file, in a file beside its folder."""
    target = documents.parent.with_name(f"{documents.parent.name}-half") / documents.name
    target.parent.mkdir(exist_ok=True)
    with documents.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as chosen:
        chosen.writelines(row for number, row in enumerate(rows) if number % 2 == 0)
    return str(target)
