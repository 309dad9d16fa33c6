"""What a sequence leaves behind: named pieces of state, a layer.

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


class StateCache:
    """Named pieces of state of each layer: {name: tensor, sequences first}.

    A recurrence replaces its pieces (MLGRU's "h" float32 [B, D]); attention lets "k" and "v" grow
    by `update`, [B, heads, positions, E]. Layers of both kinds may stand in one model.
    Speaks the part of transformers' cache protocol that `generate` and beam search use.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
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
        """-1: the cache has no longest sequence."""
        return -1

    get_max_cache_shape = get_max_length

    def update(self, k_BJTE: Tensor, v_BJTE: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values of new positions to a layer's; returns all of them."""
        state = self.states[layer_idx]
        for name, new in (("k", k_BJTE), ("v", v_BJTE)):
            state[name] = torch.cat([state[name], new], dim=-2) if name in state else new
        return state["k"], state["v"]

    def fork(self) -> StateCache:
        """An independent copy."""
        copy = StateCache(len(self.states))
        copy.states = [{name: s.clone() for name, s in state.items()} for state in self.states]
        copy.seen = self.seen
        return copy

    def reset(self) -> None:
        """Forget everything."""
        self.states = [{} for _ in self.states]
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

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [{name: change(s) for name, s in state.items()} for state in self.states]

    @property
    def nbytes(self) -> int:
        """Bytes held by the states."""
        pieces = [s for state in self.states for s in state.values()]
        return sum(s.numel() * s.element_size() for s in pieces)


RecurrentCache = StateCache  # its first name, from when every model was recurrent
