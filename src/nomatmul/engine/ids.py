"""Token ids as users give them, and the probabilities of given ones.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def checked_ids(ids: Sequence[int] | NDArray[Any], vocab_size: int) -> NDArray[np.int32]:
    """Return ids as int32 [T]; raises ValueError for none, or one out of range."""
    # one token of a sequence that goes on, each step again: numpy's checks take longer than this
    if type(ids) is list and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < vocab_size:
        return np.array(ids, np.int32)
    if isinstance(ids, str | bytes):
        raise ValueError("token ids are numbers; encode the text with lm.tokenizer first")
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"token ids must be a list of numbers: {error}") from None
    if array.size == 0:
        raise ValueError("the prompt is empty: give at least one token id")
    # numpy reads True among whole numbers as 1, and keeps ones beyond 64 bits as objects
    items = ids if isinstance(ids, list | tuple) else ()
    huge = array.dtype == object and all(isinstance(item, numbers.Integral) for item in items)
    odd = any(isinstance(item, bool | np.bool_) for item in items)
    if array.ndim != 1 or odd or not (array.dtype.kind in "iu" or (items and huge)):
        found = f"{array.dtype} {list(array.shape)}" if array.ndim else f"{ids!r}"
        raise ValueError(f"token ids must be a list of whole numbers, got {found}")
    low, high, size = int(array.min()), int(array.max()), vocab_size
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is out of range: this model has ids 0 to {size - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)


def log_probabilities(
    logits_TV: NDArray[np.float32], targets_T: NDArray[Any]
) -> NDArray[np.float64]:
    """Return float64 [T]: log softmax of each row of float32 [T, V] at its target id."""
    top_T = logits_TV.max(axis=1)
    chosen_T = logits_TV[np.arange(len(targets_T)), targets_T].astype(np.float64)
    shifted_TV = logits_TV - top_T[:, None]
    sums_T = np.exp(shifted_TV, out=shifted_TV).sum(axis=1, dtype=np.float64)
    result: NDArray[np.float64] = chosen_T - top_T.astype(np.float64) - np.log(sums_T)
    return result
