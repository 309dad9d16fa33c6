"""What a sequence leaves behind: the recurrent state of an MLGRU model.

Also the one place that knows how transformers names the argument that carries it: `cache` since
5.2x, `past_key_values` before. Our `forward` and `generate` take both with every version.

Shape suffixes: B sequences, D hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ["cache", "past_key_values"]
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
LIBRARY_NAME = next(name for name in CACHE_NAMES if name in _FIELDS)
"""What this version of transformers calls the cache, in arguments and outputs."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def one_cache(given: dict[str, Any], name: str) -> dict[str, Any]:
    """`given` with the cache, whatever its name there, under `name`.

    Raises ValueError if they are two.
    """
    found = [given[n] for n in CACHE_NAMES if given.get(n) is not None]
    if len({id(cache) for cache in found}) > 1:
        raise ValueError(f"two caches were given, as {' and as '.join(CACHE_NAMES)}: give one")
    rest = {n: value for n, value in given.items() if n not in CACHE_NAMES}
    return {**rest, name: found[0]} if found else rest


def takes_cache(function: _Function) -> _Function:
    """Let a method with the argument `cache` take it under every name that transformers has."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **one_cache(kwargs, "cache"))

    return cast(_Function, call)


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, LIBRARY_NAME)


class RecurrentCache:
    """One float32 state [B, D] a layer; its size does not grow with the sequence.

    Speaks the part of transformers' cache protocol that `generate` and beam search use.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[Tensor | None] = [None] * num_layers
        self.seen = 0

    def __len__(self) -> int:
        return len(self.states)

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: to transformers, a linear cache cannot tell what it has seen."""
        return [False] * len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions (padding included) that went into the state."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a recurrent state has no longest sequence."""
        return -1

    get_max_cache_shape = get_max_length

    def fork(self) -> RecurrentCache:
        """An independent copy."""
        copy = RecurrentCache(len(self.states))
        copy.states = [None if s is None else s.clone() for s in self.states]
        copy.seen = self.seen
        return copy

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row r the state of sequence beam_idx[r] (beam search)."""
        self._map(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named."""
        self._map(lambda s: s[indices.to(s.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda s: s.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a recurrent state cannot be rolled back; fork() it beforehand."""
        raise ValueError(
            f"cannot remove {tokens_to_remove} tokens from a recurrent state: fork it before"
        )

    def _map(self, change: object) -> None:
        assert callable(change)
        self.states = [None if s is None else change(s) for s in self.states]

    @property
    def nbytes(self) -> int:
        """Bytes held by the states."""
        return sum(s.numel() * s.element_size() for s in self.states if isinstance(s, torch.Tensor))
