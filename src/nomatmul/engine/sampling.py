"""From logits to a token: greedy, or temperature with top-k, top-p, min-p and penalties.

Order, as in Hugging Face transformers: repetition penalty (then OpenAI's: presence and frequency
penalty, bias), temperature, top-k, top-p, min-p.
Randomness comes from Python's own generator seeded by the user, so a seed gives the same text
on every machine and numpy version.
"""

from __future__ import annotations

import math
import numbers
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.penalties import Penalties

_BANNED = -100.0  # a bias with which a token is never chosen
# Shares of the likeliest token's probability above which top-p looks for its tokens, in this order:
# to sort them all takes longest.
_FLOORS = (2**-7, 2**-11, 2**-15, 0.0)
_NEAR = 8.0  # natural logs below the largest, where the largest ones are looked for first
_FEW = 256  # that are sorted in no time
_BLOCK = 128  # tokens whose probabilities are added up together


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: handed to `generate` and `stream` whole or as their keywords.

    temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, the higher the
    wilder. top_k: draw among the K likeliest tokens (0: all). top_p: draw among the fewest
    likeliest tokens whose probabilities sum to at least this share (1: all). min_p: drop tokens
    below this share of the likeliest one's probability (0: none). repetition_penalty: above 1
    makes tokens that were used less likely (arXiv 1909.05858). seed: makes draws repeatable.

    presence_penalty, frequency_penalty: -2 to 2; taken from the logit of a token that was made,
    once, and for each time that it was made. logit_bias: {token id: -100 to 100}, added to logits;
    -100 bans the token. It is kept as a sorted tuple of pairs.

    Raises ValueError naming the value and its limits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf)
        _check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        # beyond that float32 logits overflow
        _check("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        check_count("top_k", self.top_k)
        if self.seed is not None and not _is_int(self.seed):
            raise ValueError(f"seed must be a whole number or None, got {self.seed!r}")
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError for a bias of an id that a vocabulary of this size lacks."""
        for token in dict(self.logit_bias):
            if token >= size:
                raise ValueError(
                    f"logit_bias names token id {token}: this model has ids 0 to {size - 1}"
                )

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


class Unanswerable(ValueError):
    """What is asked for together leaves no answer; it shows while one is made."""


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
        bias = dict(sampling.logit_bias)
        self._penalties = Penalties(
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            bias,
            history,
        )
        self._legal = legal
        self._banned = [token for token, value in bias.items() if value == _BANNED]
        self._choices: NDArray[np.int64] | slice | None = None
        seed = sampling.seed
        self._random = random.Random(None if seed is None else int(seed))  # also numpy's numbers

    def sample(
        self, logits_V: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None
    ) -> int:
        """Return the next token id for float32 logits [V].

        allowed: bool [V], which tokens may be chosen this time; None for all that are legal.
        Raises ValueError for logits that are not finite, or where no token may be chosen.
        """
        if not np.isfinite(logits_V).all():
            raise ValueError("the logits are not finite (NaN or infinity): the model is damaged")
        choices = self._chosen_among(len(logits_V), allowed)
        logits = self._penalties.apply(logits_V)[choices]
        at = int(np.argmax(logits)) if self.sampling.temperature == 0.0 else self._draw(logits)
        token = at if isinstance(choices, slice) else int(choices[at])
        self._penalties.add(token)
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        options, share = self.sampling, self._random.random()
        if options.top_k == 0 and options.top_p == 1.0 and options.min_p == 0.0:
            at = _quick_draw(_scaled(logits, options.temperature), share)
            if at is not None:
                return at
        ids, p = candidates(logits, options)
        # The sum is rounded; the last candidate takes what is left.
        at = int(np.searchsorted(np.cumsum(p), share * p.sum(), side="right"))
        return int(ids[min(at, len(ids) - 1)])

    def _chosen_among(
        self, size: int, allowed: NDArray[np.bool_] | None
    ) -> NDArray[np.int64] | slice:
        """The ids that may be chosen, in ascending order; a slice where they are the first ones."""
        if self._choices is None:
            legal = np.arange(size) if self._legal is None else self._legal
            if self._banned:
                legal = np.setdiff1d(legal, self._banned, assume_unique=True)
            first = not len(legal) or int(legal[-1]) == len(legal) - 1
            self._choices = slice(len(legal)) if first else legal
        choices = self._choices
        if allowed is not None:
            assert len(allowed) == size
            within = np.flatnonzero(allowed[choices])
            choices = within if isinstance(choices, slice) else choices[within]
        if (choices.stop if isinstance(choices, slice) else len(choices)) == 0:
            raise Unanswerable("no token may be chosen here: bias and grammar leave none")
        return choices


def candidates(
    logits_V: NDArray[np.float32], options: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return (ids, probabilities) that survive top-k, top-p and min-p; they sum to about 1.

    Ties at a border fall to the lower id.
    """
    scaled = _scaled(logits_V, options.temperature)
    ids = np.arange(len(scaled))
    if 0 < options.top_k < len(scaled):
        ids = largest(scaled, options.top_k)
        scaled = scaled[ids]
    p = np.exp(scaled)
    p /= p.sum()
    if options.top_p < 1.0:
        ids, p = _top_p(ids, p, options.top_p)
    if options.min_p > 0.0:
        keep = p >= options.min_p * p.max()
        ids, p = ids[keep], p[keep]
    return ids, p / p.sum()


def _scaled(logits_V: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = logits_V.astype(np.float64)
    scaled -= scaled.max()
    # A tiny temperature overflows to infinity only below the maximum, which is right.
    with np.errstate(over="ignore"):
        scaled /= temperature
    return scaled


def _quick_draw(scaled: NDArray[np.float64], share: float) -> int | None:
    """The token at this share of the whole probability, found without adding all of it up token
    by token; None where it lies so near a token's border that roundings decide, as good as never.
    """
    weights = np.exp(scaled, out=scaled)
    whole = len(weights) // _BLOCK * _BLOCK
    ends = np.empty(whole // _BLOCK + 1)
    np.add.reduce(weights[:whole].reshape(-1, _BLOCK), axis=1, out=ends[:-1])
    ends[-1] = weights[whole:].sum()
    np.cumsum(ends, out=ends)
    target = share * ends[-1]
    block = int(ends.searchsorted(target, side="right"))
    before = ends[block - 1] if block else 0.0
    first = block * _BLOCK
    inner = before + weights[first : first + _BLOCK].cumsum()
    at = int(inner.searchsorted(target, side="right"))
    # ten times what two orders of adding so many numbers can differ by
    unsure = 1e-15 * len(weights) * ends[-1]
    if at == len(inner) or inner[at] - target < unsure:
        return None
    if target - (inner[at - 1] if at else before) < unsure:
        return None
    return first + at


def largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, equal ones by index."""
    near = np.flatnonzero(values >= values.max() - _NEAR)
    if count <= len(near) <= 4 * count + _FEW:  # to sort them is cheaper than a partition of all
        return _descending(near, values)[:count]
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    ties = np.flatnonzero(values == border)[: count - len(above)]
    kept = np.concatenate([above, ties])
    return kept[np.lexsort((kept, -values[kept]))]


def _descending(indices: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ascending indices by their values, largest first, equal ones by index."""
    return indices[np.argsort(-values[indices], kind="stable")]


def _top_p(
    ids: NDArray[np.int64], p: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    for floor in _FLOORS:
        order = np.flatnonzero(p >= floor * p.max())
        if floor and p[order].sum() < top_p:
            continue
        order = _descending(order, p)
        before = np.cumsum(p[order]) - p[order]
        kept = order[before < top_p]
        if len(kept) < len(order):
            break
    return ids[kept], p[kept]


def check_count(name: str, value: Any) -> int:
    """Return a whole number >= 0; raises ValueError naming it."""
    if not _is_int(value) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """Biases as sorted pairs; raises ValueError for what is none."""
    if isinstance(bias, Mapping):
        bias = tuple(bias.items())
    if not isinstance(bias, tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in bias):
        raise ValueError(f"logit_bias must map token ids to numbers, got {type(bias).__name__}")
    for token, value in bias:
        check_count("a token id of logit_bias", token)
        _check(f"logit_bias of token {token}", value, _BANNED, -_BANNED)
    return tuple(sorted({int(token): float(value) for token, value in bias}.items()))


def _check(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    inside = number and (low < value if open_low else low <= value) and value <= high
    if inside and value <= sys.float_info.max:  # of whole numbers, too, which may be longer
        return
    above = "above" if open_low else "at least"
    upper = f" and at most {high:g}" if math.isfinite(high) else ""
    raise ValueError(f"{name} must be a finite number {above} {low:g}{upper}, got {value!r}")
