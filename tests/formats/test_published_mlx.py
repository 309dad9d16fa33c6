"""Ternary checkpoints as MLX packs them: uint32 codes beside scales and biases."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.published_lm import QWEN3, random_model, write

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError

GROUP = 32


def words(codes, bits):
    """Codes of a row as uint32, the lowest bits first: code j in bits j * bits of the row."""
    per = 32 // bits
    cut = codes.astype(np.uint64).reshape(len(codes), -1, per)
    return (
        (cut << (np.arange(per, dtype=np.uint64) * np.uint64(bits))).sum(axis=2).astype(np.uint32)
    )


def write_mlx(directory, rng, bits=2, **options):
    """Returns {published name of a matrix: its values}."""
    values = {**QWEN3, "tie_word_embeddings": True}
    model = random_model(values, rng, group=GROUP, ternary_head=True)
    tensors, wanted = dict(model.floats), {}
    for name, (t, scale) in model.ternary.items():
        if bits == 1:
            t = np.where(t < 0, -1, 1).astype(np.int8)
        signs = np.where(rng.random(scale.shape) < 0.2, -1, 1).astype(np.float32)
        signs[0, 0] = 0
        step = (scale * signs).astype(np.float16)
        codes = t + 1 if bits == 2 else (t + 1) // 2
        tensors[f"{name}.weight"] = words(codes, bits)
        tensors[f"{name}.scales"] = step if bits == 2 else step * np.float16(2)
        tensors[f"{name}.biases"] = -step
        wanted[f"{name}.weight"] = t * np.repeat(step.astype(np.float32), GROUP, axis=1)
    packing = {"group_size": GROUP, "bits": bits, **options}
    values |= {"quantization": packing, "quantization_config": packing}
    write(directory, values, tensors)
    return wanted


@pytest.mark.parametrize("bits", [1, 2])
def test_matrices_are_scale_times_code_and_bias(tmp_path, rng, bits):
    wanted = write_mlx(tmp_path, rng, bits)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config.scale_group, checkpoint.config.embedding_linear) == (32, "ternary")
    for ours, name in (
        ("embedding", "model.embed_tokens"),
        ("layers.1.mixer.k_proj", "model.layers.1.self_attn.k_proj"),
        ("layers.0.channel.down_proj", "model.layers.0.mlp.down_proj"),
    ):
        values = wanted[f"{name}.weight"]
        np.testing.assert_array_equal(checkpoint.read(f"{ours}.weight"), values)
        part = checkpoint.read(f"{ours}.weight", slice(5, 30))
        np.testing.assert_array_equal(part, values[5:30])
        held = checkpoint.quantised(f"{ours}.weight")
        assert (held.kind, held.group) == ("ternary", GROUP)
        np.testing.assert_array_equal(held.floats(), values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "quantization bits 4 is not supported; it must be 1 or 2"),
        ({"group_size": 16}, "quantization group_size 16 is not supported"),
        ({"mode": "mxfp4"}, "quantization mode 'mxfp4' is not supported"),
        ({"lm_head": {"bits": 8}}, "quantization has 'lm_head' apart"),
        ({"bits": None}, "quantization bits None is not supported"),
    ],
)
def test_other_kinds_are_refused(tmp_path, rng, options, message):
    write_mlx(tmp_path, rng)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for key in ("quantization", "quantization_config"):
        values[key] = {**values[key], **options}
    path.write_text(json.dumps(values))
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def no_bias(tensors, name):
    tensors[f"{name}.biases"] = tensors[f"{name}.biases"] * np.float16(1.5)


def code_three(tensors, name):
    tensors[f"{name}.weight"][3, 1] = 0xFFFFFFFF


def absent(tensors, name):
    del tensors[f"{name}.scales"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_bias, "is not ternary: its biases"),
        (code_three, "it holds the code 3"),
        (absent, r"lacks the tensor 'model\.layers\.0\.self_attn\.q_proj\.scales'"),
    ],
)
def test_damage_is_named(tmp_path, rng, damage, message):
    write_mlx(tmp_path, rng)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    damage(tensors, "model.layers.0.self_attn.q_proj")
    save_file(tensors, path)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path).read("layers.0.mixer.q_proj.weight")


def test_packed_words_without_their_key(tmp_path, rng):
    write_mlx(tmp_path, rng)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["quantization"], values["quantization_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(FormatError, match="has no quantization_config"):
        open_checkpoint(tmp_path)
