"""Small random published decoders (llama, qwen3, bitnet), written in every form that they come in.

A model is a config, float tensors by their published names, and for each linear of its blocks
ternary values with scales. Writers need numpy only; `bits` says in which float type they write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.quantise import from_bfloat16, to_bfloat16

Arrays = dict[str, NDArray[Any]]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA = {**SIZES, "model_type": "llama", "hidden_act": "silu", "head_dim": 24}
LLAMA |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
BITNET = {**SIZES, "model_type": "bitnet", "hidden_act": "relu2", "tie_word_embeddings": True}
BITNET |= {"architectures": ["BitNetForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
QWEN3 = {**SIZES, "model_type": "qwen3", "hidden_act": "silu", "head_dim": 32}
QWEN3 |= {"architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def linear_shapes(values: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{published linear of a block: (outputs, inputs)}."""
    size, inner = values["hidden_size"], values["intermediate_size"]
    head = values.get("head_dim") or size // values["num_attention_heads"]
    queries, keys = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    rows = (queries, keys, keys, size, inner, inner, size)
    columns = (size, size, size, queries, size, size, inner)
    return dict(zip(LINEARS, zip(rows, columns, strict=True), strict=True))


@dataclass
class Published:
    """values: its config.json. floats: embedding, norms, head. ternary: {linear: (t, scale)},
    t int8 [N, K] and scale float32 of a shape that cuts [N, K] evenly."""

    values: dict[str, Any]
    floats: Arrays = field(default_factory=dict)
    ternary: dict[str, tuple[NDArray[np.int8], NDArray[np.float32]]] = field(default_factory=dict)

    def weights(self) -> Arrays:
        """float32 values of the linears, by their names with ".weight"."""
        return {f"{name}.weight": spread(t, scale) for name, (t, scale) in self.ternary.items()}


def spread(t: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """t * scale, float32; each scale stands for an even block of the matrix."""
    block = t.shape[0] // scale.shape[0], t.shape[1] // scale.shape[1]
    return t * np.kron(scale, np.ones(block, np.float32))


def random_model(
    values: dict[str, Any],
    rng: np.random.Generator,
    *,
    group: int = 0,
    inner_norm: str = "",
    ternary_head: bool = False,
) -> Published:
    """group: inputs of a row that share a scale; 0: all of a tensor. inner_norm: the name of a norm
    inside each linear. Floats are exact in bfloat16, scales of groups in float16."""
    model = Published(dict(values))
    size, vocabulary = values["hidden_size"], values["vocab_size"]
    model.floats["model.embed_tokens.weight"] = _normal(rng, 0.7, vocabulary, size)
    model.floats["model.norm.weight"] = _norm(rng, size)
    if not values["tie_word_embeddings"]:
        model.floats["lm_head.weight"] = _normal(rng, 0.1, vocabulary, size)
    for layer in range(values["num_hidden_layers"]):
        _add_block(model, rng, f"model.layers.{layer}.", group, inner_norm)
    if ternary_head:
        for name in ("model.embed_tokens", "lm_head"):
            if model.floats.pop(f"{name}.weight", None) is not None:
                model.ternary[name] = _ternary(rng, (vocabulary, size), group)
    return model


def _add_block(
    model: Published, rng: np.random.Generator, at: str, group: int, inner_norm: str
) -> None:
    values = model.values
    shapes = linear_shapes(values)
    for name, shape in shapes.items():
        model.ternary[at + name] = _ternary(rng, shape, group)
        if inner_norm:
            model.floats[f"{at}{name}.{inner_norm}.weight"] = _norm(rng, shape[1])
    for name in ("input_layernorm", "post_attention_layernorm"):
        model.floats[f"{at}{name}.weight"] = _norm(rng, values["hidden_size"])
    if values["model_type"] == "bitnet":
        queries = shapes["self_attn.o_proj"][1]
        model.floats[f"{at}self_attn.attn_sub_norm.weight"] = _norm(rng, queries)
        model.floats[f"{at}mlp.ffn_sub_norm.weight"] = _norm(rng, values["intermediate_size"])
    if values["model_type"] == "qwen3":
        for name in ("q_norm", "k_norm"):
            model.floats[f"{at}self_attn.{name}.weight"] = _norm(rng, values["head_dim"])


def _normal(rng: np.random.Generator, deviation: float, *shape: int) -> NDArray[np.float32]:
    return bfloat16(deviation * rng.standard_normal(shape))


def _norm(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    return bfloat16(1 + 0.2 * rng.standard_normal(size))


def bfloat16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values rounded to bfloat16, as float32."""
    return from_bfloat16(to_bfloat16(np.asarray(values, np.float32)))


def _ternary(
    rng: np.random.Generator, shape: tuple[int, int], group: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    t = rng.integers(-1, 2, shape).astype(np.int8)
    t[:, ::16] = 1  # no group is all zeros
    scale = (0.8 + 0.4 * rng.random((shape[0], shape[1] // group) if group else (1, 1))) / 8
    rounded = scale.astype(np.float16).astype(np.float32) if group else bfloat16(scale)
    return t, rounded


def write(directory: Path, values: dict[str, Any], tensors: Arrays) -> Path:
    """A checkpoint of these tensors as they are; returns the directory."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, values)
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def write_config(directory: Path, values: dict[str, Any]) -> None:
    """Its config.json, in place of another."""
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")


def write_values(directory: Path, model: Published, dtype: Any = np.float32) -> Path:
    """Weights as floats whose values are ternary."""
    tensors = {**model.floats, **model.weights()}
    return write(directory, model.values, {n: t.astype(dtype) for n, t in tensors.items()})


def quantised(model: Published, **options: Any) -> dict[str, Any]:
    """The config of a model whose linears are BitLinears."""
    return {**model.values, "quantization_config": {"quant_method": "bitnet", **options}}


def auto(mode: str, **options: Any) -> dict[str, Any]:
    """Options of `autobitlinear`."""
    return {"linear_class": "autobitlinear", "quantization_mode": mode, **options}


def write_packed(directory: Path, model: Published, *, legacy: bool, **options: Any) -> Path:
    """Four rows a byte; legacy: the stored scale divides."""
    tensors = dict(model.floats)
    for name, (t, scale) in model.ternary.items():
        tensors[f"{name}.weight"] = packed_rows(t)
        stored = np.float32(1.0) / scale[0] if legacy else scale[0]
        tensors[f"{name}.weight_scale"] = stored.astype(np.float32)
    options = options if legacy else {**auto("offline"), **options}
    return write(directory, quantised(model, **options), tensors)


def write_unpacked(directory: Path, model: Published, dtype: Any = np.float32) -> Path:
    """Values -1, 0 and 1 as they are, beside their scale."""
    tensors = dict(model.floats)
    for name, (t, scale) in model.ternary.items():
        tensors[f"{name}.weight"] = t.astype(dtype)
        tensors[f"{name}.weight_scale"] = scale[0].astype(np.float32)
    return write(directory, quantised(model, **auto("offline")), tensors)


def write_masters(directory: Path, model: Published, rng: np.random.Generator) -> Path:
    """Weights that nothing has ternarised yet, whose mean magnitude is their scale."""
    tensors = dict(model.floats)
    for name, (t, _) in model.ternary.items():
        tensors[f"{name}.weight"] = bfloat16(rng.standard_normal(t.shape) / 8)
    return write(directory, quantised(model, **auto("online")), tensors)


def packed_rows(t: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Bits 2i of packed row r are output row r + i * N / 4, as t + 1."""
    quarter, codes = len(t) // 4, (t + 1).astype(np.uint8)
    parts = [codes[i * quarter : (i + 1) * quarter] << (2 * i) for i in range(4)]
    return np.bitwise_or.reduce(parts)


OURS = {
    "self_attn.q_proj": "mixer.q_proj",
    "self_attn.k_proj": "mixer.k_proj",
    "self_attn.v_proj": "mixer.v_proj",
    "self_attn.o_proj": "mixer.o_proj",
    "mlp.down_proj": "channel.down_proj",
}


def assert_holds(
    directory: Path, model: Published, matrices: dict[str, NDArray[np.float32]] | None = None
) -> Checkpoint:
    """Every matrix is read as whole numbers with scales, every other tensor as it was written."""
    checkpoint = open_checkpoint(directory)
    weights = model.weights() if matrices is None else matrices
    for layer in range(model.values["num_hidden_layers"]):
        at, ours = f"model.layers.{layer}.", f"layers.{layer}."
        found = {ours + name: weights[f"{at}{key}.weight"] for key, name in OURS.items()}
        gate, up = (weights[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        if checkpoint.config.split_gate and checkpoint.config.linear_norm == "all":
            found |= {f"{ours}channel.gate_proj": gate, f"{ours}channel.up_proj": up}
        else:
            found[f"{ours}channel.gate_proj"] = np.concatenate([gate, up])
        for name, expected in found.items():
            held = checkpoint.quantised(f"{name}.weight")
            assert held.kind == "ternary"
            assert held.group == checkpoint.config.scale_group
            assert set(np.unique(held.read(slice(3, 40)))) <= {-1, 0, 1}
            np.testing.assert_array_equal(held.floats(), expected, err_msg=name)
            part = checkpoint.read(f"{name}.weight", slice(7, 41))
            np.testing.assert_array_equal(part, expected[7:41], err_msg=name)
    np.testing.assert_array_equal(
        checkpoint.read("final_norm.weight"), model.floats["model.norm.weight"]
    )
    return checkpoint
