"""Published decoders of Llama's shape: every form of their weights reads as the same matrices."""

from __future__ import annotations

import numpy as np
import pytest
from model_files import shard
from support.published_lm import (
    BITNET,
    LLAMA,
    QWEN3,
    assert_holds,
    auto,
    bfloat16,
    quantised,
    random_model,
    spread,
    write,
    write_config,
    write_masters,
    write_packed,
    write_unpacked,
    write_values,
)

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError


def test_packed_by_autobitlinear(tmp_path, bitnet):
    checkpoint = assert_holds(write_packed(tmp_path, bitnet, legacy=False), bitnet)
    config = checkpoint.config
    assert (config.linear_norm, config.rounding, config.split_gate) == ("sub", "even", True)
    assert (config.head_linear, config.glu_activation, config.kv_heads) == ("dense", "relu2", 2)
    assert (config.linear_norm_eps, config.norm_eps, config.rope_theta) == (1e-5, 1e-5, 5e5)
    for name, stored in (
        ("mixer.o_proj.norm", "self_attn.attn_sub_norm"),
        ("channel.down_proj.norm", "mlp.ffn_sub_norm"),
        ("mixer_norm", "input_layernorm"),
        ("channel_norm", "post_attention_layernorm"),
    ):
        expected = bitnet.floats[f"model.layers.1.{stored}.weight"]
        np.testing.assert_array_equal(checkpoint.read(f"layers.1.{name}.weight"), expected)


def test_scales_of_any_rank(tmp_path, bitnet):
    from safetensors.numpy import load_file

    stored = load_file(write_packed(tmp_path, bitnet, legacy=False) / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            stored[name] = tensor.reshape((1, 1) if "gate" in name else ())
    assert_holds(write(tmp_path, quantised(bitnet, **auto("offline")), stored), bitnet)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_unpacked_beside_its_scale(tmp_path, bitnet, dtype):
    assert_holds(write_unpacked(tmp_path, bitnet, dtype), bitnet)


def test_unpacked_rows_need_not_be_packable(tmp_path, rng):
    """66 rows are no whole number of packed ones, which a file of plain values does not need."""
    sizes = {"hidden_size": 66, "num_attention_heads": 3, "num_key_value_heads": 3}
    model = random_model({**BITNET, **sizes, "intermediate_size": 50}, rng)
    checkpoint = open_checkpoint(write_unpacked(tmp_path, model))
    wanted = model.weights()["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(checkpoint.read("layers.1.channel.down_proj.weight"), wanted)


def test_legacy_scales_divide(tmp_path, llama):
    directory = write_packed(tmp_path, llama, legacy=True, modules_to_not_convert=None, bits=2)
    checkpoint = open_checkpoint(directory)
    t, scale = llama.ternary["model.layers.0.mlp.down_proj"]
    held = checkpoint.quantised("layers.0.channel.down_proj.weight")
    np.testing.assert_allclose(held.scale, scale[0], rtol=2e-7)
    np.testing.assert_array_equal(held.read(slice(0, 64)), t)
    config = checkpoint.config
    assert (config.linear_norm, config.rounding, config.head_size) == ("none", "even", 24)


def test_exports_of_onebitllms_round_up(tmp_path, llama):
    llama.values["is_bitnet_config"] = True
    write_packed(tmp_path, llama, legacy=True, modules_to_not_convert=["lm_head"])
    assert open_checkpoint(tmp_path).config.rounding == "up"


def test_masters_take_their_mean_in_float32(tmp_path, bitnet, rng):
    directory = write_masters(tmp_path, bitnet, rng)
    from safetensors.numpy import load_file

    matrices, turned = {}, 0
    for name, weight in load_file(directory / "model.safetensors").items():
        if name.removesuffix(".weight") in bitnet.ternary:
            mean = np.float32(np.abs(weight).mean(dtype=np.float64))
            t = np.clip(np.rint(weight * (np.float32(1) / mean)), -1, 1)
            matrices[name] = t * (np.float32(1) / (np.float32(1) / mean))
            coarse = bfloat16(mean)  # a mean in bfloat16 turns some weights
            turned += np.sum(np.clip(np.rint(weight / coarse), -1, 1) != t)
    assert turned
    assert_holds(directory, bitnet, matrices)


@pytest.mark.parametrize("name", ["rms_norm", "norm"])
def test_norms_inside_each_linear(tmp_path, rng, name):
    model = random_model(LLAMA, rng, inner_norm=name)
    options = {"use_rms_norm": True, "rms_norm_eps": 1e-4, "modules_to_not_convert": None}
    directory = write_packed(tmp_path, model, legacy=False, **options)
    checkpoint = assert_holds(directory, model)
    assert (checkpoint.config.linear_norm, checkpoint.config.linear_norm_eps) == ("all", 1e-4)
    for ours, stored in (("mixer.k_proj", "self_attn.k_proj"), ("channel.up_proj", "mlp.up_proj")):
        expected = model.floats[f"model.layers.0.{stored}.{name}.weight"]
        np.testing.assert_array_equal(checkpoint.read(f"layers.0.{ours}.norm.weight"), expected)


def test_an_embedding_model(tmp_path, rng):
    """BitNet-embedding: masters, a norm inside each linear, no key, the bare model's names."""
    model = random_model({**QWEN3, "tie_word_embeddings": True}, rng, inner_norm="norm")
    tensors = {**model.floats, **{n: w * 1.5 for n, w in model.weights().items()}}
    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    checkpoint = open_checkpoint(write(tmp_path, model.values, tensors))
    config = checkpoint.config
    assert (config.linear_norm, config.qk_norm, config.scale_group) == ("all", True, 0)
    t, scale = model.ternary["model.layers.1.mlp.up_proj"]
    held = checkpoint.quantised("layers.1.channel.up_proj.weight")
    np.testing.assert_array_equal(held.read(slice(0, 96)), t)
    mean = np.abs(spread(t, scale * np.float32(1.5))).mean(dtype=np.float64)
    np.testing.assert_allclose(held.scale, [mean], rtol=1e-6)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_ternary_values(tmp_path, rng, group, dtype):
    model = random_model(QWEN3, rng, group=group, ternary_head=group > 0)
    checkpoint = assert_holds(write_values(tmp_path, model, dtype), model)
    config = checkpoint.config
    assert (config.linear_norm, config.scale_group, config.split_gate) == ("none", 32, False)
    kind = "ternary" if group else "dense"
    assert (config.head_linear, config.embedding_linear) == (kind, kind)
    if group:
        for name, stored in (("embedding", "model.embed_tokens"), ("head", "lm_head")):
            held = checkpoint.quantised(f"{name}.weight")
            np.testing.assert_array_equal(held.floats(), model.weights()[f"{stored}.weight"])


def test_a_tied_ternary_embedding_is_the_head(tmp_path, rng):
    values = {**QWEN3, "tie_word_embeddings": True}
    model = random_model(values, rng, group=32, ternary_head=True)
    config = assert_holds(write_values(tmp_path, model), model).config
    assert (config.head_linear, config.embedding_linear) == ("ternary", "ternary")
    assert config.tie_embeddings


@pytest.mark.parametrize("values", [LLAMA, QWEN3])
def test_dense_models(tmp_path, rng, values):
    model = random_model(values, rng)
    for name, (t, _) in model.ternary.items():
        model.floats[f"{name}.weight"] = bfloat16(rng.standard_normal(t.shape))
    checkpoint = open_checkpoint(write(tmp_path, values, model.floats))
    assert checkpoint.config.linear == "dense"
    assert checkpoint.quantised("layers.0.mixer.q_proj.weight") is None
    expected = [
        model.floats[f"model.layers.1.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")
    ]
    np.testing.assert_array_equal(
        checkpoint.read("layers.1.channel.gate_proj.weight", slice(90, 101)),
        np.concatenate(expected)[90:101],
    )


@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_pruned_models_are_dense(tmp_path, rng, zeros):
    model = random_model({**QWEN3, "num_hidden_layers": 1}, rng)
    tensors = {**model.floats}
    for name, (t, _) in model.ternary.items():
        kept = rng.random(t.shape) >= zeros
        tensors[f"{name}.weight"] = (kept * rng.standard_normal(t.shape)).astype(np.float32)
    write(tmp_path, model.values, tensors)
    assert open_checkpoint(tmp_path).config.linear == "dense"


@pytest.mark.train
def test_packed_weights_in_pickles(tmp_path, bitnet):
    import torch
    from safetensors.torch import load_file

    directory = write_packed(tmp_path, bitnet, legacy=False)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert_holds(directory, bitnet)


def test_packed_weights_inside_a_wrapper(tmp_path, bitnet):
    from safetensors.numpy import load_file, save_file

    path = write_packed(tmp_path, bitnet, legacy=False) / "model.safetensors"
    save_file({f"module._orig_mod.{n}": t for n, t in load_file(path).items()}, path)
    with pytest.warns(UserWarning, match="took the wrapper's prefix"):
        assert_holds(tmp_path, bitnet)


def test_packed_weights_in_shards(tmp_path, bitnet):
    directory = write_packed(tmp_path, bitnet, legacy=False)
    shard(directory, 2)
    assert_holds(directory, bitnet)


FIRST = {**LLAMA, "weight_bits": 1, "input_bits": 8, "architectures": ["BitnetForCausalLM"]}


def write_first_bitnet(directory, rng, values=FIRST):
    """The first BitNet b1.58 (1bitLLM): Llama's config with two keys, masters, sub-norms."""
    model = random_model(LLAMA, rng)
    for name, (t, _) in model.ternary.items():
        model.floats[f"{name}.weight"] = bfloat16(rng.standard_normal(t.shape) / 8)
    for layer in range(LLAMA["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, part in (("self_attn.inner_attn_ln", "o"), ("mlp.ffn_layernorm", "down")):
            owner = f"{at}{name.split('.')[0]}.{part}_proj"
            width = model.ternary[owner][0].shape[1]
            norm = bfloat16(1 + 0.2 * rng.standard_normal(width))
            model.floats[f"{at}{name}.weight"] = norm
    write(directory, values, model.floats)
    return model


def test_the_first_bitnet(tmp_path, rng):
    model = write_first_bitnet(tmp_path, rng)
    matrices = {}
    for name in model.ternary:
        weight = model.floats[f"{name}.weight"]
        mean = np.float32(np.abs(weight).astype(np.float64).mean())
        t = np.clip(np.round(weight / mean), -1, 1).astype(np.int8)
        scale = np.float32(1) / (np.float32(1) / mean)
        matrices[f"{name}.weight"] = spread(t, np.array([[scale]]))
    checkpoint = assert_holds(tmp_path, model, matrices)
    assert checkpoint.config.linear_norm == "sub"
    assert checkpoint.config.glu_activation == "silu"
    assert checkpoint.config.rounding == "even"
    for ours, name in (
        ("mixer.o_proj", "self_attn.inner_attn_ln"),
        ("channel.down_proj", "mlp.ffn_layernorm"),
    ):
        np.testing.assert_array_equal(
            checkpoint.read(f"layers.1.{ours}.norm.weight"),
            model.floats[f"model.layers.1.{name}.weight"],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 2}, "weight_bits 2, input_bits 8 is not supported"),
        ({"input_bits": None}, "weight_bits 1 is not supported"),
        ({"weight_bits": None, "input_bits": None}, r"unknown tensor '.*ffn_layernorm"),
    ],
)
def test_a_first_bitnet_of_another_kind(tmp_path, rng, options, message):
    write_first_bitnet(tmp_path, rng, {**FIRST, **options})
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_bits_of_weights_without_their_norms(tmp_path, llama):
    write_values(tmp_path, llama)
    write_config(tmp_path, FIRST)
    with pytest.raises(FormatError, match="weight_bits is 1, but the blocks have no norms"):
        open_checkpoint(tmp_path)


def test_tables_that_follow_from_the_config(tmp_path, llama):
    tables = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
    for name in tables:
        llama.floats[f"model.layers.0.self_attn.rotary_emb.{name}"] = np.ones(12, np.float32)
    llama.floats["model.rotary_emb.inv_freq"] = np.ones(12, np.float32)
    write_values(tmp_path, llama)
    assert_holds(tmp_path, llama)
