"""Small union models (mlgru, fff, ternary) of awkward sizes."""

from __future__ import annotations

from typing import Any

from nomatmul.formats.config import ModelConfig


def union(**options: Any) -> ModelConfig:
    """A config whose sizes are no multiples of any kernel's step."""
    sizes = {
        "vocab_size": 131,
        "hidden_size": 75,
        "num_layers": 2,
        "channel_mixer": "fff",
        "activation": "silu",
        "fff_trees": 5,
        "fff_depth": 3,
    }
    return ModelConfig(**{**sizes, **options})
