"""Write a GGUF with random ternary weights, the shape of a nomatmul model.

A MatMul-free shape becomes an architecture of llama with the same matrices: four [D, D] in the
token mixer (q, k, v, o against i, f, g, o), a gated feed-forward, a [V, D] head. A transformer's
shape keeps its heads: `qwen3` where queries and keys have norms, else `llama`. Linears are TQ2_0 or
TQ1_0, or of a dense form; the head is of that form or another, the embedding 16 bits, another form
or, if tied, the head itself.
Weights are random, so text means nothing, but the bytes read and the arithmetic done are those of a
trained model.

A library of vs_llama.py, serve_load.py and pareto.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCK = 256  # elements a TQ block
TQ2_CODES = 64  # bytes of 2-bit codes in a TQ2_0 block, then a float16 scale
TQ1_CODES = 52  # 48 bytes of 5 trits and 4 bytes of 4 trits in a TQ1_0 block, then the scale
SMALL = {"Q4_0": 16, "Q8_0": 32}  # bytes of codes in a block of 32, behind a float16 scale
FLOATS = ("F16", "BF16")


def write_gguf(
    path: Path,
    *,
    form: str,
    shape: dict[str, Any],
    head: str | None = None,
    table: str = "F16",
    context: int = 2048,
    tokens: list[str] | None = None,
) -> dict[str, int]:
    """Write the file; returns {"read": bytes of tensors that decoding one token reads, "head":
    those of the head}.

    form: "TQ2_0", "TQ1_0", "Q4_0", "Q8_0", "F16" or "BF16". shape: fields of a ModelConfig. head:
    the form of the head; None: as the linears. table: of an embedding that is not tied. tokens: a
    byte-level vocabulary whose words are taken whole, which a server needs; None: no vocabulary.
    Raises ValueError when a row is not a multiple of a block's elements.
    """
    hidden, inner, vocab = (shape[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    block = 1 if form in FLOATS else 32 if form in SMALL else BLOCK
    for width in (hidden, inner):
        if width % block:
            raise ValueError(f"{form} needs rows of a multiple of {block} elements, not {width}")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3" if shape.get("qk_norm") else "llama")
    heads = _add_settings(writer, shape, context)
    _add_vocabulary(writer, tokens)
    ones = np.ones(hidden, dtype=np.float32)
    head_type = gguf.GGMLQuantizationType[head or form]
    head_codes = _random_blocks(rng, head or form, vocab, hidden)
    if shape.get("tie_embeddings"):
        writer.add_tensor("token_embd.weight", head_codes, raw_dtype=head_type)
    else:
        codes = _random_blocks(rng, table, vocab, hidden)
        kind = gguf.GGMLQuantizationType[table]
        writer.add_tensor("token_embd.weight", codes, raw_dtype=kind)
        writer.add_tensor("output.weight", head_codes, raw_dtype=head_type)
    writer.add_tensor("output_norm.weight", ones)
    read = head_codes.nbytes + _add_layers(writer, rng, shape, form, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"read": read, "head": head_codes.nbytes}


def _add_layers(
    writer: gguf.GGUFWriter,
    rng: np.random.Generator,
    shape: dict[str, Any],
    form: str,
    heads: dict[str, int],
) -> int:
    """All layers; returns the bytes of their matrices."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    ones = np.ones(hidden, dtype=np.float32)
    query, key = heads["heads"] * heads["size"], heads["kv"] * heads["size"]
    shapes = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    read = 0
    # One set of random codes serves every layer: in the file and in memory each layer has its own.
    blocks = {name: _random_blocks(rng, form, *shape) for name, shape in shapes.items()}
    for layer in range(shape["num_layers"]):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        if shape.get("qk_norm"):
            for name in ("attn_q_norm", "attn_k_norm"):
                norm = np.ones(heads["size"], dtype=np.float32)
                writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
        for name, array in blocks.items():
            kind = gguf.GGMLQuantizationType[form]
            writer.add_tensor(f"blk.{layer}.{name}.weight", array, raw_dtype=kind)
            read += array.nbytes
    return read


def _add_settings(writer: gguf.GGUFWriter, shape: dict[str, Any], context: int) -> dict[str, int]:
    """What the file says of the model; returns its heads, key-value heads and their size."""
    hidden = shape["hidden_size"]
    size = shape.get("head_dim") or (128 if hidden % 128 == 0 and hidden >= 2048 else 64)
    heads = shape.get("num_heads") or hidden // size
    kv = shape.get("num_kv_heads") or heads
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(shape.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(1e-6)
    return {"heads": heads, "kv": kv, "size": size}


def _add_vocabulary(writer: gguf.GGUFWriter, tokens: list[str] | None) -> None:
    if tokens is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])  # never used; the reader wants one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _random_blocks(rng: np.random.Generator, form: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes]: random legal blocks with the scale that keeps activations near one."""
    if form in FLOATS:
        values = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
        if form == "F16":
            return values.astype(np.float16).view(np.uint8)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    scale = np.float16(np.sqrt(1.5 / columns))  # random ternary values have variance 2/3
    if form in SMALL:
        blocks = rows * columns // 32
        codes = rng.integers(0, 256, size=(blocks, SMALL[form]), dtype=np.uint8)
        deviation = 4.6 if form == "Q4_0" else 74.0
        scale = np.float16(1 / deviation / np.sqrt(columns))
        ends: tuple[int | None, ...] = (0, 2, 2, None)
    else:
        codes = _random_ternary(rng, form, rows * columns // BLOCK)
        ends = (-2, None, 0, -2)
    out = np.empty((len(codes), codes.shape[1] + 2), dtype=np.uint8)
    out[:, ends[0] : ends[1]] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    out[:, ends[2] : ends[3]] = codes
    return out.reshape(rows, -1)


def _random_ternary(rng: np.random.Generator, form: str, blocks: int) -> np.ndarray:
    if form == "TQ2_0":
        codes = rng.integers(0, 3, size=(blocks, TQ2_CODES, 4), dtype=np.uint8)
        packed: np.ndarray = (
            codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
        )
        return packed
    # Five trits in a byte as ceil(v * 256 / 243); the last 4 bytes of a block hold four trits.
    value = rng.integers(0, 243, size=(blocks, TQ1_CODES), dtype=np.uint16)
    value[:, 48:] = value[:, 48:] // 3 * 3
    return ((value * 256 + 242) // 243).astype(np.uint8)
