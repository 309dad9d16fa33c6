"""Sources of text, read as a stream of documents.

A source is a text file (one document, or several where `document_start` matches a line), a JSONL
file (a row is a document), a parquet file, a data set saved by Hugging Face `datasets`, or
`hf:NAME[:CONFIG][:SPLIT]` from its hub. Files may be compressed (gzip, bzip2, xz, zstd). `datasets`
is imported only for the last three.

Documents come as pieces, because one book can be larger than what a tokenizer should get at once:
a piece is `(text, ends_document)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nomatmul.formats.textfiles import open_binary

PIECE_CHARACTERS = 1 << 19  # a longer document is cut, in front of a line break where there is one

Piece = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class Source:
    """One input. kind: "text", "jsonl", "parquet", "saved" (datasets.save_to_disk) or "hub"."""

    path: str
    kind: str
    text_field: str = "text"
    document_start: str | None = None

    def stamp(self) -> dict[str, Any]:
        """What tells cheaply that the source is unchanged: size and time of change of its files."""
        if self.kind == "hub":
            return {"path": self.path, "size": 0, "mtime_ns": 0}
        files = [Path(self.path)]
        if self.kind == "saved":
            files = sorted(path for path in Path(self.path).rglob("*") if path.is_file())
        stats = [path.stat() for path in files]
        return {
            "path": str(Path(self.path).resolve()),
            "size": sum(stat.st_size for stat in stats),
            "mtime_ns": max(stat.st_mtime_ns for stat in stats),
        }

    def settings(self) -> dict[str, Any]:
        """What changes the documents that are read from equal bytes."""
        return {
            "kind": self.kind,
            "text_field": self.text_field if self.kind != "text" else None,
            "document_start": self.document_start if self.kind == "text" else None,
        }

    def sha256(self) -> str:
        """SHA-256 of the file as it lies on disk; of all files in turn for a saved data set."""
        digest = hashlib.sha256()
        if self.kind != "hub":
            root = Path(self.path)
            for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
                if path.is_file():
                    with open(path, "rb") as file:
                        while block := file.read(1 << 20):
                            digest.update(block)
        return digest.hexdigest()


def find_sources(
    names: list[str], text_field: str = "text", document_start: str | None = None
) -> list[Source]:
    """Check the inputs before any work. Raises ValueError or OSError naming the first bad one."""
    if not names:
        raise ValueError("no data: name at least one text, JSONL or parquet file")
    if document_start is not None:
        try:
            re.compile(document_start)
        except re.error as error:
            raise ValueError(
                f"document start {document_start!r} is no regular expression: {error}"
            ) from None
    return [Source(name, _kind(name), text_field, document_start) for name in names]


def _kind(name: str) -> str:
    if name.startswith("hf:"):
        _import_datasets(name)
        return "hub"
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            _import_datasets(name)
            return "saved"
        raise ValueError(
            f"{name} is a directory, but no data set saved by `datasets` and no token directory"
        )
    with open(path, "rb") as file:  # absent or unreadable: the system's own words
        if not file.read(1):
            raise ValueError(f"{name} is empty")
    if path.suffix == ".parquet":
        _import_datasets(name)
        return "parquet"
    stem = path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz", ".zst") else path
    return "jsonl" if stem.suffix in (".jsonl", ".ndjson") else "text"


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} needs the package datasets: pip install datasets") from None
    return datasets


def read_pieces(source: Source) -> Iterator[Piece]:
    """The documents of a source in order, cut into pieces. Empty documents are left out.

    Raises ValueError naming the file (and row) that is damaged, not UTF-8, or lacks the text field.
    """
    documents = _READERS[source.kind](source)
    try:
        for document in documents:
            yield from _merge(document)
    except (OSError, ValueError):
        raise
    except Exception as error:  # EOFError, zlib.error, lzma.LZMAError, ZstdError: no common base
        raise ValueError(f"{source.path} cannot be read: {error}") from None


def _merge(parts: Iterator[str]) -> Iterator[Piece]:
    """Join a document's small parts, cut what is too long; the last piece ends the document."""
    waiting: list[str] = []
    length = 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if length < 2 * PIECE_CHARACTERS:
            continue
        text = "".join(waiting)
        while len(text) >= 2 * PIECE_CHARACTERS:
            cut = _cut_position(text)
            yield text[:cut], False
            text = text[cut:]
        waiting, length = [text], len(text)
    if text := "".join(waiting):
        yield text, True


def _cut_position(text: str) -> int:
    """A place where byte-level BPE cuts anyway: a line break after a character that is no space."""
    place = PIECE_CHARACTERS
    while (place := text.rfind("\n", 1, place)) > 0:
        if not text[place - 1].isspace():
            return place
    place = text.rfind(" ", 1, PIECE_CHARACTERS)
    return place if place > 0 and not text[place - 1].isspace() else PIECE_CHARACTERS


def _lines(source: Source) -> Iterator[str]:
    binary: IO[bytes] = open_binary(source.path)
    with io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
        try:
            # Bounded, because a file without line breaks must not become one string.
            while line := file.readline(PIECE_CHARACTERS):
                yield line
        except UnicodeDecodeError as error:
            raise ValueError(f"{source.path} is not UTF-8 text ({error.reason})") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"{source.path}: damaged compressed file ({error})") from None


def _read_text(source: Source) -> Iterator[Iterator[str]]:
    lines = _lines(source)
    if source.document_start is None:
        yield lines
        return
    starts = re.compile(source.document_start)
    head: list[str] = []  # the line that opened the next document, once it has been met

    def document() -> Iterator[str]:
        yield from head
        head.clear()
        for line in lines:
            if starts.search(line.rstrip("\r\n")):
                head.append(line)
                return
            yield line

    yield document()
    while head:
        yield document()


def _read_jsonl(source: Source) -> Iterator[Iterator[str]]:
    with open_binary(source.path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{source.path}, row {number}: not JSON ({error})") from None
            yield iter([_field(source, row, number)])


def _field(source: Source, row: Any, number: int) -> str:
    text = row.get(source.text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{source.path}, row {number}: no text under {source.text_field!r} (it has: {have})"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text


def _read_dataset(source: Source) -> Iterator[Iterator[str]]:
    datasets = _import_datasets(source.path)
    if source.kind == "parquet":
        data = datasets.load_dataset(
            "parquet", data_files=source.path, split="train", streaming=True
        )
    elif source.kind == "saved":
        data = datasets.load_from_disk(source.path)
    else:
        name, subset, split, *_ = [*source.path.removeprefix("hf:").split(":"), "", ""]
        data = datasets.load_dataset(name, subset or None, split=split or "train")
    if isinstance(data, dict):
        if "train" not in data:
            raise ValueError(f"{source.path} has the splits {', '.join(data)}, but no 'train'")
        data = data["train"]
    for number, row in enumerate(data, 1):
        yield iter([_field(source, row, number)])


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_dataset,
    "saved": _read_dataset,
    "hub": _read_dataset,
}
