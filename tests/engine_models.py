"""Sizes and inputs that the engine's tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nomatmul.engine import LanguageModel, Session
from nomatmul.engine.backends.native import NativeBackend
from nomatmul.engine.state import State
from nomatmul.formats.config import ModelConfig

# No dimension is a multiple of a kernel's step.
CONFIG = ModelConfig(
    vocab_size=301, hidden_size=136, num_layers=3, intermediate_size=203, num_heads=1
)
# Heads of awkward size in groups, norms on them; a page holds 64 positions.
ATTENTION = ModelConfig(
    vocab_size=97, hidden_size=72, num_layers=2, intermediate_size=80, token_mixer="attention",
    num_heads=6, num_kv_heads=2, head_dim=20, qk_norm=True, max_position_embeddings=200,
    use_lower_bound=False,
)  # fmt: skip


def random_ids(count: int, vocab_size: int = CONFIG.vocab_size, seed: int = 0) -> np.ndarray:
    """Token ids int32 [count]."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.int32)


def state_of(session: Session) -> np.ndarray:
    """A copy of the state of a sequence whose layers leave one piece each: float32 [L, D]."""
    return np.stack(list(session.arrays().values()))


def total_bytes(states: Iterable[State]) -> int:
    """Bytes of several states in memory; what forks share is counted once."""
    found: dict[int, int] = {}
    for state in states:
        found |= state.memory()
    return sum(found.values())


def rebuilt(lm: LanguageModel, **options: Any) -> LanguageModel:
    """The same weights under another chunk, number of threads or instruction set."""
    old = lm.backend
    assert isinstance(old, NativeBackend)
    return lm.on(NativeBackend(lm.config, old.forms, old.weights, **options))
