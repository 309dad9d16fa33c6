"""Published decoders in every form that transformers has a class for, and that class in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.published_lm import (
    BITNET,
    LLAMA,
    QWEN3,
    auto,
    bfloat16,
    quantised,
    random_model,
    write,
    write_masters,
    write_packed,
    write_unpacked,
    write_values,
)
from transformers import AutoModelForCausalLM

POSITIONS = 40


def stored_as(dtype: torch.dtype, directory: Path) -> Path:
    """The same checkpoint with its floats in another type, as such models are published."""
    path = directory / "model.safetensors"
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    return directory


def packed(directory: Path, rng: np.random.Generator) -> Path:
    return write_packed(directory, random_model(BITNET, rng), legacy=False)


def packed_in_bfloat16(directory: Path, rng: np.random.Generator) -> Path:
    return stored_as(torch.bfloat16, packed(directory, rng))


def unpacked(directory: Path, rng: np.random.Generator) -> Path:
    return stored_as(torch.bfloat16, write_unpacked(directory, random_model(BITNET, rng)))


def masters(directory: Path, rng: np.random.Generator) -> Path:
    model = random_model(BITNET, rng)
    return stored_as(torch.bfloat16, write_masters(directory, model, rng))


def legacy_bitnet(directory: Path, rng: np.random.Generator) -> Path:
    return write_packed(directory, random_model(BITNET, rng), legacy=True)


def legacy_llama(directory: Path, rng: np.random.Generator) -> Path:
    model = random_model({**LLAMA, "is_bitnet_config": True}, rng)
    return write_packed(directory, model, legacy=True, modules_to_not_convert=None)


def exported_llama(directory: Path, rng: np.random.Generator) -> Path:
    model = random_model({**LLAMA, "is_bitnet_config": True}, rng)
    return write_packed(directory, model, legacy=True, modules_to_not_convert=["lm_head"])


def legacy_with_norms(directory: Path, rng: np.random.Generator) -> Path:
    model = random_model(LLAMA, rng, inner_norm="rms_norm")
    return write_packed(directory, model, legacy=True, use_rms_norm=True, rms_norm_eps=1e-3)


def masters_with_norms(directory: Path, rng: np.random.Generator) -> Path:
    model = random_model(LLAMA, rng, inner_norm="rms_norm")
    for name, (t, _) in model.ternary.items():
        model.floats[f"{name}.weight"] = bfloat16(rng.standard_normal(t.shape) / 8)
    return write(directory, quantised(model, **auto("online", use_rms_norm=True)), model.floats)


INT8 = (
    *(packed, packed_in_bfloat16, unpacked, masters, legacy_bitnet, legacy_llama),
    *(exported_llama, legacy_with_norms, masters_with_norms),
)


def one_scale(directory: Path, rng: np.random.Generator) -> Path:
    return write_values(directory, random_model(LLAMA, rng))


def groups(directory: Path, rng: np.random.Generator) -> Path:
    model = random_model(QWEN3, rng, group=32, ternary_head=True)
    return write_values(directory, model, np.float16)


def tied_groups(directory: Path, rng: np.random.Generator) -> Path:
    tied = {**QWEN3, "tie_word_embeddings": True}
    return write_values(directory, random_model(tied, rng, group=32, ternary_head=True))


def float_head(directory: Path, rng: np.random.Generator) -> Path:
    return write_values(directory, random_model(QWEN3, rng, group=32))


def dense(values: dict[str, Any]) -> Callable[..., Path]:
    """What writes a model of these values whose linears are floats."""

    def writer(directory: Path, rng: np.random.Generator) -> Path:
        model = random_model(values, rng)
        for name, (t, _) in model.ternary.items():
            model.floats[f"{name}.weight"] = bfloat16(rng.standard_normal(t.shape) / 8)
        return write(directory, values, model.floats)

    return writer


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
MISTRAL |= {"sliding_window": None}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
FLOATS = {
    **{writer.__name__: writer for writer in (one_scale, groups, tied_groups, float_head)},
    "llama": dense(LLAMA),
    "qwen3": dense(QWEN3),
    "mistral": dense({**LLAMA, **MISTRAL}),
    **{kind: dense({**LLAMA, "rope_scaling": scaling}) for kind, scaling in ROPE.items()},
    "rope_parameters": dense({**QWEN3, "rope_parameters": {**ROPE["yarn"], "rope_theta": 900.0}}),
}


def ids_of(rng: np.random.Generator) -> np.ndarray:
    """Token ids [2, POSITIONS]."""
    return rng.integers(3, 61, (2, POSITIONS))


def transformers_model(directory: Path) -> torch.nn.Module:
    """transformers' class in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.to(torch.float32).eval()  # buffers of the file's type too
    for module in model.modules():
        if type(module).__name__ == "BitLinear":  # keeps the file's dtype of its own
            module.dtype = torch.float32
    return model


ONE_BY_ONE = {**{kind.__name__: kind for kind in INT8}, **FLOATS}
