"""Hidden states of many sequences: as many tokens at a time as a backend computes well.

Legend: B sequences, T tokens, N tokens of all sequences, D hidden size.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.engine.blas import blas_threads

if TYPE_CHECKING:
    from nomatmul.engine.backend import EncoderBackend, Paths
    from nomatmul.engine.state import Float
    from nomatmul.formats.config import ModelConfig

# Tokens of one pass: enough for the matrix products, few enough that what is between two of
# them stays in the last cache.
PASS_TOKENS = 2048

Pass = tuple["Float", NDArray[np.int64]]


class Passes:
    """Runs an encoder's backend; one thread at a time computes, others wait."""

    def __init__(self, backend: EncoderBackend, config: ModelConfig) -> None:
        self.backend, self.config = backend, config
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this thread alone computes, with as many BLAS threads as the model has."""
        with self._lock, blas_threads(self.backend.threads):
            yield

    def side_by_side(self, sequences: Sequence[list[int]]) -> Iterator[Pass]:
        """(hidden [N, D], offsets) of as many sequences at a time as a pass holds, in order."""
        group: list[list[int]] = []
        for ids in sequences:
            if group and sum(map(len, group)) + len(ids) > PASS_TOKENS:
                yield self._together(group)
                group = []
            group.append(ids)
        if group:
            yield self._together(group)

    def _together(self, group: list[list[int]]) -> Pass:
        offsets = np.cumsum([0, *(len(ids) for ids in group)], dtype=np.int64)
        ids_N = np.fromiter((i for ids in group for i in ids), np.int32, int(offsets[-1]))
        with self.alone():
            return self.backend.hidden(ids_N, offsets), offsets

    def padded(
        self,
        ids: ArrayLike,
        mask: ArrayLike | None,
        *,
        paths: Paths | None = None,
        seconds: dict[str, float] | None = None,
    ) -> tuple[Float, NDArray[np.bool_]]:
        """(hidden [B, T, D], seen [B, T]) of ids [B, T] or [T]; see EncoderBackend.hidden.

        Raises ValueError for ids or a mask that do not fit.
        """
        ids_BT = checked_ids(ids, self.config)
        seen_BT = checked_mask(mask, ids_BT.shape)
        batch, length = ids_BT.shape
        step = max(1, PASS_TOKENS // length) if paths is None else batch
        parts = []
        for at in range(0, batch, step):
            rows = ids_BT[at : at + step]
            offsets = np.arange(len(rows) + 1, dtype=np.int64) * length
            seen = None if mask is None else seen_BT[at : at + step].reshape(-1).astype(np.uint8)
            flat = rows.reshape(-1).astype(np.int32)
            with self.alone():
                parts.append(self.backend.hidden(flat, offsets, seen, paths=paths, seconds=seconds))
        return np.concatenate(parts).reshape(batch, length, -1), seen_BT


def checked_ids(ids: ArrayLike, config: ModelConfig) -> NDArray[np.int64]:
    """Token ids as int64 [B, T]; raises ValueError for what the model cannot read."""
    array = np.asarray(ids)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"token ids must be whole numbers [B, T], got {array.dtype} {list(array.shape)}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"token id {bad} is out of range; the vocabulary is 0..{config.vocab_size - 1}"
        )
    if array.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"a sequence of {array.shape[1]} tokens is longer than the model's"
            f" {config.max_position_embeddings} positions"
        )
    return array.astype(np.int64)


def checked_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which tokens are seen, bool [B, T]; raises ValueError for a mask that hides a sequence."""
    if mask is None:
        return np.ones(shape, bool)
    array = np.asarray(mask)
    array = array[None] if array.ndim == 1 else array
    if array.shape != shape:
        raise ValueError(f"the mask has shape {list(array.shape)}, the token ids {list(shape)}")
    if not np.all((array == 0) | (array == 1)):
        raise ValueError("the mask must hold 0 and 1 only")
    seen = array.astype(bool)
    if not seen.any(axis=1).all():
        empty = int(np.argmin(seen.any(axis=1)))
        raise ValueError(f"sequence {empty} has no token: its mask is 0 everywhere")
    return seen
