"""Token shards: memory-mapped files of token ids, built in parallel, resumable, atomic.

A token directory holds `tokenizer.json`, `shard-SSSS-CCCCC.bin` (source S, chunk C: little-endian
uint16, or uint32 for vocabularies above 65,536) with a `.json` beside each (counts, checksums,
origin), and `index.json`, written last: its presence says that the build is complete. A chunk is
decided by the text alone, so any number of workers gives the same files. A shard whose `.json`
names the same text and tokenizer is kept when a build is repeated.

Documents are joined as [bos] text eos; bos only where the tokenizer has one that is not eos. A
directory with conversations holds the `chat_template.jinja` that rendered them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nomatmul.formats.chat_template import DEFAULT_TEMPLATE, TEMPLATE_FILE
from nomatmul.formats.cpus import usable_cpus
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import write_json
from nomatmul.train.children import tie_to
from nomatmul.train.conversations import Conversation, stored_template
from nomatmul.train.documents import Piece, Source, read_pieces
from nomatmul.train.encode import Chat, Part, dtype_of, encode
from nomatmul.train.tokenizer import fingerprint, load_tokenizer

FORMAT, VERSION = "nomatmul-tokens", 1
CHUNK_CHARACTERS = 16 << 20  # text in one shard: about 8 MB of ids

Progress = Callable[[str, int, int], None]  # what, done, of (0: not known)


def is_token_directory(path: str | Path) -> bool:
    return (Path(path) / "index.json").is_file()


def read_index(path: str | Path) -> dict[str, Any]:
    """The index of a complete token directory. Raises ValueError for a foreign or newer one."""
    file = Path(path) / "index.json"
    try:
        index = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is no index of token shards")
    if index.get("version") != VERSION:
        raise ValueError(f"{file} has version {index.get('version')}, this program reads {VERSION}")
    return index


def build_shards(
    sources: list[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    template: str = DEFAULT_TEMPLATE,
    workers: int | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Path:
    """Encode the sources into `out` and return it; what is there already and still fits is kept.

    template: of conversations. workers: processes (None: one a CPU that this process may use).
    Raises ValueError when the sources hold no text, or conversations that cannot be rendered.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sha = fingerprint(tokenizer)
    if is_current(out, sources, sha, template):
        return out
    (out / "index.json").unlink(missing_ok=True)
    write_file(out / "tokenizer.json", tokenizer.to_str().encode("utf-8"))
    tasks = _Tasks(out, sha, template)
    done = list(_encode_all(tasks, sources, tokenizer, workers, progress))
    if not any(shard["documents"] for shard in done):
        raise ValueError(f"no text in {', '.join(source.path for source in sources)}")
    for stale in set(out.glob("shard-*")) - {
        out / name for s in done for name in _files(s["name"])
    }:
        stale.unlink()
    conversations = sum(shard["conversations"] for shard in done)
    if conversations:
        write_file(out / TEMPLATE_FILE, template.encode("utf-8"))
    else:
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": sha,
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": dtype_of(tokenizer).name,
        "tokens": sum(shard["tokens"] for shard in done),
        "documents": sum(shard["documents"] for shard in done),
        "conversations": conversations,
        "text_bytes": sum(shard["text_bytes"] for shard in done),
        "sources": [s.stamp() | s.settings() | {"sha256": s.sha256()} for s in sources],
        "shards": done,
    }
    write_json(out / "index.json", index)
    return out


def is_current(
    out: Path, sources: list[Source], sha: str | None, template: str = DEFAULT_TEMPLATE
) -> bool:
    """Whether a complete build of just these sources lies in `out`, made with the tokenizer of
    fingerprint `sha` (None: with any), its conversations with this template."""
    if not is_token_directory(out):
        return False
    index = read_index(out)
    if index.get("conversations") and stored_template(out) != template:
        return False
    if sha not in (None, index["tokenizer_sha256"]) or len(index["sources"]) != len(sources):
        return False
    for source, seen in zip(sources, index["sources"], strict=True):
        if any(seen.get(key) != value for key, value in source.settings().items()):
            return False
        stamp = source.stamp()
        if stamp["size"] != seen["size"]:
            return False
        if stamp["mtime_ns"] != seen["mtime_ns"] and source.sha256() != seen["sha256"]:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The text of one shard: pieces of documents of one source, in order."""

    name: str
    pieces: list[Part]

    def sha256(self, template: str) -> str:
        """Of all that decides the ids but the tokenizer."""
        digest = hashlib.sha256()
        for piece, starts, ends in self.pieces:
            digest.update(f"{int(starts)}{int(ends)}{len(piece)}:".encode())
            if isinstance(piece, Conversation):
                digest.update(f"{template}\0{piece.to_json()}".encode())
            else:
                digest.update(piece.encode("utf-8"))
        return digest.hexdigest()


def _chunks(number: int, pieces: Iterator[Piece]) -> Iterator[_Chunk]:
    waiting: list[Part] = []
    length, count, starts = 0, 0, True
    for piece, ends in pieces:
        waiting.append((piece, starts, ends))
        starts = ends
        length += len(piece)
        if length >= CHUNK_CHARACTERS:
            yield _Chunk(f"shard-{number:04d}-{count:05d}", waiting)
            waiting, length, count = [], 0, count + 1
    if waiting:
        yield _Chunk(f"shard-{number:04d}-{count:05d}", waiting)


@dataclasses.dataclass(frozen=True)
class _Tasks:
    """Which chunks still need work."""

    out: Path
    tokenizer_sha256: str
    template: str

    def finished(self, chunk: _Chunk, text_sha256: str) -> dict[str, Any] | None:
        """The description of a shard that an earlier build finished for this very text."""
        data, sidecar = _files(chunk.name)
        try:
            shard = json.loads((self.out / sidecar).read_text("utf-8"))
            same = (
                shard["text_sha256"] == text_sha256
                and shard["tokenizer_sha256"] == self.tokenizer_sha256
                and shard["bytes"] == (self.out / data).stat().st_size
                and "conversations" in shard
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return shard if same else None


def _encode_all(
    tasks: _Tasks,
    sources: list[Source],
    tokenizer: Tokenizer,
    workers: int | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Shard descriptions in the order of the text."""
    workers = workers if workers is not None else usable_cpus()
    if workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    size = sum(source.stamp()["size"] for source in sources)  # 0 for the hub: not known
    if size:  # a worker without a chunk costs memory; compressed text is some eight times as long
        workers = min(workers, 1 + 8 * size // CHUNK_CHARACTERS)
    small = 0 < size < CHUNK_CHARACTERS // 4  # done before the processes would have started
    pool = None if workers == 1 or small else _pool(workers, tasks)
    waiting: list[tuple[_Chunk, str, Future[dict[str, Any]] | dict[str, Any]]] = []
    tokens = 0
    try:
        for number, source in enumerate(sources):
            for chunk in _chunks(number, read_pieces(source)):
                sha = chunk.sha256(tasks.template)
                task = tasks.finished(chunk, sha) or (
                    pool.submit(_encode_in_worker, chunk, sha)
                    if pool
                    else _encode_chunk(tokenizer, tasks, chunk, sha)
                )
                waiting.append((chunk, sha, task))
                # Few chunks in flight: each is 16 MB of text in this process too.
                while len(waiting) > (workers + 1 if pool else 0):
                    shard = _result(waiting.pop(0), tokenizer, tasks)
                    tokens += shard["tokens"]
                    progress("tokens", tokens, 0)
                    yield shard
        while waiting:
            shard = _result(waiting.pop(0), tokenizer, tasks)
            tokens += shard["tokens"]
            progress("tokens", tokens, 0)
            yield shard
    finally:
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(
    entry: tuple[_Chunk, str, Future[dict[str, Any]] | dict[str, Any]],
    tokenizer: Tokenizer,
    tasks: _Tasks,
) -> dict[str, Any]:
    chunk, sha, task = entry
    if isinstance(task, dict):
        return task
    try:
        return task.result()
    except BrokenProcessPool:
        # A script without a __main__ guard, or a worker that was killed: this process can do it.
        return _encode_chunk(tokenizer, tasks, chunk, sha)


def _pool(workers: int, tasks: _Tasks) -> ProcessPoolExecutor:
    import multiprocessing

    # spawn: a fork after the Rust thread pool or CUDA has started can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tasks, os.getpid())
    )


_worker: tuple[Tokenizer, _Tasks] | None = None


def _start_worker(tasks: _Tasks, parent: int) -> None:
    global _worker
    import signal

    tie_to(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = load_tokenizer(tasks.out / "tokenizer.json"), tasks


def _encode_in_worker(chunk: _Chunk, text_sha256: str) -> dict[str, Any]:
    assert _worker is not None
    tokenizer, tasks = _worker
    return _encode_chunk(tokenizer, tasks, chunk, text_sha256)


def _encode_chunk(
    tokenizer: Tokenizer, tasks: _Tasks, chunk: _Chunk, text_sha256: str
) -> dict[str, Any]:
    """Encode one chunk and write its two files; the `.json` comes last and makes it count."""
    chat = Chat(tasks.out, tasks.template)
    ids, text_bytes, conversations = encode(tokenizer, chunk.pieces, chat)
    data = ids.tobytes()
    shard = {
        "name": chunk.name,
        "tokens": int(ids.size),
        "documents": sum(ends for _, _, ends in chunk.pieces),
        "conversations": conversations,
        "text_bytes": text_bytes,
        "dtype": ids.dtype.name,
        "bytes": len(data),
        "crc32": f"{zlib.crc32(data):08x}",
        "text_sha256": text_sha256,
        "tokenizer_sha256": tasks.tokenizer_sha256,
    }
    binary, sidecar = _files(chunk.name)
    write_file(tasks.out / binary, data)
    write_json(tasks.out / sidecar, shard)
    return shard


def _files(name: str) -> tuple[str, str]:
    return f"{name}.bin", f"{name}.json"
