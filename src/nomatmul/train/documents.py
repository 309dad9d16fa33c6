"""Sources of text, read as a stream of documents.

A source is a text file (one document, or several where `document_start` matches a line), a JSON
file (a row, or an element of an array, is a document), a parquet file, a data set saved by Hugging
Face `datasets`, or `hf:NAME[:CONFIG][:SPLIT]` from its hub. Files may be compressed (gzip, bzip2,
xz, zstd), and pipes. What a file is, its contents tell. `datasets` is imported only for the last
three.

Documents come as pieces, because one book can be larger than what a tokenizer should get at once:
a piece is `(text, ends_document)`. A row that has messages in place of a text is a conversation,
one piece however long.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Generator, Iterator
from typing import IO, Any

from nomatmul.formats.files.contents import read_values
from nomatmul.formats.files.texts import open_binary
from nomatmul.train.conversations import FIELD, LOOK, Conversation, conversation_of
from nomatmul.train.pipes import copied, is_pipe
from nomatmul.train.sources import Source, import_datasets, kind_of

PIECE_CHARACTERS = 1 << 19  # a longer document is cut, in front of a line break where there is one

Piece = tuple[str | Conversation, bool]
Document = Iterator[str] | Conversation  # a text in parts, or a conversation


def find_sources(
    names: list[str],
    text_field: str = "text",
    document_start: str | None = None,
    *,
    drop_start: bool = False,
) -> list[Source]:
    """Check the inputs before any work. Raises ValueError or OSError naming the first bad one.

    A pipe (or "-", standard input) is read here, to its end.
    """
    if not names:
        raise ValueError("no data: name at least one text, JSONL or parquet file")
    if document_start is not None:
        try:
            re.compile(document_start)
        except re.error as error:
            raise ValueError(
                f"document start {document_start!r} is no regular expression: {error}"
            ) from None
    elif drop_start:
        raise ValueError("the line that starts a document can be dropped only where one is named")
    sources = []
    for name in names:
        copy = copied(name) if is_pipe(name) else None
        kind = kind_of(name, name if copy is None else copy.name)
        sources.append(Source(name, kind, text_field, document_start, drop_start, copy))
    return sources


def read_pieces(source: Source) -> Generator[Piece]:
    """The documents of a source in order, cut into pieces. Empty documents are left out.

    Raises ValueError naming the file (and row) that is damaged, not UTF-8, or has neither text nor
    messages.
    """
    documents = _READERS[source.kind](source)
    try:
        for document in documents:
            if not isinstance(document, Conversation):
                yield from _merge(document)
            elif len(document):
                yield document, True
    except (OSError, ValueError):
        raise
    except Exception as error:  # EOFError, zlib.error, lzma.LZMAError, ZstdError: no common base
        raise ValueError(f"{source.path} cannot be read: {error}") from None


def begins_with_conversation(source: Source) -> bool:
    """Whether a conversation is near a source's beginning (`LOOK`). Errors of `read_pieces`."""
    if source.kind == "text":
        return False
    pieces = read_pieces(source)
    found = any(isinstance(piece, Conversation) for piece, _ in itertools.islice(pieces, LOOK))
    pieces.close()
    return found


def _merge(parts: Iterator[str]) -> Iterator[tuple[str, bool]]:
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
    with _open_text(source) as file:
        # Bounded, because a file without line breaks must not become one string.
        while line := file.readline(PIECE_CHARACTERS):
            yield line


@contextlib.contextmanager
def _open_text(source: Source) -> Iterator[IO[str]]:
    """The file's text, without a byte order mark; errors while it is read name the source."""
    binary: IO[bytes] = open_binary(source.file)
    with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        try:
            yield file
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
        if not source.drop_start:
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


def _read_jsonl(source: Source) -> Iterator[Document]:
    with open_binary(source.file) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source.path}, row {number}: not JSON ({error})") from None
            yield _document(source, row, number)


def _read_json(source: Source) -> Iterator[Document]:
    number = 0
    with _open_text(source) as file:
        values = read_values(file)
        while True:
            number += 1
            try:
                row = next(values, _END)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise ValueError(f"{source.path}, row {number}: {error}") from None
            if row is _END:
                return
            yield _document(source, row, number)


_END = object()


def _document(source: Source, row: Any, number: int) -> Document:
    text = row.get(source.text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        if isinstance(row, dict) and row.get(FIELD) is not None:
            try:
                return conversation_of(row[FIELD])
            except ValueError as error:
                raise ValueError(f"{source.path}, row {number}: {error}") from None
        have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{source.path}, row {number}: no text under {source.text_field!r} and no {FIELD!r}"
            f" (it has: {have}); --text-field NAME names another"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        text = text.encode("utf-8", "replace").decode("utf-8")
    return iter([text])


def _read_parquet(source: Source) -> Iterator[Document]:
    # `load_dataset` would take the file's name for a pattern and read all files that it matches.
    import_datasets(source.path)  # which brings pyarrow
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source.file) as file:
            rows = (row for batch in file.iter_batches(_ROWS) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield _document(source, row, number)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{source.path}: damaged parquet file ({error})") from None


_ROWS = 1024  # of a parquet file, in memory at once


def _read_dataset(source: Source) -> Iterator[Document]:
    datasets = import_datasets(source.path)
    if source.kind == "saved":
        data = datasets.load_from_disk(source.path)
    else:
        name, subset, split, *_ = [*source.path.removeprefix("hf:").split(":"), "", ""]
        data = datasets.load_dataset(name, subset or None, split=split or "train")
    if isinstance(data, dict):
        if "train" not in data:
            raise ValueError(f"{source.path} has the splits {', '.join(data)}, but no 'train'")
        data = data["train"]
    for number, row in enumerate(data, 1):
        yield _document(source, row, number)


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "saved": _read_dataset,
    "hub": _read_dataset,
}
