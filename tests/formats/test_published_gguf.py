"""GGUF models as published models: config, names, order of rows, scales of every kind."""

from __future__ import annotations

import json

import gguf_models as models
import numpy as np
import pytest
from gguf_models import HEAD_SIZE, sizes, write_gguf

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError
from nomatmul.formats.published.gguf import open_gguf

TYPES = [("F32", None), ("Q8_0", 32), ("TQ1_0", 256), ("TQ2_0", 256)]
Q_PROJ, K_PROJ = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")


@pytest.mark.parametrize(("kind", "group"), TYPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tensors_are_hugging_face_s(tmp_path, rng, architecture, kind, group):
    path = tmp_path / "x.gguf"
    wanted = write_gguf(path, architecture, rng, kind=kind, group=group or 256)
    values, source = open_gguf(path)
    assert source.shapes() == {name: value.shape for name, value in wanted.items()}
    for name, value in wanted.items():
        np.testing.assert_array_equal(source.read(name), value, name)
        rows = slice(3, min(len(value), 67))  # across a head, and not from its start
        np.testing.assert_array_equal(source.read(name, rows), value[rows], name)
        assert source.read(name, slice(5, 5)).shape == (0, *value.shape[1:])
        matrix = source.quantised(name)
        assert (matrix is not None) == (".layers." in name and value.ndim == 2 and kind != "F32")
        if matrix is not None:
            assert matrix.group == group
            np.testing.assert_array_equal(matrix.checked(name).floats(), value, name)
            np.testing.assert_array_equal(matrix.read(rows), matrix.read(slice(None))[rows])
            assert matrix.read(slice(9, 9)).shape == (0, value.shape[1])
    assert "quantization_config" not in values


def test_one_order_of_rows_is_not_the_other(tmp_path, rng):
    """The rows of q and k in a `llama` file are not those of the model."""
    wanted = write_gguf(tmp_path / "x.gguf", "llama", rng, kind="TQ2_0")
    _, source = open_gguf(tmp_path / "x.gguf")
    for name, stored in ((Q_PROJ, "blk.1.attn_q.weight"), (K_PROJ, "blk.1.attn_k.weight")):
        assert not np.array_equal(source.file.read(stored), wanted[name])


def test_the_config_is_that_of_hugging_face(tmp_path, rng):
    def keys(writer):
        sizes(writer)
        writer.add_vocab_size(models.VOCAB)
        writer.add_key_length(HEAD_SIZE)
        writer.add_value_length(HEAD_SIZE)
        writer.add_bool("qwen3.attention.causal", True)
        writer.add_uint32("qwen3.expert_count", 0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_name("a name")
        writer.add_quantization_version(2)

    write_gguf(tmp_path / "x.gguf", "qwen3", rng, keys=keys)
    values, _ = open_gguf(tmp_path / "x.gguf")
    assert values == {
        "model_type": "qwen3", "vocab_size": 40, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": None, "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    json.dumps(values)


def test_several_end_tokens(tmp_path, rng):
    def keys(writer):
        sizes(writer)
        tokens = [f"t{i}" for i in range(38)] + ["<|im_end|>", "<|endoftext|>"]
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 38 + [3, 1])
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(5)

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=keys)
    assert open_gguf(tmp_path / "x.gguf")[0]["eos_token_id"] == [7, 5, 38, 39]


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [("bitnet", "silu"), ("bitnet-25", "relu2"), ("bitnet-b1.58", "relu2")],
)
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_bitnet(tmp_path, rng, architecture, activation, kind):
    def zeros(tensors):
        tensors["blk.0.attn_v.weight"][1] = 0  # a block of zeros has the scale of the others

    path = tmp_path / "x.gguf"
    wanted = write_gguf(path, architecture, rng, kind=kind, group=0, tied=True, change=zeros)
    wanted["model.layers.0.self_attn.v_proj.weight"][1] = 0
    values, source = open_gguf(path)
    assert (values["model_type"], values["hidden_act"]) == ("bitnet", activation)
    assert values["tie_word_embeddings"] is True
    assert values["quantization_config"]["quant_method"] == "bitnet"
    assert source.shapes() == {name: value.shape for name, value in wanted.items()}
    for name, value in wanted.items():
        np.testing.assert_array_equal(source.read(name), value, name)
        matrix = source.quantised(name)
        if ".layers." in name and value.ndim == 2:
            assert (matrix.group, matrix.scale.shape) == (0, (1,))
            np.testing.assert_array_equal(matrix.floats(), value, name)


@pytest.mark.parametrize("architecture", ["llama", "bitnet"])
def test_a_factor_beside_a_matrix(tmp_path, rng, architecture):
    """Older BitNet files keep the scale of a matrix so; llama.cpp multiplies products by it."""

    def add(tensors):
        for part, factor in {"attn_q": 0.5, "attn_v": 3.0, "ffn_down": 0.25}.items():
            tensors[f"blk.1.{part}.scale"] = np.array([factor], np.float32)

    path = tmp_path / "x.gguf"
    wanted = write_gguf(path, architecture, rng, kind="TQ2_0", group=0, change=add)
    _, source = open_gguf(path)
    factors = {"self_attn.q": 0.5, "self_attn.v": 3, "mlp.down": 0.25, "mlp.up": 1}
    for name, factor in factors.items():
        weight = f"model.layers.1.{name}_proj.weight"
        np.testing.assert_array_equal(source.read(weight), factor * wanted[weight], name)
        rows = source.read(weight, slice(3, 70))
        np.testing.assert_array_equal(rows, factor * wanted[weight][3:70], name)
        np.testing.assert_array_equal(source.quantised(weight).floats(), factor * wanted[weight])


def test_bitnet_keeps_scales_that_differ(tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", "bitnet-b1.58", rng, kind="TQ2_0", tied=True)
    assert open_gguf(tmp_path / "x.gguf")[1].quantised(K_PROJ).group == 256


def as_i2_s(value):
    """Values -s, 0, s with one s as I2_S has them."""
    codes = (np.sign(value).astype(np.int8) + 1).astype(np.uint8).reshape(-1, 4, 32)
    data = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    behind = np.zeros(8, np.float32)
    behind[0] = np.abs(value).max()
    return np.concatenate([data.reshape(-1), behind.view(np.uint8)])


@pytest.mark.parametrize("mixed", [False, True])
def test_i2_s_takes_int8_activations_a_token(tmp_path, rng, monkeypatch, mixed):
    def put(writer, name, value, kind):
        if mixed and name.endswith("1.ffn_up.weight"):
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, as_i2_s(value).view(np.int8), value.shape, 36)

    monkeypatch.setattr(models, "put", put)
    wanted = write_gguf(tmp_path / "x.gguf", "llama", rng, group=0)
    if mixed:
        with pytest.raises(FormatError, match=r"'blk\.1\.ffn_up\.weight' is F32; it must be I2_S"):
            open_gguf(tmp_path / "x.gguf")
        return
    values, source = open_gguf(tmp_path / "x.gguf")
    assert values["quantization_config"]["quant_method"] == "bitnet"
    for name, value in wanted.items():
        np.testing.assert_array_equal(source.read(name), value, name)
    matrix = source.quantised(Q_PROJ)
    assert (matrix.kind, matrix.group) == ("ternary", 0)
    np.testing.assert_array_equal(matrix.floats(), wanted[Q_PROJ])
    np.testing.assert_array_equal(matrix.floats(slice(60, 70)), wanted[Q_PROJ][60:70])


def test_a_tied_head(tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", "qwen3", rng, tied=True)
    values, source = open_gguf(tmp_path / "x.gguf")
    assert values["tie_word_embeddings"] is True
    assert "lm_head.weight" not in source.shapes()


def test_a_norm_inside_each_linear(tmp_path, rng):
    """BitNet-embedding as bitnet.cpp converts it: NAME_norm_in beside every matrix of a block."""
    norms = {}

    def add_norms(tensors):
        for name, value in list(tensors.items()):
            if name.startswith("blk.") and value.ndim == 2:
                norm = name.replace(".weight", "_norm_in.weight")
                norms[norm] = rng.random(value.shape[1]).astype(np.float32)
        tensors |= norms

    path = tmp_path / "x.gguf"
    wanted = write_gguf(path, "qwen3", rng, kind="TQ2_0", group=0, tied=True, change=add_norms)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert (config.linear, config.linear_norm, config.scale_group) == ("ternary", "all", 0)
    assert config.linear_norm_eps == pytest.approx(1e-5)
    for ours, stored, name in (
        ("mixer.q_proj", "attn_q", "self_attn.q_proj"),
        ("mixer.o_proj", "attn_output", "self_attn.o_proj"),
        ("channel.up_proj", "ffn_up", "mlp.up_proj"),
        ("channel.down_proj", "ffn_down", "mlp.down_proj"),
    ):
        norm = checkpoint.read(f"layers.1.{ours}.norm.weight")
        np.testing.assert_array_equal(norm, norms[f"blk.1.{stored}_norm_in.weight"])
        weight = checkpoint.read(f"layers.1.{ours}.weight")
        np.testing.assert_array_equal(weight, wanted[f"model.layers.1.{name}.weight"])

    def without_one(tensors):
        add_norms(tensors)
        del tensors["blk.1.ffn_down_norm_in.weight"]

    write_gguf(path, "qwen3", rng, kind="TQ2_0", group=0, tied=True, change=without_one)
    with pytest.raises(FormatError, match=r"lacks the tensor 'blk\.1\.ffn_down_norm_in\.weight'"):
        open_checkpoint(path)
