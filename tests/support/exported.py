"""Small models to export, and what a model holds whatever its form, to compare exports by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from model_files import write_training
from tokenizers import Tokenizer, models, pre_tokenizers

from nomatmul.convert import pack
from nomatmul.convert.exportable import ExportSource
from nomatmul.formats.config import ModelConfig

Tensors = dict[str, Any]

SIZES = {
    "vocab_size": 258, "hidden_size": 256, "num_layers": 2, "intermediate_size": 512,
    "num_heads": 4, "num_kv_heads": 2, "token_mixer": "attention", "linear": "ternary",
    "linear_norm": "none", "rounding": "even", "head_linear": "dense",
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
TENSOR = ModelConfig(**SIZES, split_gate=True)
ONE_GATE = ModelConfig(**SIZES, tie_embeddings=True)
GROUPS = {
    group: ModelConfig(**SIZES, scale_group=group, qk_norm=group == 128, rope_theta=500000.0)
    for group in (256, 128, 64, 32)
}
ALL_TERNARY = dataclasses.replace(
    GROUPS[256], head_linear="ternary", embedding_linear="ternary", tie_embeddings=True
)
TERNARY_HEAD = dataclasses.replace(ONE_GATE, head_linear="ternary")
EVERY = {"tensor": TENSOR, "one gate": ONE_GATE, "all": ALL_TERNARY, "head": TERNARY_HEAD}
EVERY |= {f"group {group}": GROUPS[group] for group in (256, 128, 64)}


def tokenizer_file(directory: Path) -> None:
    """A tokenizer.json of single bytes and two special tokens: 258 entries."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|pad|>", *letters]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(names[:2])
    tokenizer.save(str(directory / "tokenizer.json"))


def trained(directory: Path, config: ModelConfig, rng: np.random.Generator) -> Path:
    """A checkpoint of random latent weights."""
    write_training(directory, config, rng)
    tokenizer_file(directory)
    return directory


def packed(directory: Path, config: ModelConfig, rng: np.random.Generator, **options: Any) -> Path:
    """The same, packed."""
    pack(trained(directory.with_name("latent"), config, rng), directory, check=False, **options)
    return directory


def computed(path: Path) -> Tensors:
    """{our tensor: (values, scale rounded to float16) or floats} of a model that is exported."""
    source, found = ExportSource(path), {}
    for tensor in source.tensors.values():
        if source.kind(tensor) == "ternary":
            held = source.quantised(tensor)
            scale = held.rows_scale(slice(None)).astype(np.float16).astype(np.float32)
            found[tensor.name] = held.read(slice(None)), scale
        elif source.kind(tensor) == "int8":
            found[tensor.name] = source.quantised(tensor).floats()
        else:
            found[tensor.name] = np.concatenate(list(source.floats(tensor)))
    return found


def assert_same_model(found: Tensors, wanted: Tensors, *, exact: bool = True) -> None:
    """Values and scales bit for bit; floats, too, unless they were rounded to float16."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, tuple):
            np.testing.assert_array_equal(found[name][0], value[0], name)
            count = max(found[name][1].shape[1], value[1].shape[1])
            scales = [np.repeat(s, count // s.shape[1], axis=1) for s in (found[name][1], value[1])]
            np.testing.assert_array_equal(*scales, name)
        elif exact or value.ndim == 1:
            np.testing.assert_array_equal(found[name], value, name)
        else:
            half = value.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(found[name], half, name)
