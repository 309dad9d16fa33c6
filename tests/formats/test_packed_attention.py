"""Packed decoders with attention: every form of matrices, embeddings, heads and scales."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_packed import FAMILIES, family, random_arrays, write_arrays, write_random

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import Forms, PackedReader, layout_of
from nomatmul.formats.packed.layout import legal_forms
from nomatmul.formats.quantise import from_bfloat16


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_round_trips(tmp_path, name):
    config, forms = family(name)
    arrays = write_random(tmp_path / "m", config, forms)
    reader = PackedReader(tmp_path / "m")
    assert (reader.config, reader.forms) == (config, forms)
    reader.verify_all()
    for matrix in reader.layout.matrices:
        linear = next(iter(matrix.sources)).removesuffix(".weight")
        values, scale = reader.matrix(linear)
        wanted = arrays[matrix.name]
        if matrix.form == "bf16":
            wanted = from_bfloat16(wanted)
        np.testing.assert_array_equal(values, wanted)
        if matrix.scale is None:
            assert (scale, values.dtype) == (None, np.float32)
            continue
        assert scale is not None
        assert (values.dtype, scale.dtype) == (np.int8, np.float32)
        np.testing.assert_array_equal(scale, arrays[matrix.scale])
        np.testing.assert_array_equal(reader.ternary(linear)[1], scale)
    assert reader.embedding().shape == (29, 64)


def test_tensors_of_a_model_with_group_scales():
    config, forms = family("bonsai")
    tensors = layout_of(config, forms).tensors()
    assert forms.to_dict() == {"ternary": "2bit", "embedding": "2bit", "scale": "f16"}
    assert tensors["layers.0.mixer.q_proj.packed"] == ("U8", (128, 32))
    assert tensors["layers.0.mixer.q_proj.scale"] == ("F16", (128, 1))
    assert tensors["layers.1.mixer.o_proj.scale"] == ("F16", (64, 2))
    assert tensors["layers.1.channel.gate_proj.scale"] == ("F16", (256, 1))
    assert tensors["layers.1.channel.down_proj.scale"] == ("F16", (64, 2))
    assert tensors["embedding.packed"] == ("U8", (29, 32))
    assert tensors["embedding.scale"] == ("F16", (29, 1))
    assert tensors["layers.0.mixer.k_norm.weight"] == ("F32", (32,))
    assert not [name for name in tensors if name.startswith("head") or "proj.norm" in name]
    untied = layout_of(*family("bonsai", tie_embeddings=False)).tensors()
    assert untied["head.packed"] == ("U8", (29, 32))
    assert untied["head.scale"] == ("F16", (29, 1))


def test_tensors_of_models_with_int8_activations():
    config, forms = family("bitnet")
    tensors = layout_of(config, forms).tensors()
    assert tensors["layers.0.channel.gate_proj.scale"] == ("F32", (2,))
    assert tensors["layers.0.mixer.q_proj.scale"] == ("F32", (1,))
    assert tensors["layers.0.mixer.o_proj.norm.weight"] == ("F32", (64,))
    assert tensors["layers.0.channel.down_proj.norm.weight"] == ("F32", (96,))
    assert "layers.0.mixer.q_proj.norm.weight" not in tensors
    assert tensors["embedding.scale"] == ("F32", (29,))
    config, forms = family("falcon")
    tensors = layout_of(config, forms).tensors()
    assert tensors["head.weight"] == ("F16", (29, 64))
    assert tensors["layers.0.mixer.q_proj.packed"] == ("U8", (128, 32))
    config, forms = family("llama")
    tensors = layout_of(config, forms).tensors()
    assert {f"layers.0.mixer.{c}_proj.weight" for c in "qkvo"} <= set(tensors)
    assert tensors["layers.0.mixer.k_proj.weight"] == ("BF16", (32, 64))
    assert tensors["head.scale"] == ("F32", (29,))


def test_a_tied_head_may_have_a_matrix_of_its_own(tmp_path):
    config, forms = family("bitnet")
    assert "head.weight" not in layout_of(config, forms).tensors()
    own = Forms.of(config, embedding="bf16", tied_head="int8")
    assert own.to_dict() == {"ternary": "2bit", "embedding": "bf16", "head": "int8"}
    tensors = layout_of(config, own).tensors()
    assert tensors["embedding.weight"] == ("BF16", (29, 64))
    assert (tensors["head.weight"], tensors["head.scale"]) == (("I8", (29, 64)), ("F32", (29,)))
    arrays = write_random(tmp_path / "m", config, own)
    reader = PackedReader(tmp_path / "m")
    assert reader.forms == own
    np.testing.assert_array_equal(reader.matrix("head")[0], arrays["head.weight"])
    mixed = Forms.of(config, embedding="f16", tied_head="int8-32", scale="f16")
    assert layout_of(config, mixed).tensors()["head.scale"] == ("F16", (29, 2))
    # a form of the head alone makes no matrix of it
    assert Forms.of(config, embedding="f16", head="int8").head == "none"
    for name in ("bonsai", "falcon"):  # not a dense one, and not tied
        config, forms = family(name)
        assert Forms.of(config, **forms.to_dict(), tied_head="int8") == forms


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_lies_on_a_multiple_of_its_items(tmp_path, name):
    config, forms = family(name)
    write_random(tmp_path / "m", config, forms)
    sizes = {"U8": 32, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}
    for tensor, info in PackedReader(tmp_path / "m").infos.items():
        assert info.offset % sizes[info.dtype] == 0, tensor


def test_values_of_grouped_tables(tmp_path):
    arrays = write_random(tmp_path / "m", *family("bonsai"))
    table = PackedReader(tmp_path / "m").embedding()
    scale = arrays["embedding.scale"].astype(np.float32)
    np.testing.assert_array_equal(table, arrays["embedding.packed"] * scale)
    arrays = write_random(tmp_path / "n", *family("repack"))
    reader = PackedReader(tmp_path / "n")
    scale = np.repeat(arrays["embedding.scale"].astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(reader.embedding(), arrays["embedding.weight"] * scale)
    np.testing.assert_array_equal(reader.read_float32("embedding.weight"), reader.embedding())


@pytest.mark.parametrize(
    ("name", "dials", "asked", "message"),
    [
        ("bonsai", {}, {"embedding": "bf16"}, "embedding form 'bf16' is unknown; legal values are"),
        ("bonsai", {}, {"scale": "bf16"}, "scale form 'bf16' is unknown; legal .* 'f32', 'f16'"),
        ("bonsai", {}, {"head": "f32"}, "the model has no matrix of form 'head'"),
        ("bonsai", {}, {"scale": "none"}, "the model needs form 'scale'"),
        ("bitnet", {}, {"scale": "f16"}, "the model has no matrix of form 'scale'"),
        ("bitnet", {}, {"embedding": "int8-32"}, "the model needs form 'scale'"),
        ("bitnet", {"hidden_size": 40}, {"embedding": "int8-32"}, "form 'int8-32' is unknown"),
        ("falcon", {}, {"head": "2bit"}, "head form '2bit' is unknown"),
        ("llama", {}, {"dense": "2bit"}, "dense form '2bit' is unknown"),
    ],
)
def test_forms_that_a_model_cannot_have(name, dials, asked, message):
    config, forms = family(name, **dials)
    with pytest.raises(ValueError, match=message):
        layout_of(config, Forms(**{**vars(forms), **asked}))


def test_other_models_keep_their_forms():
    config = ModelConfig(29, 64, 1)
    assert legal_forms(config)["embedding"] == ("f32", "bf16", "int8")
    with pytest.raises(ValueError, match="embedding form 'f16' is unknown"):
        Forms.of(config, embedding="f16")


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        *(
            (name, tensor, value, "(must be above 0, found|holds a value that is not finite)")
            for value in (np.nan, np.inf, 0.0, -1.0)
            for name, tensor in [
                ("bonsai", "layers.1.channel.down_proj.scale"),
                ("bonsai", "embedding.scale"),
                ("bitnet", "layers.0.channel.gate_proj.scale"),
                ("repack", "head.scale"),
            ]
        ),
        ("bonsai", "embedding.scale", 2e-8, "must be above 0, found 0.0"),  # 0 as a float16
        ("falcon", "head.weight", np.inf, "holds a value that is not finite"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, name, tensor, value, message):
    config, forms = family(name)
    arrays = random_arrays(config, forms)
    arrays[tensor].reshape(-1)[-1] = value
    with pytest.raises(ValueError, match=f"{tensor} {message}"):
        write_arrays(tmp_path / "m", config, forms, arrays)
    assert not list(tmp_path.iterdir())


def test_the_card_names_forms_and_heads(tmp_path):
    write_random(tmp_path / "m", *family("repack", num_kv_heads=2))
    card = (tmp_path / "m" / "README.md").read_text()
    for line in ("| key-value heads | 2 |", "| head | int8, one scale for 32 weights |"):
        assert line in card
    assert "| scales of groups | float16 |" in card
    said = json.loads((tmp_path / "m" / "config.json").read_text())["forms"]
    assert said == {"ternary": "2bit", "embedding": "int8-32", "head": "int8-32", "scale": "f16"}
