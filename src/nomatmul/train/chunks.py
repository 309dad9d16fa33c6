"""Texts to shards in parallel: cut into chunks by the text alone, each encoded by any process.

A chunk is decided by the text alone, so any number of workers gives the same files. A shard whose
`.json` names the same text and tokenizer is kept when a build is repeated.
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

from nomatmul.formats.cpus import usable_cpus
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import write_json
from nomatmul.train.children import tie_to
from nomatmul.train.conversations import Conversation
from nomatmul.train.documents import Piece, Source, read_pieces
from nomatmul.train.encode import Chat, Part, encode
from nomatmul.train.tokenizer import load_tokenizer

Progress = Callable[[str, int, int], None]  # what, done, of (0: not known)


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


def _chunks(number: int, pieces: Iterator[Piece], characters: int) -> Iterator[_Chunk]:
    waiting: list[Part] = []
    length, count, starts = 0, 0, True
    for piece, ends in pieces:
        waiting.append((piece, starts, ends))
        starts = ends
        length += len(piece)
        if length >= characters:
            yield _Chunk(f"shard-{number:04d}-{count:05d}", waiting)
            waiting, length, count = [], 0, count + 1
    if waiting:
        yield _Chunk(f"shard-{number:04d}-{count:05d}", waiting)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Shards to be made in the directory `out`, which holds the tokenizer.json they are made with.

    template: of conversations. chunk_characters: the text of one shard.
    """

    out: Path
    tokenizer_sha256: str
    template: str
    chunk_characters: int

    def finished(self, chunk: _Chunk, text_sha256: str) -> dict[str, Any] | None:
        """The description of a shard that an earlier build finished for this very text."""
        data, sidecar = shard_files(chunk.name)
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


_Waiting = tuple[_Chunk, str, Future[dict[str, Any]] | dict[str, Any]]  # its text's sha256


def encode_all(
    tasks: Tasks,
    sources: list[Source],
    tokenizer: Tokenizer,
    workers: int | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Write the shards of `sources`; their descriptions in the order of the text.

    workers: processes, None for one a CPU that this process may use. Raises ValueError for workers
    below 1 and for a conversation that cannot be rendered.
    """
    workers = _processes(usable_cpus() if workers is None else workers, tasks, sources)
    pool = None if workers == 1 else _pool(workers, tasks)
    limit = workers + 1 if pool else 0  # few chunks in flight: each is 16 MB of text here, too
    waiting: list[_Waiting] = []
    tokens = 0

    def taken() -> dict[str, Any]:
        nonlocal tokens
        shard = _result(waiting.pop(0), tokenizer, tasks)
        tokens += shard["tokens"]
        progress("tokens", tokens, 0)
        return shard

    try:
        for number, source in enumerate(sources):
            for chunk in _chunks(number, read_pieces(source), tasks.chunk_characters):
                sha = chunk.sha256(tasks.template)
                task = tasks.finished(chunk, sha) or (
                    pool.submit(_encode_in_worker, chunk, sha)
                    if pool
                    else _encode_chunk(tokenizer, tasks, chunk, sha)
                )
                waiting.append((chunk, sha, task))
                while len(waiting) > limit:
                    yield taken()
        while waiting:
            yield taken()
    finally:
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(entry: _Waiting, tokenizer: Tokenizer, tasks: Tasks) -> dict[str, Any]:
    chunk, sha, task = entry
    if isinstance(task, dict):
        return task
    try:
        return task.result()
    except BrokenProcessPool:
        # A script without a __main__ guard, or a worker that was killed: this process can do it.
        return _encode_chunk(tokenizer, tasks, chunk, sha)


def _processes(workers: int, tasks: Tasks, sources: list[Source]) -> int:
    """How many of `workers` processes have something to do; 1 where this one does as well alone."""
    if workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    size = sum(source.stamp()["size"] for source in sources)
    if size == 0:  # the hub's is not known
        return workers
    if size < tasks.chunk_characters // 4:
        return 1  # done before the processes would have started
    # A worker without a chunk costs memory; compressed text is some eight times as long.
    return min(workers, 1 + 8 * size // tasks.chunk_characters)


def _pool(workers: int, tasks: Tasks) -> ProcessPoolExecutor:
    import multiprocessing

    # spawn: a fork after the Rust thread pool or CUDA has started can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tasks, os.getpid())
    )


_worker: tuple[Tokenizer, Tasks] | None = None


def _start_worker(tasks: Tasks, parent: int) -> None:
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
    tokenizer: Tokenizer, tasks: Tasks, chunk: _Chunk, text_sha256: str
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
    binary, sidecar = shard_files(chunk.name)
    write_file(tasks.out / binary, data)
    write_json(tasks.out / sidecar, shard)
    return shard


def shard_files(name: str) -> tuple[str, str]:
    """The two files of a shard: its ids, and their description."""
    return f"{name}.bin", f"{name}.json"
