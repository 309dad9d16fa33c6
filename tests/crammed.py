"""Small published crammedBERT directories, and what the authors' code computes from them.

`forward` is written from the published tensors alone, in float64: nothing of ours is in it.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]

ARCH: dict[str, Any] = {
    "architectures": ["ScriptableCrammedBERT"],
    "num_transformer_layers": 2,
    "hidden_size": 16,
    "intermed_type": "fff",
    "intermed_size": 3,
    "intermed_depth": 2,
    "hidden_dropout_prob": 0.1,
    "norm": "LayerNorm",
    "norm_eps": 1e-12,
    "norm_scheme": "pre",
    "nonlin": "GELU",
    "tie_weights": True,
    "decoder_bias": False,
    "sparse_prediction": 0.25,
    "loss": "cross-entropy",
    "objective_layout": "MLM",
    "embedding": {
        "vocab_size": 48,
        "pos_embedding": "scaled-sinusoidal",
        "dropout_prob": 0.1,
        "pad_token_id": 0,
        "max_seq_length": 24,
        "embedding_dim": 16,
        "normalization": True,
        "stable_low_precision": False,
    },
    "attention": {
        "type": "self-attention",
        "causal_attention": False,
        "num_attention_heads": 2,
        "dropout_prob": 0.1,
        "skip_output_projection": False,
        "qkv_bias": False,
        "rotary_embedding": False,
        "seq_op_in_fp32": False,
        "sequence_op": "torch-softmax",
    },
    "init": {"type": "normal", "std": 0.02},
    "ffn_layer_frequency": 1,
    "skip_head_transform": True,
    "use_bias": False,
    "final_norm": True,
    "num_labels": None,
    "classification_head": {
        "pooler": "avg",
        "include_ff_layer": True,
        "head_dim": 12,
        "nonlin": "Tanh",
        "classifier_dropout": 0.1,
    },
}

# Every feed-forward layer of that code base that we read.
VARIANTS: dict[str, dict[str, Any]] = {
    "trees": {},
    "one tree": {"intermed_size": 1, "intermed_depth": 3},
    "one level": {"intermed_size": 4, "intermed_depth": 0, "nonlin": "ReLU"},
    "dense": {"intermed_type": "ff", "intermed_size": 20, "intermed_depth": None},
    "dense silu": {"intermed_type": "ff", "intermed_size": 20, "nonlin": "SiLU"},
    "glu": {"intermed_type": "ff", "intermed_size": 20, "nonlin": "SiLUglu"},
    "gelu glu": {"intermed_type": "ff", "intermed_size": 20, "nonlin": "GELUglu"},
    "no positions": {"embedding.pos_embedding": None, "embedding.normalization": False},
}


def config(changes: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A published config.json; changes are options of "arch", a dot for each level below it."""
    arch = copy.deepcopy(ARCH)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        inner = arch
        for name in path:
            inner = inner[name]
        inner[last] = value
    base = {"architectures": ["ScriptableLMForPreTraining"], "model_type": "crammedBERT"}
    return {**base, "arch": arch, "transformers_version": "4.46.3", **top}


def tensors(values: dict[str, Any], seed: int = 0) -> Tensors:
    """Random weights for a config, float32, large enough that every part is seen in the logits."""
    rng, arch = np.random.default_rng(seed), values["arch"]
    size, inner = arch["hidden_size"], arch["intermed_size"]
    found: Tensors = {}

    def matrix(name: str, *shape: int) -> None:
        found[name] = rng.normal(0, 0.4, shape).astype(np.float32)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = (1 + rng.normal(0, 0.2, size)).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.1, size).astype(np.float32)

    matrix("encoder.embedding.word_embedding.weight", arch["embedding"]["vocab_size"], size)
    if arch["embedding"]["pos_embedding"] is not None:
        found["encoder.embedding.pos_embedding.scale_factor"] = np.array([0.7], np.float32)
    if arch["embedding"]["normalization"]:
        norm("encoder.embedding.norm")
    for layer in range(arch["num_transformer_layers"]):
        start = f"encoder.layers.{layer}."
        norm(f"{start}norm1")
        norm(f"{start}norm2")
        scale = (size // arch["attention"]["num_attention_heads"]) ** -0.5
        found[f"{start}attn.self_attention.norm_factor"] = np.array(scale, np.float32)
        matrix(f"{start}attn.self_attention.query_key_value.weight", 3 * size, size)
        matrix(f"{start}attn.dense.weight", size, size)
        if arch.get("intermed_type", "ff") == "fff":
            rows = inner * (2 ** (arch["intermed_depth"] + 1) - 1)
            matrix(f"{start}ffn.linear_in.weight", rows, size)
            matrix(f"{start}ffn.linear_in.bias", rows)
            matrix(f"{start}ffn.linear_out.weight", size, rows)
        else:
            out = inner // 2 if arch["nonlin"].endswith("glu") else inner
            matrix(f"{start}ffn.dense_in.weight", inner, size)
            matrix(f"{start}ffn.dense_out.weight", size, out)
    norm("encoder.final_norm")
    return found


def add_classifier(values: dict[str, Any], found: Tensors, labels: int) -> None:
    """Make it a sequence classification checkpoint, in place."""
    rng, size = np.random.default_rng(5), values["arch"]["hidden_size"]
    wide = values["arch"]["classification_head"]["head_dim"]
    values["architectures"] = ["ScriptableLMForSequenceClassification"]
    values["arch"]["num_labels"] = labels
    for name, shape in (
        ("pooler.dense.weight", (wide, size)),
        ("pooler.dense.bias", (wide,)),
        ("head.weight", (labels, wide)),
        ("head.bias", (labels,)),
    ):
        found[name] = rng.normal(0, 0.4, shape).astype(np.float32)


def write(directory: Path, values: dict[str, Any], found: Tensors, pickled: bool = False) -> Path:
    """Write a published directory: safetensors, or torch's pytorch_model.bin."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values), "utf-8")
    if pickled:
        import torch

        state = {name: torch.from_numpy(value.copy()) for name, value in found.items()}
        torch.save(state, directory / "pytorch_model.bin")
    else:
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make(directory: Path, changes: dict[str, Any] | None = None) -> Path:
    """A published directory with random weights."""
    values = config(changes)
    return write(directory, values, tensors(values))


# -- the authors' forward pass --------------------------------------------------------------------


def _norm(x: NDArray[Any], found: Tensors, name: str) -> NDArray[Any]:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
    return x * found[f"{name}.weight"] + found[f"{name}.bias"]


def _act(x: NDArray[Any], name: str) -> NDArray[Any]:
    if name == "ReLU":
        return np.maximum(x, 0)
    if name == "SiLU":
        return x / (1 + np.exp(-x))
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _trees(x: NDArray[Any], found: Tensors, start: str, arch: dict[str, Any]) -> NDArray[Any]:
    """All nodes are computed, then those that a token does not visit are taken out."""
    logits = x @ found[f"{start}linear_in.weight"].T + found[f"{start}linear_in.bias"]
    nodes = 2 ** (arch["intermed_depth"] + 1) - 1
    visited = np.zeros(logits.shape, bool)
    for token in np.ndindex(logits.shape[:-1]):
        for tree in range(arch["intermed_size"]):
            node = 0
            visited[(*token, tree * nodes)] = True
            for _ in range(arch["intermed_depth"]):
                node = 2 * node + (2 if logits[(*token, tree * nodes + node)] > 0 else 1)
                visited[(*token, tree * nodes + node)] = True
    hidden = np.where(visited, _act(logits, arch["nonlin"]), 0)
    return hidden @ found[f"{start}linear_out.weight"].T


def _feed_forward(x: NDArray[Any], found: Tensors, start: str, arch: dict[str, Any]) -> Any:
    if arch.get("intermed_type", "ff") == "fff":
        return _trees(x, found, start, arch)
    y = x @ found[f"{start}dense_in.weight"].T
    if arch["nonlin"].endswith("glu"):
        half = y.shape[-1] // 2
        y = _act(y[..., half:], arch["nonlin"][:-3]) * y[..., :half]
    else:
        y = _act(y, arch["nonlin"])
    return y @ found[f"{start}dense_out.weight"].T


def hidden(
    values: dict[str, Any], stored: Tensors, ids: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[Any]:
    """The encoder's output [B, T, D], float64."""
    found = {name: value.astype(np.float64) for name, value in stored.items()}
    arch, (batch, steps) = values["arch"], ids.shape
    size, heads = arch["hidden_size"], arch["attention"]["num_attention_heads"]
    x = found["encoder.embedding.word_embedding.weight"][ids]
    if arch["embedding"]["pos_embedding"] is not None:
        step = np.exp(np.arange(0, size, 2) * (-math.log(10000.0) / size))
        angle = np.arange(steps)[:, None] * step
        table = np.zeros((steps, size))
        table[:, 0::2], table[:, 1::2] = np.sin(angle), np.cos(angle)
        x = x + found["encoder.embedding.pos_embedding.scale_factor"] * table
    if arch["embedding"]["normalization"]:
        x = _norm(x, found, "encoder.embedding.norm")
    for layer in range(arch["num_transformer_layers"]):
        start = f"encoder.layers.{layer}."
        y = _norm(x, found, f"{start}norm1")
        y = y @ found[f"{start}attn.self_attention.query_key_value.weight"].T
        y = y.reshape(batch, steps, heads, 3, size // heads)
        q, k, v = (y[:, :, :, part].transpose(0, 2, 1, 3) for part in range(3))
        scores = q @ k.transpose(0, 1, 3, 2) * found[f"{start}attn.self_attention.norm_factor"]
        if mask is not None:
            scores = scores + (1.0 - mask[:, None, None, :]) * -10000.0
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v
        y = y.transpose(0, 2, 1, 3).reshape(batch, steps, size)
        x = x + y @ found[f"{start}attn.dense.weight"].T
        x = x + _feed_forward(_norm(x, found, f"{start}norm2"), found, f"{start}ffn.", arch)
    return _norm(x, found, "encoder.final_norm")


def logits(
    values: dict[str, Any], stored: Tensors, ids: NDArray[Any], mask: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The masked language model's logits [B, T, V], float64."""
    table = stored["encoder.embedding.word_embedding.weight"].astype(np.float64)
    return hidden(values, stored, ids, mask) @ table.T
