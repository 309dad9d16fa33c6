"""Tiny packed models for the accelerator's tests: random ones of awkward sizes, and trained ones.

A random model is written as a training checkpoint and packed, the way users do it, and is the same
in every run. Its hidden size is no multiple of the lanes that tests build, its rows no multiple of
anything. The trained ones lie in tests/golden/hardware-models (README.md there).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from model_files import write_tokenizer, write_training

from nomatmul.convert import pack
from nomatmul.formats.config import ModelConfig

TRAINED = Path(__file__).resolve().parent.parent / "golden" / "hardware-models"
TRAINED_NAMES = ("glu", "trees")  # packed directories there, with their tokenizer


@dataclass(frozen=True)
class Tiny:
    """A random model: its dials, the packing of its linears, the seed of its weights."""

    dials: dict[str, Any]
    packing: str = "2bit"
    seed: int = 1
    words: int = field(default=40)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**self.dials)


def _trees(trees: int, depth: int, **dials: Any) -> dict[str, Any]:
    values = {"vocab_size": 41, "hidden_size": 40, "num_layers": 2, "num_heads": 1}
    values |= {"channel_mixer": "fff", "activation": "silu"}
    return {**values, "fff_trees": trees, "fff_depth": depth, **dials}


_GLU = {"vocab_size": 61, "hidden_size": 72, "num_layers": 2, "num_heads": 1}

# With several trees and one, deep and flat; depth 0 has no decision at all.
RANDOM: dict[str, Tiny] = {
    "glu": Tiny({**_GLU, "intermediate_size": 107}),
    "glu-unbounded": Tiny({**_GLU, "intermediate_size": 51, "use_lower_bound": False}, seed=2),
    "glu-1.6bit": Tiny({**_GLU, "hidden_size": 66, "intermediate_size": 83}, "1.6bit", seed=3),
    "trees-3x3": Tiny(_trees(3, 3), seed=4),
    "trees-5x0": Tiny(_trees(5, 0, use_lower_bound=False), seed=5),
    "trees-1x5": Tiny(_trees(1, 5), seed=6),
    "trees-7x2": Tiny(_trees(7, 2, hidden_size=90), "1.6bit", seed=7),
    "trees-2x1-wide": Tiny(_trees(2, 1, hidden_size=130, num_layers=1), seed=8),
    # as many neurons each, for the bytes that their channel mixers fetch
    "equal-glu": Tiny({**_GLU, "hidden_size": 128, "intermediate_size": 252}, seed=9),
    "equal-trees": Tiny(_trees(4, 5, vocab_size=61, hidden_size=128), seed=10),
}


def write_random_model(name: str, directory: Path) -> Path:
    """Write the packed directory `directory` / `name` of one of RANDOM, and return it.

    Directory may hold it already: then it is taken as it is (session fixtures share models).
    """
    target = directory / name
    if target.exists():
        return target
    tiny = RANDOM[name]
    source = directory / f"{name}.checkpoint"
    write_training(source, tiny.config, np.random.default_rng(tiny.seed))
    write_tokenizer(source, words=tiny.words)
    pack(source, target, packing=tiny.packing, embedding="int8", check=False)
    return target


def trained_model(name: str) -> Path:
    """The packed directory of one of TRAINED_NAMES."""
    assert name in TRAINED_NAMES, name
    return TRAINED / name


def token_ids(name: str, count: int, seed: int = 0) -> list[int]:
    """Ids of a random text for one of RANDOM."""
    size = RANDOM[name].config.vocab_size
    return [int(i) for i in np.random.default_rng(seed).integers(0, size, count)]
