"""Vectors of texts by a causal model: the hidden state behind the last token, divided by its
length.

Legend: B texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend, Ids
    from nomatmul.engine.state import Float

_TOGETHER = 16  # texts that go through the layers in one step


def embed_ids(backend: CausalBackend, ids: Sequence[Ids]) -> Float:
    """Return float32 [B, D] of length 1, a vector for the token ids [T] of each text."""
    # those of like length together: a step takes as long as its tokens, its memory as the longest
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    rows: list[Float] = [np.empty(0, np.float32)] * len(ids)
    for start in range(0, len(order), _TOGETHER):
        part = order[start : start + _TOGETHER]
        states = [backend.new_state() for _ in part]
        hidden_SD = backend.step(states, [ids[number] for number in part], "hidden")
        for number, row in zip(part, hidden_SD, strict=True):
            rows[number] = row
    vectors_BD = np.stack(rows)
    length_B1 = np.sqrt(np.sum(vectors_BD * vectors_BD, axis=1, keepdims=True, dtype=np.float64))
    return (vectors_BD / np.maximum(length_B1, 1e-12)).astype(np.float32)
