"""Small models as GGUF files, written by the `gguf` package in the converter's order of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import finish
from numpy.typing import NDArray

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 40, 256, 512, 2, 4, 2, 64
BLOCK = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_SIZE, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_SIZE, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_SIZE, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_SIZE)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
}
EXTRA = {
    "qwen3": {
        "attn_q_norm": ("self_attn.q_norm", (HEAD_SIZE,)),
        "attn_k_norm": ("self_attn.k_norm", (HEAD_SIZE,)),
    },
    "bitnet": {
        "attn_sub_norm": ("self_attn.attn_sub_norm", (HEADS * HEAD_SIZE,)),
        "ffn_sub_norm": ("mlp.ffn_sub_norm", (INNER,)),
    },
}


def named(architecture: str, tied: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{stored name: (Hugging Face's, shape)}."""
    found = {
        "token_embd": ("model.embed_tokens", (VOCAB, HIDDEN)),
        "output_norm": ("model.norm", (HIDDEN,)),
    }
    if not tied:
        found["output"] = ("lm_head", (VOCAB, HIDDEN))
    more = EXTRA.get(architecture.split("-")[0], {})
    for layer in range(LAYERS):
        for part, (name, shape) in {**BLOCK, **more}.items():
            found[f"blk.{layer}.{part}"] = (f"model.layers.{layer}.{name}", shape)
    return found


def permute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows as llama.cpp's converter orders those of q and k."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def ternary(rng: np.random.Generator, shape: tuple[int, int], group: int) -> NDArray[np.float32]:
    """Values -s, 0, s with an s that float16 has for each group of a row; 0: for all."""
    t = rng.integers(-1, 2, shape).astype(np.float32)
    count = (shape[0], shape[1] // group) if group else (1, 1)
    scale = (0.5 + rng.random(count)).astype(np.float16).astype(np.float32)
    if group:
        t.reshape(shape[0], -1, group)[:, :, 0] = 1  # no group of zeros
    return t * np.repeat(scale, group or 1, axis=1)


def put(writer: gguf.GGUFWriter, name: str, value: NDArray[np.float32], kind: str) -> None:
    """Add a matrix as ggml's type `kind`, which holds it exactly."""
    number = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(value, number)
    np.testing.assert_array_equal(gguf.quants.dequantize(stored, number), value)
    writer.add_tensor(name, stored, raw_dtype=number)


def sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HEAD_SIZE)


def write_gguf(
    path: Path,
    architecture: str,
    rng: np.random.Generator,
    *,
    kind: str = "F32",
    outer: str = "F32",
    group: int = 256,
    tied: bool = False,
    keys: Callable[[gguf.GGUFWriter], None] = sizes,
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
    part_tensors: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """Write a model, its matrices in blocks of type `kind`, embedding and head of type `outer`;
    {Hugging Face's name: values}.

    change: gets {stored name: values} before they are written. part_tensors: so many go into each
    part of the model, 0: into one file.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    keys(writer)
    values, tensors = {}, {}
    for stored, (name, shape) in named(architecture, tied).items():
        block = len(shape) == 2 and stored.startswith("blk.")
        value = ternary(rng, shape, group) if block else rng.random(shape).astype(np.float32)
        if kind == "Q8_0" and block:
            value *= np.float32(127)  # the scale is the largest value divided by 127
        if len(shape) == 2 and not block and outer != "F32":
            number = gguf.GGMLQuantizationType[outer]
            value = gguf.quants.dequantize(gguf.quants.quantize(value - 0.5, number), number)
        values[f"{name}.weight"] = value
        if architecture == "llama" and stored.endswith(("attn_q", "attn_k")):
            value = permute(value, HEADS if stored.endswith("attn_q") else KV_HEADS)
        tensors[f"{stored}.weight"] = value
    change(tensors)
    for stored, value in tensors.items():
        block = stored.startswith("blk.")
        if value.ndim == 2 and (block or outer != "F32"):
            put(writer, stored, value, kind if block else outer)
        else:
            writer.add_tensor(stored, value)
    finish(writer)
    return values
