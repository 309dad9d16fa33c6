"""Small published decoders of every kind that is packed; each function returns the path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf_models import write_gguf
from support.published_lm import (
    BITNET,
    LLAMA,
    QWEN3,
    random_model,
    write_masters,
    write_packed,
    write_unpacked,
    write_values,
)


def bitnet(directory: Path, rng: np.random.Generator) -> Path:
    """BitNet, four ternary rows a byte."""
    return write_packed(directory, random_model(BITNET, rng), legacy=False)


def unpacked(directory: Path, rng: np.random.Generator) -> Path:
    """BitNet, a float a ternary value, beside its scale."""
    return write_unpacked(directory, random_model(BITNET, rng))


def masters(directory: Path, rng: np.random.Generator) -> Path:
    """BitNet before its weights are made ternary."""
    return write_masters(directory, random_model(BITNET, rng), rng)


def falcon(directory: Path, rng: np.random.Generator) -> Path:
    """Llama's shape, packed; the stored scale divides."""
    return write_packed(directory, random_model(LLAMA, rng), legacy=True)


def inner_norms(directory: Path, rng: np.random.Generator) -> Path:
    """The same with a norm inside each linear."""
    model = random_model(LLAMA, rng, inner_norm="rms_norm")
    return write_packed(directory, model, legacy=True, use_rms_norm=True)


def values(directory: Path, rng: np.random.Generator) -> Path:
    """Llama's shape, floats whose values are ternary; one scale a matrix."""
    return write_values(directory, random_model(LLAMA, rng))


def bonsai(directory: Path, rng: np.random.Generator) -> Path:
    """Qwen3's shape, a scale for 32 inputs, head and embedding ternary."""
    return write_values(directory, random_model(QWEN3, rng, group=32, ternary_head=True))


def tied_bonsai(directory: Path, rng: np.random.Generator) -> Path:
    """The same with one matrix for head and embedding."""
    tied = {**QWEN3, "tie_word_embeddings": True}
    return write_values(directory, random_model(tied, rng, group=32, ternary_head=True))


def gguf(directory: Path, rng: np.random.Generator) -> Path:
    """Qwen3's shape as a GGUF file."""
    directory.mkdir()
    write_gguf(directory / "model.gguf", "qwen3", rng, kind="TQ2_0")
    return directory / "model.gguf"


KINDS = (bitnet, unpacked, masters, falcon, inner_norms, values, bonsai, tied_bonsai, gguf)
