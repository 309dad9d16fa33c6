"""Record what llama.cpp computes from small models: python record.py (llama-cpp-python, gguf).

Writes NAME.gguf, dense float32 models in the order of rows of llama.cpp's converter, and
logits.safetensors: ids [T], and NAME's logits [T, V].
"""

from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD, THETA = 40, 32, 48, 2, 4, 2, 16, 500000.0
POSITIONS = 60
F32 = 0  # ggml's number: of keys and values
MODELS = {
    "llama": ("llama", "none"),
    "llama-llama3": ("llama", "llama3"),
    "llama-linear": ("llama", "linear"),
    "qwen3-yarn": ("qwen3", "yarn"),
}


def llama3_divisors() -> np.ndarray:
    """llama.cpp's converter, of Llama 3.1: factor 8, low 1, high 4, original length 8192."""
    wave = 2 * np.pi * THETA ** (np.arange(0, HEAD, 2) / HEAD)
    smooth = np.clip((8192 / wave - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def write(path: Path, architecture: str, scaling: str, rng: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    if scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(32)
    if scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors())

    def matrix(name: str, rows: int, columns: int, heads: int = 0) -> None:
        value = (rng.standard_normal((rows, columns)) / columns**0.5 * 1.5).astype(np.float32)
        if heads and architecture == "llama":
            halves = value.reshape(heads, 2, rows // heads // 2, columns)
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
        writer.add_tensor(f"{name}.weight", value)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, size).astype(np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    matrix("output", VOCAB, HIDDEN)
    norm("output_norm", HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        matrix(f"{block}attn_q", HEADS * HEAD, HIDDEN, HEADS)
        matrix(f"{block}attn_k", KV_HEADS * HEAD, HIDDEN, KV_HEADS)
        matrix(f"{block}attn_v", KV_HEADS * HEAD, HIDDEN)
        matrix(f"{block}attn_output", HIDDEN, HEADS * HEAD)
        matrix(f"{block}ffn_gate", INNER, HIDDEN)
        matrix(f"{block}ffn_up", INNER, HIDDEN)
        matrix(f"{block}ffn_down", HIDDEN, INNER)
        for name in ("attn_norm", "ffn_norm"):
            norm(block + name, HIDDEN)
        for name in ("attn_q_norm", "attn_k_norm") if architecture == "qwen3" else ():
            norm(block + name, HEAD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    rng = np.random.default_rng(12)
    ids = rng.integers(0, VOCAB, POSITIONS)
    found = {"ids": ids}
    for name, (architecture, scaling) in MODELS.items():
        path = HERE / f"{name}.gguf"
        write(path, architecture, scaling, rng)
        options = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1}
        model = Llama(str(path), type_k=F32, type_v=F32, **options)
        model.eval(ids.tolist())
        found[name] = np.array(model.scores[:POSITIONS, :VOCAB], np.float32)
    save_file(found, HERE / "logits.safetensors")


if __name__ == "__main__":
    main()
