"""Small union models (mlgru, fff, ternary) of awkward sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.trees import TernaryTrees
from nomatmul.reference.weights import PackedWeights


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


def oracle_trees(directory: Path) -> list[TernaryTrees]:
    """The numpy oracle's trees of a packed union, layer by layer."""
    reader = PackedReader(directory)
    weights, found = PackedWeights(reader), []
    for name, part in architecture_of(reader.config).trees().items():
        trees = weights.trees(name, part)
        assert isinstance(trees, TernaryTrees)
        found.append(trees)
    return found
