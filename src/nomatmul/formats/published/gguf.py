"""A GGUF file as a published model: its metadata as a config.json, its tensors under their names.

Keys and their meaning follow llama.cpp's converter and graphs, and bitnet.cpp's for BitNet. What
changes the mathematics and is not understood is refused by name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.files.gguf_parts import GgufParts, open_parts
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_keys import Keys
from nomatmul.formats.published.gguf_rotary import rope_scaling
from nomatmul.formats.published.gguf_tensors import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    GgufSource,
    has_inner_norms,
)
from nomatmul.formats.published.gguf_tokens import token_ids

# general.architecture -> (model_type, activation). BitNet-2B-4T's files name bitnet-25 or
# bitnet-b1.58, whose graph squares a ReLU; llama.cpp's own `bitnet` is an older model with SiLU.
ARCHITECTURES = {
    "llama": ("llama", "silu"),
    "qwen3": ("qwen3", "silu"),
    "bitnet": ("bitnet", "silu"),
    "bitnet-25": ("bitnet", "relu2"),
    "bitnet-b1.58": ("bitnet", "relu2"),
}
_ALWAYS_TIED = ("bitnet-25", "bitnet-b1.58")  # their graph takes token_embd, whatever else is there
_PERMUTED = ("llama",)  # rotary of neighbouring elements; the others' is Hugging Face's
# Such models are trained with int8 activations a token, and bitnet.cpp computes I2_S so.
_BIT_LINEAR = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
}
_I2_S = "I2_S"


def open_gguf(path: str | Path) -> tuple[JsonObject, GgufSource]:
    """Open a GGUF file, or all parts of a model by one of them: (what a config.json of Hugging Face
    would say, its tensors under HF names).

    Raises FormatError naming the key or tensor for a file that is damaged, of another architecture,
    has options that are not understood, or lacks tensors, has others, or of another shape.
    """
    return read_gguf(open_parts(path))


def read_gguf(file: GgufFile | GgufParts) -> tuple[JsonObject, GgufSource]:
    """`open_gguf` of an open file."""
    keys = Keys(file.metadata, file.path)
    kind = keys.get("general.type")
    if kind not in (None, "model"):
        raise FormatError(f"{keys.path} is of general.type {kind!r}, no model")
    name = keys.text("general.architecture")
    if name not in ARCHITECTURES:
        legal = ", ".join(ARCHITECTURES)
        raise FormatError(f"{file.path} has the architecture {name!r}; it must be one of {legal}")
    model_type, activation = ARCHITECTURES[name]
    values = _sizes(keys, name, _rows(file))
    values |= {
        "model_type": model_type,
        "hidden_act": activation,
        "attention_bias": False,
        "tie_word_embeddings": HEAD not in file.tensors or name in _ALWAYS_TIED,
        "rope_scaling": rope_scaling(keys, name, values, _divisors(file, values)),
        **token_ids(keys, values["vocab_size"]),
    }
    keys.refuse_others(name)
    inner = has_inner_norms(file)
    bitnet = model_type == "bitnet" or inner
    source = GgufSource(file, values, permuted=name in _PERMUTED, one_scale=bitnet)
    if _has_bit_linears(source, bitnet):
        values["quantization_config"] = dict(_BIT_LINEAR)
    if inner:
        norms = {"use_rms_norm": True, "rms_norm_eps": values["rms_norm_eps"]}
        values["quantization_config"] |= norms
    return values, source


def _rows(file: GgufFile | GgufParts) -> int:
    if EMBEDDING not in file.tensors:
        raise FormatError(f"{file.path} lacks the tensor {EMBEDDING!r}")
    return file.tensors[EMBEDDING].shape[0]


def _sizes(keys: Keys, name: str, rows: int) -> JsonObject:
    """The sizes of the model; rows: of the embedding."""
    heads = keys.count(f"{name}.attention.head_count")
    hidden = keys.count(f"{name}.embedding_length")
    if keys.get(f"{name}.attention.key_length") is None and hidden % heads:
        raise FormatError(f"{keys.path}: {heads} heads do not divide embedding_length {hidden}")
    head_dim = keys.count(f"{name}.attention.key_length", max(1, hidden // heads))
    if head_dim % 2:
        raise FormatError(f"{keys.path}: heads of {head_dim} elements cannot be rotated in pairs")
    for key in ("attention.value_length", "rope.dimension_count"):
        size = keys.count(f"{name}.{key}", head_dim)
        if size != head_dim:
            raise FormatError(
                f"{keys.path}: {name}.{key} is {size}; it must be the head size {head_dim}"
            )
    return {
        "vocab_size": keys.count(f"{name}.vocab_size", rows),
        "hidden_size": hidden,
        "intermediate_size": keys.count(f"{name}.feed_forward_length"),
        "num_hidden_layers": keys.count(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count(f"{name}.context_length"),
        "rms_norm_eps": keys.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number(f"{name}.rope.freq_base", 10000.0),
    }


def _divisors(file: GgufFile | GgufParts, values: JsonObject) -> NDArray[np.float32] | None:
    """The file's table of divisors of the rotary frequencies."""
    if ROPE_FACTORS not in file.tensors:
        return None
    shape, half = file.tensors[ROPE_FACTORS].shape, values["head_dim"] // 2
    if shape != (half,):
        raise FormatError(
            f"{file.path}: {ROPE_FACTORS!r} has shape {list(shape)}, the metadata ask for [{half}]"
        )
    return file.read(ROPE_FACTORS)


def _has_bit_linears(source: GgufSource, bitnet: bool) -> bool:
    """Whether the blocks' matrices take int8 activations a token: then all have to."""
    types = source.block_types()
    if not bitnet and _I2_S not in {layout.name for layout in types.values()}:
        return False
    for name, layout in types.items():
        if layout.kind != "ternary" or (layout.name != _I2_S and not bitnet):
            wanted = "a ternary type" if bitnet else f"{_I2_S} as others are"
            raise FormatError(f"{source.file.path}: {name!r} is {layout.name}; it must be {wanted}")
    return True
