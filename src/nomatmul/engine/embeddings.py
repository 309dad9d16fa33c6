"""Vectors of texts by a causal model: the hidden state behind the last token, divided by its
length.

Legend: B texts, D hidden size, S texts of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend, Ids
    from nomatmul.engine.state import Float

_TOGETHER = 16  # texts that go through the layers in one step


def embed_ids(backend: CausalBackend, ids: Sequence[Ids]) -> Float:
    """Return float32 [B, D] of length 1, a vector for the token ids [T] of each text."""
    reading = Reading(backend, ids)
    while reading.left:
        reading.advance(reading.left)
    return reading.vectors()


class Reading:
    """Texts on their way to vectors, a bounded number of tokens at a time.

    ids: token ids [T] of each text, at least one. left: tokens that are not read yet. How they are
    cut into steps changes no bit of a vector.
    """

    def __init__(self, backend: CausalBackend, ids: Sequence[Ids]) -> None:
        self._backend, self._ids = backend, list(ids)
        # those of like length together: a step's memory is that of the longest
        self._order = sorted(range(len(ids)), key=lambda number: len(ids[number]), reverse=True)
        self._rows: list[Float] = [np.empty(0, np.float32)] * len(ids)
        self._begun: tuple[Any, int] | None = None  # state and tokens read of the last in order
        self.left = sum(map(len, ids))

    def advance(self, tokens: int) -> int:
        """Read so many tokens more, at least one, and return how many it were."""
        states: list[Any] = []
        parts: list[Ids] = []
        whole: list[int] = []
        room = max(1, tokens)
        while self._order and room and len(parts) < _TOGETHER:
            number = self._order[-1]
            state, start = self._begun or (self._backend.new_state(), 0)
            part = self._ids[number][start : start + room]
            states.append(state)
            parts.append(part)
            room -= len(part)
            if start + len(part) < len(self._ids[number]):
                self._begun = (state, start + len(part))
                break
            self._begun = None
            whole.append(self._order.pop())
        rows_SD = self._backend.step(states, parts, "hidden")
        for number, row in zip(whole, rows_SD, strict=False):  # without one that goes on
            self._rows[number] = row
        read = sum(map(len, parts))
        self.left -= read
        return read

    def vectors(self) -> Float:
        """float32 [B, D] of length 1; all tokens must have been read."""
        assert not self.left
        vectors_BD = np.stack(self._rows)
        length_B1 = np.sqrt(
            np.sum(vectors_BD * vectors_BD, axis=1, keepdims=True, dtype=np.float64)
        )
        return (vectors_BD / np.maximum(length_B1, 1e-12)).astype(np.float32)
