"""Packed directories of decoders with attention, written with random values of every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import Forms, PackedWriter
from nomatmul.formats.packed.layout import Matrix, layout_of
from nomatmul.formats.quantise import from_bfloat16, quantise_rows, to_bfloat16

# The published families, as small as the formats allow: (dials, forms).
SIZES = {"vocab_size": 29, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "causal": True}
ATTENTION = {**SIZES, "token_mixer": "attention", "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "bitnet": (
        {
            **ATTENTION,
            "num_kv_heads": 2,
            "intermediate_size": 96,
            "linear_norm": "sub",
            "norm_eps": 1e-5,
            "rounding": "even",
            "glu_activation": "relu2",
            "split_gate": True,
            "head_linear": "dense",
            "tie_embeddings": True,
            "rope_theta": 500000.0,
        },
        {"embedding": "int8"},
    ),
    "falcon": (
        {
            **ATTENTION,
            "num_kv_heads": 1,
            "head_dim": 32,
            "intermediate_size": 72,
            "linear_norm": "none",
            "rounding": "up",
            "split_gate": True,
            "head_linear": "dense",
        },
        {"ternary": "1.6bit", "embedding": "bf16", "head": "f16"},
    ),
    "bonsai": (
        {
            **ATTENTION,
            "num_kv_heads": 2,
            "head_dim": 32,
            "intermediate_size": 128,
            "qk_norm": True,
            "linear_norm": "none",
            "scale_group": 64,
            "embedding_linear": "ternary",
            "tie_embeddings": True,
        },
        {"scale": "f16"},
    ),
    "repack": (
        {
            **ATTENTION,
            "num_kv_heads": 4,
            "intermediate_size": 96,
            "qk_norm": True,
            "scale_group": 32,
            "linear_norm": "none",
            "head_linear": "dense",
        },
        {"embedding": "int8-32", "head": "int8-32", "scale": "f16"},
    ),
    "llama": (
        {
            **ATTENTION,
            "linear": "dense",
            "num_kv_heads": 2,
            "intermediate_size": 96,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {"embedding": "f16", "dense": "bf16", "head": "int8"},
    ),
    "embedding": (
        {
            **ATTENTION,
            "num_kv_heads": 2,
            "intermediate_size": 80,
            "qk_norm": True,
            "rounding": "even",
            "split_gate": True,
            "head_linear": "dense",
            "tie_embeddings": True,
        },
        {"embedding": "f32"},
    ),
}


# The rows of a tied head in another form than the embedding's.
FAMILIES["bitnet, two forms"] = (FAMILIES["bitnet"][0], {"embedding": "bf16", "tied_head": "int8"})


def family(name: str, **dials: Any) -> tuple[ModelConfig, Forms]:
    """The config and forms of one of FAMILIES, its dials changed."""
    values, forms = FAMILIES[name]
    config = ModelConfig(**{**values, **dials})
    return config, Forms.of(config, **forms)


def random_arrays(config: ModelConfig, forms: Forms, seed: int = 1) -> dict[str, NDArray[Any]]:
    """{name: array as the writer takes it} of every tensor; ternary matrices as int8."""
    rng = np.random.default_rng(seed)
    layout = layout_of(config, forms)
    arrays: dict[str, NDArray[Any]] = {}
    for matrix in layout.matrices:
        arrays |= _matrix(matrix, rng)
    if config.tie_embeddings and forms.head == "int8":  # of a bfloat16 embedding's rows
        rows = from_bfloat16(arrays["embedding.weight"])
        arrays["head.weight"], arrays["head.scale"] = quantise_rows(rows)
    for name, (_, shape) in layout.tensors().items():
        if name not in arrays:  # norms
            arrays[name] = (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def _matrix(matrix: Matrix, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    spread = 1.0 if matrix.kind == "embedding" else 1 / np.sqrt(matrix.shape[-1])
    if matrix.scale is not None:
        scale = spread * rng.uniform(0.8, 1.6, matrix.scale_shape)
        scale = scale if matrix.packed else scale / 64
        found[matrix.scale] = scale.astype("<f2" if matrix.scale_form == "f16" else "<f4")
    if matrix.packed:
        found[matrix.name] = rng.integers(-1, 2, matrix.shape).astype(np.int8)
    elif matrix.form.startswith("int8"):
        found[matrix.name] = rng.integers(-127, 128, matrix.shape).astype(np.int8)
    else:
        floats = (spread * rng.standard_normal(matrix.shape)).astype(np.float32)
        if matrix.form == "bf16":
            found[matrix.name] = to_bfloat16(floats)
        else:
            found[matrix.name] = floats.astype("<f2") if matrix.form == "f16" else floats
    return found


def write_random(
    directory: Path, config: ModelConfig, forms: Forms, seed: int = 1, **options: Any
) -> dict[str, NDArray[Any]]:
    """Write a packed directory of random values; returns them as `random_arrays`."""
    arrays = random_arrays(config, forms, seed)
    write_arrays(directory, config, forms, arrays, **options)
    return arrays


def write_arrays(
    directory: Path,
    config: ModelConfig,
    forms: Forms,
    arrays: dict[str, NDArray[Any]],
    **options: Any,
) -> None:
    """Write a packed directory of these arrays."""
    with PackedWriter(directory, config, forms, **options) as writer:
        for name in writer.names:
            add = writer.add_packed if name.endswith(".packed") else writer.add
            add(name, arrays[name])
