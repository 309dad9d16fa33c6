"""Rows as token ids on the device: encoded once, padded, cut into batches.

A text becomes [CLS] A [SEP], a pair [CLS] A [SEP] B [SEP], or what the tokenizer's own template
says; of what is too long the longer text loses its last tokens. Shapes: R rows, B rows of a batch,
T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nomatmul.finetune.tsv import Rows
from nomatmul.formats.special_tokens import special_ids

_STEP = 8  # batches are padded to a multiple of it, so that there are few shapes
_POOL = 50  # batches whose rows are sorted by length together


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """ids int32 [R, T] and labels [R] on the device, lengths int64 [R] on the host.

    ids: -1 behind a row's end. labels: int64 class ids or float32 numbers. truncated: rows that
    were too long. grouped: batches of training have rows of like length.
    """

    ids: Tensor
    labels: Tensor
    lengths: np.ndarray
    truncated: int
    grouped: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, places: np.ndarray, rows: int = 0) -> tuple[Tensor, Tensor]:
        """(ids int64 [B, T], -1 behind a row's end; labels [B]) of the rows at `places`.

        rows: pad to so many rows of the full width, so that all batches have one shape; the label
        of a padded row does not count (-100, or NaN in a regression).
        """
        longest = int(self.lengths[places].max())
        width = self.ids.shape[1]
        if not rows:
            width = min(-(-longest // _STEP) * _STEP, width)
        missing = max(rows - len(places), 0)
        taken = np.concatenate([places, np.repeat(places[:1], missing)])
        index_B = torch.from_numpy(taken).to(self.ids.device, non_blocking=True)
        labels_B = self.labels[index_B]
        if missing:
            labels_B[len(places) :] = math.nan if labels_B.is_floating_point() else -100
        return self.ids[index_B, :width].long(), labels_B


def encode(
    rows: Rows,
    tokenizer: Tokenizer,
    max_length: int,
    regression: bool,
    device: torch.device,
    *,
    template: bool = False,
) -> Encoded:
    """Encode all rows, at most max_length tokens each. Raises ValueError if it has no room.

    template: special tokens are those of the tokenizer's own template. Published encoders were
    trained with it, and the engine reads texts so for every model whose config names no end token.
    """
    sequences, truncated = (_by_template if template else _by_names)(rows, tokenizer, max_length)
    lengths = np.asarray([len(ids) for ids in sequences], dtype=np.int64)
    if not lengths.all():
        empty = int(np.argmin(lengths))
        raise ValueError(f"row {empty + 1} has no tokens: {rows.texts[empty]!r}")
    table = np.full((len(sequences), int(lengths.max())), -1, dtype=np.int32)
    for row, ids in zip(table, sequences, strict=True):
        row[: len(ids)] = ids
    kind = torch.float32 if regression else torch.int64
    return Encoded(
        torch.from_numpy(table).to(device),
        torch.tensor(rows.labels, dtype=kind, device=device),
        lengths,
        truncated,
    )


def _check_room(room: int, parts: int, max_length: int) -> None:
    if room < parts:
        raise ValueError(f"max_length {max_length} leaves no room for {parts} text(s)")


def _by_template(rows: Rows, tokenizer: Tokenizer, max_length: int) -> tuple[list[list[int]], int]:
    parts = len(rows.texts[0])
    room = max_length - tokenizer.num_special_tokens_to_add(parts == 2)
    _check_room(room, parts, max_length)
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    try:
        texts = [text if parts == 2 else text[0] for text in rows.texts]
        encodings = tokenizer.encode_batch(texts)
    finally:
        tokenizer.no_truncation()
    return [e.ids for e in encodings], sum(bool(e.overflowing) for e in encodings)


def _by_names(rows: Rows, tokenizer: Tokenizer, max_length: int) -> tuple[list[list[int]], int]:
    special = special_ids(tokenizer)
    start = special.eos if special.bos is None else special.bos
    parts = len(rows.texts[0])
    room = max_length - 1 - parts
    _check_room(room, parts, max_length)
    columns = [
        [e.ids for e in tokenizer.encode_batch([text[i] for text in rows.texts],
                                               add_special_tokens=False)]
        for i in range(parts)
    ]  # fmt: skip
    sequences, truncated = [], 0
    for texts in zip(*columns, strict=True):
        kept = _cut(list(texts), room)
        truncated += sum(map(len, kept)) < sum(map(len, texts))
        sequences.append([start, *(id_ for ids in kept for id_ in (*ids, special.eos))])
    return sequences, truncated


def _cut(texts: list[list[int]], room: int) -> list[list[int]]:
    """Cut the longer text until both fit into `room` tokens together."""
    over = sum(map(len, texts)) - room
    if over <= 0:
        return texts
    if len(texts) == 1:
        return [texts[0][:room]]
    long, short = (0, 1) if len(texts[0]) >= len(texts[1]) else (1, 0)
    keep = max(len(texts[long]) - over, min(len(texts[short]), (room + 1) // 2))
    texts[long] = texts[long][:keep]
    texts[short] = texts[short][: room - keep]
    return texts


class Order:
    """Which rows the batches of training have: an epoch visits all once, in an order of (seed,
    epoch).

    With data.grouped the rows of a batch were sorted by length among those of 50 batches, so that
    little of it is padding; the batches of an epoch come in random order.
    """

    def __init__(self, data: Encoded, batch_size: int, seed: int) -> None:
        self._lengths, self._size, self._seed = data.lengths, batch_size, seed
        self._grouped = data.grouped
        self._epoch, self._places = -1, data.lengths[:0]

    def places(self, epoch: int, batch: int) -> np.ndarray:
        """Places of the rows of a batch of an epoch."""
        if epoch != self._epoch:
            self._epoch, self._places = epoch, self._shuffled(epoch)
        return self._places[batch * self._size : (batch + 1) * self._size]

    def _shuffled(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        size, order = self._size, random.permutation(len(self._lengths))
        if not self._grouped:
            return order
        for first in range(0, len(order), _POOL * size):
            pool = order[first : first + _POOL * size]
            pool[:] = pool[np.argsort(self._lengths[pool], kind="stable")]
        whole = len(order) // size  # the last batch may have fewer rows, and stays the last
        batches = order[: whole * size].reshape(whole, size)
        return np.concatenate([random.permutation(batches).reshape(-1), order[whole * size :]])


def scoring_batches(data: Encoded, batch_size: int) -> Iterator[np.ndarray]:
    """Places of each batch, rows of like length together."""
    order = np.argsort(data.lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
