"""The memory image: regions of whole words, in the order in which a token takes them.

Within a region bytes follow each other without gaps, the first in the low bits of a word; each
region begins at a whole word. It is written as it grows, so a model larger than memory compiles.

Legend: N rows, K inputs of a row, S slots, B beats of a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.packing import PER_BYTE, pack_ternary
from nomatmul.hardware.design import Design

WORD_ADDRESS_BITS = 32
_ROWS = 1 << 12  # packed at once


@dataclass(frozen=True)
class Region:
    """`words` words from `address` on. kind: "parameters" and "rows" are streamed; "embedding",
    "nodes" and "out" hold records that are fetched one by one."""

    name: str
    kind: str
    address: int
    words: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Image:
    """Writes regions one behind the other to a file. Raises ValueError where words run out of
    addresses, or of `limit` bytes that the board has (None: no limit)."""

    def __init__(self, file: BinaryIO, design: Design, limit: int | None = None) -> None:
        self._file, self._design, self._limit = file, design, limit
        self.words = 0
        self.regions: list[Region] = []

    def add(self, name: str, kind: str, *pieces: NDArray[Any]) -> Region:
        """Append a region of the bytes of `pieces`, filled up with zeros to a whole word."""
        size, width = sum(piece.nbytes for piece in pieces), self._design.memory_bytes
        words = -(-size // width)
        self._check(name, words)
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).data)
        self._file.write(bytes(words * width - size))
        region = Region(name, kind, self.words, words)
        self.words += words
        self.regions.append(region)
        return region

    def _check(self, name: str, words: int) -> None:
        end = self.words + words
        if end > 1 << WORD_ADDRESS_BITS:
            raise ValueError(
                f"the memory image needs {end} words up to {name}, and addresses have"
                f" {WORD_ADDRESS_BITS} bits"
            )
        size = end * self._design.memory_bytes
        if self._limit is not None and size > self._limit:
            raise ValueError(
                f"the memory image needs {size} bytes up to {name}, and the board's memory has"
                f" {self._limit}"
            )


def beats_of_rows(t_NK: NDArray[np.int8], design: Design) -> NDArray[np.uint8]:
    """Ternary rows as beats, each row filled up with zero weights: uint8 [N, B * beat bytes]."""
    rows, inputs = t_NK.shape
    beats, beat_bytes = design.beats(inputs), design.beat_bits // 8
    packed = np.empty((rows, beats, beat_bytes), np.uint8)
    # one beat after the other: its last byte may hold digits that no lane takes
    for beat in range(beats):
        lanes = t_NK[:, beat * design.lanes : (beat + 1) * design.lanes]
        if lanes.shape[1] < design.lanes:
            lanes = np.pad(lanes, ((0, 0), (0, design.lanes - lanes.shape[1])))
        for first in range(0, rows, _ROWS):
            part = slice(first, first + _ROWS)
            packed[part, beat] = pack_ternary(lanes[part], design.packing)[:, :beat_bytes]
    assert beat_bytes == -(-design.lanes // PER_BYTE[design.packing])
    return packed.reshape(rows, beats * beat_bytes)


def interleaved(matrices: list[NDArray[np.int8]], design: Design) -> NDArray[np.uint8]:
    """The rows of matrices of one shape in turn (row 0 of each, row 1 of each, ...) as beats."""
    beats = np.stack([beats_of_rows(t_NK, design) for t_NK in matrices], axis=1)
    return beats.reshape(-1, beats.shape[-1])


def whole_words(records: NDArray[np.uint8], design: Design) -> NDArray[np.uint8]:
    """Records [N, bytes], each filled up with zeros to whole words, so that any can be fetched."""
    return np.pad(records, ((0, 0), (0, -records.shape[1] % design.memory_bytes)))


def embedding_records(
    values_VD: NDArray[np.int8], scales_V2: NDArray[np.int32], design: Design
) -> NDArray[np.uint8]:
    """[V, bytes]: a row's scale (m, e; int32 each), then its int8 values; whole words, and whole
    pieces of what the loader takes."""
    head = np.ascontiguousarray(scales_V2.astype("<i4")).view(np.uint8)
    records = np.concatenate([head, values_VD.view(np.uint8)], axis=1)
    size = design.piece_words(8 * records.shape[1]) * design.memory_bytes
    return np.pad(records, ((0, 0), (0, size - records.shape[1])))


def node_records(
    t_VK: NDArray[np.int8], weights_V: NDArray[np.int64], design: Design
) -> NDArray[np.uint8]:
    """[V, bytes] of the nodes of trees: a row's beats in whole words, then a word whose low 16 bits
    are the weight of the node's activation."""
    beats = whole_words(beats_of_rows(t_VK, design), design)
    weights = (weights_V & 0xFFFF).astype("<u2").reshape(-1, 1).view(np.uint8)
    return np.concatenate([beats, whole_words(weights, design)], axis=1)
