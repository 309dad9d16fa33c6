"""The same weights from one file, shards and half precisions; and bad sources."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from model_files import (
    PUBLISHED,
    assert_holds,
    shard,
    unlisted,
    write_json,
    write_published,
    write_training,
)
from safetensors.numpy import load_file, save_file

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig


def test_shards(tmp_path, rng):
    tensors = write_published(tmp_path, rng)
    shard(tmp_path)
    assert_holds(tmp_path, tensors)


def test_parts_without_an_index(tmp_path, rng):
    tensors = write_published(tmp_path, rng)
    first, second = unlisted(tmp_path)
    assert_holds(tmp_path, tensors)
    second.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors, and an index"):
        open_checkpoint(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="holds parts of 2 and of 3, and no index"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="as another part does"):
        open_checkpoint(tmp_path)
    second.unlink()
    first.rename(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights: .*; weights\.safetensors has another"):
        open_checkpoint(tmp_path)


def test_float16(tmp_path, rng):
    tensors = write_published(tmp_path, rng)
    stored = load_file(tmp_path / "model.safetensors")
    half = {name: values.astype(np.float16) for name, values in stored.items()}
    save_file(half, tmp_path / "model.safetensors")
    assert_holds(tmp_path, tensors, rel=2**-11)


@pytest.mark.train
@pytest.mark.parametrize("sharded", [False, True])
def test_bfloat16_as_torch_writes_it(tmp_path, rng, sharded):
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = write_published(tmp_path, rng)
    if sharded:
        shard(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_torch({n: t.to(torch.bfloat16) for n, t in load_torch(path).items()}, path)
    assert_holds(tmp_path, tensors, rel=2**-8)
    checkpoint = open_checkpoint(tmp_path)
    for name, values in tensors.items():
        expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(checkpoint.read(name), expected)


def test_tied_head_is_the_embedding(tmp_path, rng):
    options = {"tie_word_embeddings": True}
    tensors = write_published(tmp_path, rng, **options)
    assert "head.weight" not in tensors
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("head.weight"), tensors["embedding.weight"])
    assert checkpoint.shape("head.weight") == tensors["embedding.weight"].shape


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path, rng, equal):
    write_published(tmp_path, rng, tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embeddings.weight"] + np.float32(0 if equal else 1)
    save_file(stored, tmp_path / "model.safetensors")
    if equal:
        assert "head.weight" not in open_checkpoint(tmp_path).names()
    else:
        with pytest.raises(ValueError, match=r"ties the head .* 'lm_head\.weight' differs"):
            open_checkpoint(tmp_path)


def test_our_own_training_checkpoint(tmp_path, rng):
    config = ModelConfig(50, 32, 2, token_mixer="attention", linear="dense", num_heads=4)
    tensors = write_training(tmp_path, config, rng)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "training"
    assert checkpoint.config == config
    assert_holds(tmp_path, tensors)


def test_keys_that_hugging_face_adds_are_harmless_in_a_training_config(tmp_path, rng):
    config = ModelConfig(50, 32, 1, tie_embeddings=True)
    write_training(tmp_path, config, rng)
    values = {
        "model_type": "nomatmul",
        **config.to_dict(),
        "transformers_version": "5",
        "dtype": "x",
    }
    write_json(tmp_path / "config.json", {**values, "tie_word_embeddings": True})
    assert open_checkpoint(tmp_path).config == config
    write_json(tmp_path / "config.json", {**values, "tie_word_embeddings": False})
    with pytest.raises(ValueError, match="tie_word_embeddings False contradicts"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {**values, "colour": 1})
    with pytest.raises(ValueError, match="unknown config key 'colour'"):
        open_checkpoint(tmp_path)


def test_directories_that_are_no_model(tmp_path, rng):
    with pytest.raises(ValueError, match="none does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no/such does not exist; a model of the .* hf:no/such"):
        open_checkpoint("no/such")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is not a directory"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="model_type 'gpt2' is unknown"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {"format": "gguf"})
    with pytest.raises(ValueError, match="format 'gguf' is not 'nomatmul-packed'"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", PUBLISHED)
    with pytest.raises(ValueError, match="holds no weights"):
        open_checkpoint(tmp_path)


def damage_names(stored: dict, kind: str) -> None:
    if kind == "missing":
        del stored["model.layers.1.attn.f_proj.weight"]
    elif kind == "extra":
        stored["model.layers.2.attn.f_proj.weight"] = np.zeros((2, 2), np.float32)
    elif kind == "shape":
        stored["model.norm.weight"] = np.ones(31, np.float32)
    elif kind == "dtype":
        stored["model.norm.weight"] = np.ones(32, np.int32)
    elif kind == "nan":
        stored["model.norm.weight"][5] = np.nan
    else:
        stored["model.norm.weight"] = np.full(32, 1e300)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"lacks the tensor 'model\.layers\.1\.attn\.f_proj\.weight'"),
        ("extra", r"holds the unknown tensor 'model\.layers\.2\.attn\.f_proj\.weight'"),
        ("shape", r"'model\.norm\.weight' has shape \[31\], the config asks for \[32\]"),
        ("dtype", r"model\.norm\.weight has dtype I32, expected a float"),
        ("nan", r"model\.norm\.weight holds a value that is not finite"),
        ("overflow", r"model\.norm\.weight holds a value that is not finite"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, rng, kind, message):
    write_published(tmp_path, rng)
    stored = load_file(tmp_path / "model.safetensors")
    damage_names(stored, kind)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path).read("final_norm.weight")


def test_an_index_that_lies(tmp_path, rng):
    write_published(tmp_path, rng)
    weight_map = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    first, *_, last = weight_map
    for change, message in [
        ({first: weight_map[last]}, "which the index puts elsewhere"),
        ({"ghost": weight_map[first]}, "lacks 'ghost', which the index puts there"),
        ({first: "../../etc/passwd"}, "which is no plain file name"),
        ({first: "gone.safetensors"}, r"cannot read .*gone\.safetensors"),
        ({first: 3}, "which is no plain file name"),
    ]:
        write_json(index, {"weight_map": {**weight_map, **change}})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path)
    write_json(index, {"weight_map": []})
    with pytest.raises(ValueError, match="has no weight_map"):
        open_checkpoint(tmp_path)
