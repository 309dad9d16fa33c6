"""A stream of token ids over memory-mapped shards, and slices of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nomatmul.train.shards import read_index
from nomatmul.train.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Ids of `shards` one after another, from position `first` to `last` (not included).

    text_bytes: UTF-8 bytes of the text behind the whole stream; None for a part of a stream.
    """

    shards: tuple[np.ndarray, ...]
    tokenizer: Tokenizer
    tokenizer_sha256: str
    first: int
    last: int
    text_bytes: int | None

    def __len__(self) -> int:
        return self.last - self.first

    def part(self, first: int, last: int) -> TokenStream:
        """Positions first to last of this stream as a stream of its own."""
        assert 0 <= first <= last <= len(self)
        whole = first == 0 and last == len(self)
        return dataclasses.replace(
            self,
            first=self.first + first,
            last=self.first + last,
            text_bytes=self.text_bytes if whole else None,
        )

    def read(self, first: int, last: int) -> np.ndarray:
        """Ids at positions first to last, a copy in the shards' dtype."""
        return self.windows(np.asarray([first]), last - first)[0]

    def windows(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """[B, length] ids beginning at each start; windows may cross shards."""
        ends = np.cumsum([shard.size for shard in self.shards])
        out = np.empty((len(starts_B), length), dtype=self.shards[0].dtype)
        for row, start in zip(out, starts_B, strict=True):
            position, filled = int(start) + self.first, 0
            assert self.first <= position <= self.last - length
            index = int(np.searchsorted(ends, position, side="right"))
            while filled < length:
                shard = self.shards[index]
                offset = position + filled - (int(ends[index]) - shard.size)
                part = shard[offset : offset + length - filled]
                row[filled : filled + part.size] = part
                filled += part.size
                index += 1
        return out

    def bytes_of(self, first: int, last: int) -> int:
        """UTF-8 bytes of the text behind positions first to last.

        Exact for the whole of a stream (counted when it was encoded), else by decoding; a
        character that a border cuts counts as 3 bytes then.
        """
        if first == 0 and last == len(self) and self.text_bytes is not None:
            return self.text_bytes
        ids = self.read(first, last).tolist()
        step = 1 << 16
        texts = self.tokenizer.decode_batch(
            [ids[i : i + step] for i in range(0, len(ids), step)], skip_special_tokens=True
        )
        return sum(len(text.encode("utf-8", "replace")) for text in texts)


def open_stream(directory: str | Path) -> TokenStream:
    """Map a complete token directory. Raises ValueError naming the shard that does not fit."""
    directory = Path(directory)
    index = read_index(directory)
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    shards = tuple(_map_shard(directory, shard) for shard in index["shards"] if shard["tokens"])
    if not shards:
        raise ValueError(f"{directory} holds no tokens")
    total = sum(shard.size for shard in shards)
    return TokenStream(
        shards, tokenizer, index["tokenizer_sha256"], 0, total, int(index["text_bytes"])
    )


def _map_shard(directory: Path, shard: dict[str, Any]) -> np.ndarray:
    path = directory / f"{shard['name']}.bin"
    dtype = np.dtype(shard["dtype"]).newbyteorder("<")
    size = path.stat().st_size
    if size != shard["bytes"] or size != shard["tokens"] * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, its index says {shard['bytes']}")
    return np.memmap(path, dtype=dtype, mode="r")


def join_streams(streams: list[TokenStream]) -> TokenStream:
    """Several whole streams of one tokenizer as one. Raises ValueError when tokenizers differ."""
    if len({stream.tokenizer_sha256 for stream in streams}) > 1:
        raise ValueError("the token directories were made with different tokenizers")
    sizes = [stream.text_bytes for stream in streams]
    shards = tuple(shard for stream in streams for shard in stream.shards)
    return dataclasses.replace(
        streams[0],
        shards=shards,
        last=sum(shard.size for shard in shards),
        text_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
    )


def token_directory_sha256(directory: str | Path) -> str:
    """One checksum of all the text and the tokenizer behind a token directory."""
    import hashlib

    index = read_index(directory)
    facts = [[s["name"], s["tokens"], s["crc32"]] for s in index["shards"]]
    return hashlib.sha256(json.dumps([index["tokenizer_sha256"], facts]).encode()).hexdigest()
