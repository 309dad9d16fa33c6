"""Ternary matrices of training checkpoints: scales of blocks and groups, published values kept."""

from __future__ import annotations

import numpy as np
import pytest
from model_files import random_tensors, write_json, write_training
from safetensors.numpy import save_file

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.quantise import quantise_weight

SIZES = {"vocab_size": 24, "hidden_size": 64, "num_layers": 1, "intermediate_size": 96}
DIALS = {"token_mixer": "attention", "num_heads": 2, "linear_norm": "none", "rounding": "even"}
BLOCKS = ModelConfig(**SIZES, **DIALS, split_gate=True, head_linear="dense")
GROUPS = ModelConfig(**SIZES, **DIALS, scale_group=32, embedding_linear="ternary")
GATE = "layers.0.channel.gate_proj"


def test_blocks_of_rows_have_a_mean_each(tmp_path, rng):
    tensors = write_training(tmp_path, BLOCKS, rng)
    tensors[f"{GATE}.weight"][96:] *= 3
    save_file(tensors, tmp_path / "model.safetensors")
    held = open_checkpoint(tmp_path).quantised(f"{GATE}.weight")
    halves = np.split(tensors[f"{GATE}.weight"], 2)
    for half, scale, rows in zip(halves, held.scale, (slice(96), slice(96, 192)), strict=True):
        t, expected = quantise_weight(half)
        assert scale == expected
        np.testing.assert_array_equal(held.read(rows), t)
    np.testing.assert_array_equal(held.read(slice(90, 100)), held.read(slice(0, 192))[90:100])


def test_one_scale_is_left_to_whoever_packs(tmp_path, rng):
    write_training(tmp_path, BLOCKS, rng)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantised("layers.0.mixer.q_proj.weight") is None
    assert checkpoint.quantised("embedding.weight") is None


@pytest.mark.parametrize("name", [GATE, "embedding", "head"])
def test_groups_of_inputs_have_a_mean_each(tmp_path, rng, name):
    weight = write_training(tmp_path, GROUPS, rng)[f"{name}.weight"]
    held = open_checkpoint(tmp_path).quantised(f"{name}.weight")
    assert (held.group, held.scale.shape) == (32, (len(weight), 2))
    values = held.read(slice(0, len(weight)))
    for row in (0, len(weight) - 1):
        for group in (0, 1):
            cut = slice(32 * group, 32 * group + 32)
            t, expected = quantise_weight(weight[row, cut])
            assert held.scale[row, group] == expected
            np.testing.assert_array_equal(values[row, cut], t)
    np.testing.assert_array_equal(held.read(slice(3, 5)), values[3:5])


def stored(directory, rng, config=GROUPS, **changes):
    """A checkpoint of values and scales; {name: tensor}."""
    tensors = random_tensors(config, rng)
    for name in [n for n in tensors if "norm" not in n]:
        weight, at = tensors.pop(name), name.removesuffix(".weight")
        tensors[f"{at}.values"] = rng.integers(-1, 2, weight.shape).astype(np.int8)
        shape = (len(weight), weight.shape[1] // 32)
        tensors[f"{at}.scale"] = (0.1 + rng.random(shape)).astype(np.float32)
    tensors |= changes
    directory.mkdir(exist_ok=True)
    write_json(
        directory / "config.json",
        {"model_type": "nomatmul", "stored_linears": True, **config.to_dict()},
    )
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")
    return tensors


def test_published_values_are_kept(tmp_path, rng):
    tensors = stored(tmp_path, rng)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == GROUPS
    for name in (GATE, "embedding", "head", "layers.0.mixer.o_proj"):
        held = checkpoint.quantised(f"{name}.weight")
        values = held.read(slice(0, held.shape[0]))
        np.testing.assert_array_equal(values, tensors[f"{name}.values"])
        np.testing.assert_array_equal(held.scale, tensors[f"{name}.scale"])
        spread = np.repeat(held.scale, 32, axis=1)
        np.testing.assert_array_equal(checkpoint.read(f"{name}.weight"), values * spread)
    norm = checkpoint.read("final_norm.weight")
    np.testing.assert_array_equal(norm, tensors["final_norm.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{GATE}.scale": np.ones((192, 4), np.float32)}, r"scale' has shape \[192, 4\]"),
        ({f"{GATE}.scale": None}, "scale' has shape None"),
        ({f"{GATE}.scale": np.zeros((192, 2), np.float32)}, "a scale is 0.0"),
        ({f"{GATE}.values": np.full((192, 64), 2, np.int8)}, "values other than -1, 0 and 1"),
        ({f"{GATE}.values": None}, "gate_proj.weight'"),
    ],
)
def test_damage_is_named(tmp_path, rng, change, message):
    stored(tmp_path, rng, **change)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path).read(f"{GATE}.weight")
