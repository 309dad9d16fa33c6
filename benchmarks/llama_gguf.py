"""Write a llama-architecture GGUF with random ternary weights, the shape of a nomatmul model.

Same matrices as ours: four [D, D] in the token mixer (q, k, v, o against i, f, g, o), a gated
feed-forward of width `intermediate`, a [V, D] head, all ternary (TQ2_0 or TQ1_0), and a 16-bit
embedding of which a token reads one row. Weights are random, so text means nothing, but the bytes
read and the arithmetic done are those of a trained model.

A library of vs_llama.py.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

BLOCK = 256  # elements a TQ block
TQ2_CODES = 64  # bytes of 2-bit codes in a TQ2_0 block, then a float16 scale
TQ1_CODES = 52  # 48 bytes of 5 trits and 4 bytes of 4 trits in a TQ1_0 block, then the scale


def write_gguf(
    path: Path,
    *,
    form: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    context: int = 2048,
) -> int:
    """Write the file; returns the bytes of ternary tensors that decoding one token reads.

    form: "TQ2_0" or "TQ1_0". Raises ValueError when a row is not a multiple of 256 elements.
    """
    for width in (hidden_size, intermediate_size):
        if width % BLOCK:
            raise ValueError(f"{form} needs rows of a multiple of {BLOCK} elements, not {width}")
    kind = gguf.GGMLQuantizationType[form]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer, vocab_size, hidden_size, num_layers, intermediate_size, context)
    ones = np.ones(hidden_size, dtype=np.float32)
    embedding = (rng.standard_normal((vocab_size, hidden_size)) * 0.02).astype(np.float16)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", ones)
    shapes = {
        "attn_q": (hidden_size, hidden_size),
        "attn_k": (hidden_size, hidden_size),
        "attn_v": (hidden_size, hidden_size),
        "attn_output": (hidden_size, hidden_size),
        "ffn_gate": (intermediate_size, hidden_size),
        "ffn_up": (intermediate_size, hidden_size),
        "ffn_down": (hidden_size, intermediate_size),
    }
    head = _random_ternary(rng, form, vocab_size, hidden_size)
    writer.add_tensor("output.weight", head, raw_dtype=kind)
    read = head.nbytes
    # One set of random codes serves every layer: in the file and in memory each layer has its own.
    codes = {name: _random_ternary(rng, form, *shape) for name, shape in shapes.items()}
    for layer in range(num_layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, array in codes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", array, raw_dtype=kind)
            read += array.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _add_settings(
    writer: gguf.GGUFWriter, vocab: int, hidden: int, layers: int, intermediate: int, context: int
) -> None:
    head_dim = 128 if hidden % 128 == 0 and hidden >= 2048 else 64
    writer.add_vocab_size(vocab)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(hidden // head_dim)
    writer.add_head_count_kv(hidden // head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("none")


def _random_ternary(rng: np.random.Generator, form: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes]: random legal blocks with the scale that keeps activations near one."""
    blocks = rows * columns // BLOCK
    scale = np.float16(np.sqrt(1.5 / columns))  # random ternary values have variance 2/3
    if form == "TQ2_0":
        codes = rng.integers(0, 3, size=(blocks, TQ2_CODES, 4), dtype=np.uint8)
        packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    else:
        # Five trits in a byte as ceil(v * 256 / 243); the last 4 bytes of a block hold four trits.
        value = rng.integers(0, 243, size=(blocks, TQ1_CODES), dtype=np.uint16)
        value[:, 48:] = value[:, 48:] // 3 * 3
        packed = ((value * 256 + 242) // 243).astype(np.uint8)
    out = np.empty((blocks, packed.shape[1] + 2), dtype=np.uint8)
    out[:, :-2] = packed
    out[:, -2:] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return out.reshape(rows, -1)
