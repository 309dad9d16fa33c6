"""What a GGUF file says of a decoder beside its weights: `gguf` and `gguf_rotary`, reversed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_rotary import LLAMA3
from nomatmul.formats.rotary import RopeScaling, frequencies

# llama.cpp's numbers of what most of a file's weights are (general.file_type); it has none for
# PQ2_0, and shows what it guesses without one.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32, "TQ2_0": 37}
_QUANTISATION_VERSION = 2


def architecture_metadata(
    config: ModelConfig, values: JsonObject, name: str, kind: str
) -> dict[str, Any]:
    """{key: value as `gguf_write` takes it} of a model.

    values: its published config.json; name: the model's; kind: the type of its linears. Raises
    FormatError for an option that llama.cpp's graph of the architecture has not.
    """
    family = values["model_type"]
    if values["hidden_act"] != "silu":
        raise FormatError(
            f"llama.cpp's graph of {family!r} has the activation 'silu', not"
            f" {values['hidden_act']!r} (--to unpacked can say it)"
        )
    counts = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "vocab_size": "vocab_size",
    }
    found: dict[str, Any] = {"general.architecture": family, "general.type": "model"}
    found["general.name"] = name
    if kind in _FILE_TYPES:
        found["general.file_type"] = np.uint32(_FILE_TYPES[kind])
    found["general.quantization_version"] = np.uint32(_QUANTISATION_VERSION)
    found |= {f"{family}.{key}": np.uint32(values[ours]) for key, ours in counts.items()}
    found[f"{family}.attention.layer_norm_rms_epsilon"] = np.float32(config.norm_eps)
    found[f"{family}.rope.freq_base"] = np.float32(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind != "llama3":
        scaling = _scaling(config.rope_scaling)
        found |= {f"{family}.rope.scaling.{key}": value for key, value in scaling.items()}
    return found


def rotary_divisors(config: ModelConfig) -> NDArray[np.float32] | None:
    """The table rope_freqs.weight [head size / 2] of the rotary scaling "llama3"; None without.

    Raises FormatError for numbers that are not Llama 3.1's own, which no reader could find again.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    found = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    if found != LLAMA3:
        raise FormatError(
            f"rope_scaling 'llama3' has low, high and original lengths {found}; a GGUF file has a"
            f" table instead, from which only Llama's own, {LLAMA3}, are found again"
        )
    plain = frequencies(config.head_size, config.rope_theta)[0]
    divisors = plain / frequencies(config.head_size, config.rope_theta, scaling)[0]
    return divisors.astype(np.float32)


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The keys behind "rope.scaling." of "linear" and "yarn"."""
    found: dict[str, Any] = {"type": scaling.kind, "factor": np.float32(scaling.factor)}
    if scaling.kind != "yarn":
        return found
    if scaling.mscale is not None or scaling.mscale_all_dim is not None:
        raise FormatError("rope_scaling 'yarn' has an mscale, which a GGUF file cannot say")
    assert scaling.original_max_position_embeddings is not None
    found["original_context_length"] = np.uint32(scaling.original_max_position_embeddings)
    for key, value in (("fast", scaling.beta_fast), ("slow", scaling.beta_slow)):
        if value is not None:
            found[f"yarn_beta_{key}"] = np.float32(value)
    if scaling.attention_factor is not None:  # llama.cpp multiplies its own factor by it
        own = 1.0 + 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 1.0
        found["attn_factor"] = np.float32(scaling.attention_factor / own)
    return found
