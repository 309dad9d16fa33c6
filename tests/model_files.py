"""Small model directories on disk, for tests of everything that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.packed import Forms, PackedWriter
from nomatmul.formats.published import config_from_published, published_name
from nomatmul.formats.quantise import quantise_rows, quantise_weight, to_bfloat16

Arrays = dict[str, NDArray[np.float32]]

PUBLISHED = {
    "model_type": "hgrn_bit",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_tensors(config: ModelConfig, rng: np.random.Generator) -> Arrays:
    """Plausible weights for every tensor of a training checkpoint, by our names."""
    tensors: Arrays = {}
    for name, shape in architecture_of(config).tensors().items():
        values = rng.standard_normal(shape)
        tensors[name] = (1 + 0.3 * values if "norm" in name else 0.5 * values).astype(np.float32)
    return tensors


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_published(directory: Path, rng: np.random.Generator, **options: Any) -> Arrays:
    """Write a published float32 checkpoint in one file; return its tensors by our names."""
    values = {**PUBLISHED, **options}
    tensors = random_tensors(config_from_published(values), rng)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", values)
    save_file({published_name(n): t for n, t in tensors.items()}, directory / "model.safetensors")
    return tensors


def write_training(directory: Path, config: ModelConfig, rng: np.random.Generator) -> Arrays:
    """Write a training checkpoint of our own; return its tensors."""
    tensors = random_tensors(config, rng)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {"model_type": "nomatmul", **config.to_dict()})
    save_file(tensors, directory / "model.safetensors")
    return tensors


def write_tokenizer(directory: Path, words: int = 40) -> Path:
    """Write a tokenizer.json of `words` words (w0, w1, ...)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def packed_values(
    checkpoint: Checkpoint, packing: str, embedding_form: str
) -> dict[str, NDArray[Any]]:
    """Return every tensor of the packed form except the packed matrices, which stay ternary."""
    values: dict[str, NDArray[Any]] = {}
    config = checkpoint.config
    if config.use_lower_bound:
        bounds = cumulative_lower_bounds(checkpoint.read("lower_bounds"))
    else:
        bounds = np.zeros((config.num_layers, config.hidden_size), np.float32)
    for layer in range(config.num_layers):
        values[f"layers.{layer}.mixer.lower_bound"] = bounds[layer]
    for name in [*checkpoint.names(), "head.weight"]:
        if name.endswith(("proj.weight", "head.weight")):
            t_NK, scale = quantise_weight(checkpoint.read(name))
            linear = name.removesuffix(".weight")
            values[f"{linear}.packed"] = t_NK
            values[f"{linear}.scale"] = np.array([scale], dtype=np.float32)
        elif name.endswith(".w_in"):
            rows = name.removesuffix("w_in") + "rows"
            both = [quantise_weight(checkpoint.read(name[:-2] + way)) for way in ("in", "out")]
            values[f"{rows}.packed"] = np.stack([t_VD for t_VD, _ in both], axis=1)
            values[f"{rows}.scale"] = np.array([scale for _, scale in both], dtype=np.float32)
        elif name == "embedding.weight" and embedding_form == "int8":
            values[name], values["embedding.scale"] = quantise_rows(checkpoint.read(name))
        elif name == "embedding.weight" and embedding_form == "bf16":
            values[name] = to_bfloat16(checkpoint.read(name))
        elif name != "lower_bounds" and not name.endswith(".w_out"):
            values[name] = checkpoint.read(name)
    return values


def write_packed(
    directory: Path,
    checkpoint: Checkpoint,
    packing: str = "2bit",
    embedding_form: str = "bf16",
    tokenizer: Path | None = None,
) -> None:
    """Pack a checkpoint the short way."""
    values = packed_values(checkpoint, packing, embedding_form)
    config = checkpoint.config
    forms = Forms.of(config, ternary=packing, embedding=embedding_form)
    with PackedWriter(directory, config, forms, tokenizer_path=tokenizer) as writer:
        for name in writer.names:
            if name.endswith(".packed"):
                writer.add_packed(name, values[name])
            else:
                writer.add(name, values[name])


def assert_holds(directory: Path, tensors: Arrays, rel: float = 0.0) -> None:
    """A checkpoint has these tensors, by our names, within a relative error."""
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.names()) == set(tensors)
    for name, values in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, values, rtol=rel, atol=1e-7 if rel else 0, err_msg=name)


def shard(directory: Path, count: int = 3) -> dict[str, str]:
    """Split model.safetensors into `count` files and an index; return the weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[part::count]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": 1}, "weight_map": weight_map},
    )
    return weight_map


def unlisted(directory: Path) -> list[Path]:
    """Two parts named as by an index that is gone; returns their paths."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    paths = [directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: tensors[name] for name in names[::2]}, paths[0])
    save_file({name: tensors[name] for name in names[1::2]}, paths[1])
    return paths
