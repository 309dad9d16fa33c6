"""Sizes and inputs that the engine's tests share."""

from __future__ import annotations

import numpy as np

from nomatmul.formats.config import ModelConfig

# No dimension is a multiple of a kernel's step.
CONFIG = ModelConfig(
    vocab_size=301, hidden_size=136, num_layers=3, intermediate_size=203, num_heads=1
)


def random_ids(count: int, vocab_size: int = CONFIG.vocab_size, seed: int = 0) -> np.ndarray:
    """Token ids int32 [count]."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.int32)
