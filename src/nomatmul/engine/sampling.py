"""From logits to a token: greedy, or temperature with top-k, top-p, min-p and a penalty.

Order, as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
Randomness comes from Python's own generator seeded by the user, so a seed gives the same text
on every machine and numpy version.
"""

from __future__ import annotations

import math
import numbers
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_LOOK = 256  # how many of the likeliest tokens top-p sorts before it sorts them all


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: handed to `generate` and `stream` whole or as their keywords.

    temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, the higher the
    wilder. top_k: draw among the K likeliest tokens (0: all). top_p: draw among the fewest
    likeliest tokens whose probabilities sum to at least this share (1: all). min_p: drop tokens
    below this share of the likeliest one's probability (0: none). repetition_penalty: above 1
    makes tokens that were used less likely (arXiv 1909.05858). seed: makes draws repeatable.

    Raises ValueError naming the value and its limits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf)
        _check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        # beyond that float32 logits overflow
        _check("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        check_count("top_k", self.top_k)
        if self.seed is not None and not _is_int(self.seed):
            raise ValueError(f"seed must be a whole number or None, got {self.seed!r}")

    def unless(self, whole: Sampling | None) -> Sampling:
        """`whole` where it is given, else self, made from keywords of their own; never both.

        Raises ValueError where a keyword says something, too.
        """
        if whole is None:
            return self
        if not isinstance(whole, Sampling):
            raise ValueError(f"sampling must be a Sampling, got {type(whole).__name__}")
        if self != Sampling():
            raise ValueError("give sampling, or temperature and the like, not both")
        return whole


class Sampler:
    """Draws tokens one after the other; the same seed and logits give the same tokens.

    history: tokens that a repetition penalty counts as used. legal: the ids that may be chosen, in
    ascending order; None for all of them.
    """

    def __init__(
        self,
        sampling: Sampling,
        history: Iterable[int] = (),
        legal: NDArray[np.int64] | None = None,
    ) -> None:
        self.sampling = sampling
        self._legal = legal
        seed = sampling.seed
        self._random = random.Random(None if seed is None else int(seed))  # also numpy's numbers
        self._used = set(history) if sampling.repetition_penalty != 1.0 else set()

    def sample(self, logits_V: NDArray[np.float32]) -> int:
        """Return the next token id for float32 logits [V].

        Raises ValueError for logits that are not finite.
        """
        if not np.isfinite(logits_V).all():
            raise ValueError("the logits are not finite (NaN or infinity): the model is damaged")
        options = self.sampling
        if options.repetition_penalty != 1.0:
            logits_V = self._penalised(logits_V)
        if self._legal is not None:
            logits_V = logits_V[self._legal]
        if options.temperature == 0.0:
            token = int(np.argmax(logits_V))
        else:
            ids, p = candidates(logits_V, options)
            # The sum is rounded; the last candidate takes what is left.
            at = int(np.searchsorted(np.cumsum(p), self._random.random() * p.sum(), side="right"))
            token = int(ids[min(at, len(ids) - 1)])
        if self._legal is not None:
            token = int(self._legal[token])
        if options.repetition_penalty != 1.0:
            self._used.add(token)
        return token

    def _penalised(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        logits_V = logits_V.copy()
        used = np.fromiter(self._used, dtype=np.int64, count=len(self._used))
        values = logits_V[used]
        penalty = np.float32(self.sampling.repetition_penalty)
        logits_V[used] = np.where(values > 0, values / penalty, values * penalty)
        return logits_V


def candidates(
    logits_V: NDArray[np.float32], options: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return (ids, probabilities) that survive top-k, top-p and min-p; they sum to about 1.

    Ties at a border fall to the lower id.
    """
    scaled = logits_V.astype(np.float64)
    # A tiny temperature overflows to infinity only below the maximum, which is right.
    with np.errstate(over="ignore"):
        scaled = (scaled - scaled.max()) / options.temperature
    ids = np.arange(len(scaled))
    if 0 < options.top_k < len(scaled):
        ids = _largest(scaled, options.top_k)
        scaled = scaled[ids]
    p = np.exp(scaled)
    p /= p.sum()
    if options.top_p < 1.0:
        ids, p = _top_p(ids, p, options.top_p)
    if options.min_p > 0.0:
        keep = p >= options.min_p * p.max()
        ids, p = ids[keep], p[keep]
    return ids, p / p.sum()


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, equal ones by index."""
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    ties = np.flatnonzero(values == border)[: count - len(above)]
    kept = np.concatenate([above, ties])
    return kept[np.lexsort((kept, -values[kept]))]


def _top_p(
    ids: NDArray[np.int64], p: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    for count in (min(_FIRST_LOOK, len(p)), len(p)):
        order = _largest(p, count)
        before = np.cumsum(p[order]) - p[order]
        kept = order[before < top_p]
        if len(kept) < count or count == len(p):
            break
    return ids[kept], p[kept]


def check_count(name: str, value: Any) -> int:
    """Return a whole number >= 0; raises ValueError naming it."""
    if not _is_int(value) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    inside = number and (low < value if open_low else low <= value) and value <= high
    if inside and value <= sys.float_info.max:  # of whole numbers, too, which may be longer
        return
    above = "above" if open_low else "at least"
    upper = f" and at most {high:g}" if math.isfinite(high) else ""
    raise ValueError(f"{name} must be a finite number {above} {low:g}{upper}, got {value!r}")
