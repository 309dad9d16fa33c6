"""Documents of the texts that models are trained on: articles and books to rows of JSONL.

A library.
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nomatmul.formats.cpus import usable_cpus

TRAIN = ("wikipedia-en-2015/train-00", "wikipedia-en-2015/train-01", "english-novels-98/train")
HELD_OUT = {"wikipedia": "wikipedia-en-2015/valid", "novels": "english-novels-98/valid"}

_ARTICLE = re.compile(r"^= [^=].* =$")
_NEXT_BOOK = "<|endoftext|>"


def documents(text: str) -> Iterator[str]:
    """Articles (each begins with its title line) or books (split at their separator line)."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        if bare == _NEXT_BOOK or _ARTICLE.match(bare):
            if body := "".join(lines).strip():
                yield body
            lines = [] if bare == _NEXT_BOOK else [line]
        else:
            lines.append(line)
    if body := "".join(lines).strip():
        yield body


def write_documents(job: tuple[Path, Path], edit: Callable[[str], str] = str) -> int:
    """A compressed text to JSONL, a row a document; the characters read.

    edit: applied to each document; one that it leaves empty is left out.
    """
    source, target = job
    text = bz2.decompress(source.read_bytes()).decode("utf-8").replace("\r\n", "\n")
    temporary = target.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for document in filter(None, map(edit, documents(text))):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    temporary.rename(target)
    return len(text)


def target(texts: Path, name: str) -> Path:
    """The JSONL file of a text."""
    return texts / (name.replace("/", "-") + ".jsonl")


def write_missing(data: Path, names: Iterable[str], texts: Path) -> None:
    """`write_documents` of texts below `data` that have no file in `texts` yet, side by side."""
    texts.mkdir(parents=True, exist_ok=True)
    jobs = [(data / f"{name}.txt.bz2", target(texts, name)) for name in names]
    jobs = [job for job in jobs if not job[1].exists()]
    with ProcessPoolExecutor(min(len(jobs) or 1, usable_cpus())) as pool:
        list(pool.map(write_documents, jobs))
