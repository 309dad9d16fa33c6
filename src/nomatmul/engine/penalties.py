"""What a sampling changes of the logits of single tokens: penalties for used ones, and biases.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


class Penalties:
    """The changes of one sequence, in this order: repetition penalty, presence and frequency
    penalty, bias.

    repetition, presence, frequency, bias: as `Sampling` has them. history: tokens of the prompt, of
    which only the repetition penalty takes note.
    """

    def __init__(
        self,
        repetition: float,
        presence: float,
        frequency: float,
        bias: Mapping[int, float],
        history: Iterable[int] = (),
    ) -> None:
        self._repetition = np.float32(repetition)
        self._presence, self._frequency = np.float32(presence), np.float32(frequency)
        self._used = _Tokens(history) if repetition != 1.0 else None
        self._made = _Tokens() if presence or frequency else None
        self._biased, self._bias = np.array([*bias], np.int64), np.array([*bias.values()], "f4")

    def apply(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the changed logits; those of the caller stay as they are."""
        if self._used is None and self._made is None and not len(self._biased):
            return logits_V
        logits_V = logits_V.copy()
        if self._used is not None:
            used = self._used.ids
            values = logits_V[used]
            penalty = self._repetition
            logits_V[used] = np.where(values > 0, values / penalty, values * penalty)
        if self._made is not None:
            logits_V[self._made.ids] -= self._presence + self._frequency * self._made.counts
        logits_V[self._biased] += self._bias
        return logits_V

    def add(self, token: int) -> None:
        """Count a made token."""
        for tokens in (self._used, self._made):
            if tokens is not None:
                tokens.add(token)


class _Tokens:
    """Distinct tokens, and how often each was added; arrays that grow by doubling."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}
        self._ids, self._counts = np.zeros(64, np.int64), np.zeros(64, np.float32)
        for token in tokens:
            self.add(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1
