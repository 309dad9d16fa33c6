"""Tensors of published decoders that do not fit: what is wrong is named in one line."""

from __future__ import annotations

import numpy as np
import pytest
from support.published_lm import (
    QWEN3,
    assert_holds,
    auto,
    quantised,
    random_model,
    write,
    write_packed,
    write_values,
)

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError


def test_one_matrix_that_is_not_ternary(tmp_path, rng):
    model = random_model(QWEN3, rng, group=32)
    name = "model.layers.1.self_attn.o_proj"
    weights = model.weights()
    weights[f"{name}.weight"][5, 64] *= np.float32(0.5)
    share = 100 / weights[f"{name}.weight"].size
    write(tmp_path, model.values, {**model.floats, **weights})
    with pytest.raises(FormatError, match=rf"{name}\.weight' is not ternary, .*: {share:.3g} %"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "share"), [(lambda w: w[3:4, 5:6], r"0\.0122"), (lambda w: w[:, 1::2], "3[0-9]")]
)
def test_a_model_that_is_nearly_ternary_is_not_dense(tmp_path, rng, change, share):
    """One value in each matrix, or the last bits of half of them."""
    model = random_model({**QWEN3, "num_hidden_layers": 1}, rng, group=32)
    tensors = {**model.floats, **model.weights()}
    for name in model.ternary:
        part = change(tensors[f"{name}.weight"])
        part *= np.float32(1.0009)
        part[part == 0] = 0.001 if part.size == 1 else 0
    write(tmp_path, model.values, tensors)
    with pytest.raises(FormatError, match=f"q_proj.weight' is nearly ternary: {share}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((0, 64), np.float32), r"up_proj.weight' has shape \[0, 64\]"),
        (np.zeros((96, 64, 1), np.float32), r"up_proj.weight' has shape \[96, 64, 1\]"),
        (np.zeros((96, 64), np.int32), "up_proj.weight has dtype I32, expected a float"),
    ],
)
def test_one_matrix_that_is_none(tmp_path, rng, wrong, message):
    """Its shape or type is named, no share of stray values."""
    model = random_model(QWEN3, rng, group=32)
    tensors = {**model.floats, **model.weights(), "model.layers.1.mlp.up_proj.weight": wrong}
    write(tmp_path, model.values, tensors)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_rows_that_no_group_divides(tmp_path, rng):
    model = random_model({**QWEN3, "intermediate_size": 80}, rng)
    write_values(tmp_path, model)
    with pytest.raises(FormatError, match=r"down_proj\.weight' is ternary with rows of 80 inputs"):
        open_checkpoint(tmp_path)


def spoiled(model, name, change):
    tensors = dict(model.floats)
    for linear, (t, scale) in model.ternary.items():
        tensors[f"{linear}.weight"] = t.astype(np.float32)
        tensors[f"{linear}.weight_scale"] = scale[0].copy()
    value = change(tensors.pop(name))
    return tensors if value is None else {**tensors, name: value}


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{Q}.weight_scale", lambda s: None, r"lacks the tensor '.*q_proj\.weight_scale'"),
        (f"{Q}.weight_scale", lambda s: s * np.nan, "not finite"),
        (f"{Q}.weight_scale", lambda s: s * np.inf, "not finite"),
        (f"{Q}.weight_scale", lambda s: s * 0, r"weight_scale' is 0\.0; a scale is above 0"),
        (f"{Q}.weight_scale", lambda s: -s, r"weight_scale' is -0\.\d+; a scale is above 0"),
        (f"{Q}.weight_scale", lambda s: np.repeat(s, 64), r"has shape \[64\]; it must be one"),
        (f"{Q}.weight", lambda w: w[:-4], r"q_proj\.weight' has shape \[60, 64\]"),
        (f"{Q}.weight", lambda w: None, r"lacks the tensor '.*q_proj\.weight'"),
        (f"{Q}.weight", lambda w: w[:16].astype(np.int8), r"has shape \[16, 64\] \(I8\)"),
        ("model.norm.weight", lambda w: w[:-1], r"model\.norm\.weight' has shape \[63\]"),
        ("model.norm.weight", lambda w: None, "lacks the tensor 'model.norm.weight'"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, bitnet, name, change, message):
    write(tmp_path, quantised(bitnet, **auto("offline")), spoiled(bitnet, name, change))
    with pytest.raises(FormatError, match=message) as found:
        open_checkpoint(tmp_path)
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)


def test_unknown_tensors(tmp_path, bitnet):
    tensors = spoiled(bitnet, f"{Q}.weight", lambda w: w)
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    write(tmp_path, quantised(bitnet, **auto("offline")), {**tensors, **extra})
    with pytest.raises(FormatError, match=r"unknown tensor '.*q_proj\.bias'"):
        open_checkpoint(tmp_path)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write(tmp_path, quantised(bitnet, **auto("offline")), {**tensors, **table})
    assert open_checkpoint(tmp_path).config.linear_norm == "sub"


def test_values_and_codes_that_are_not_ternary(tmp_path, bitnet):
    def stray(w):
        w[9, 3] = 2
        return w

    tensors = spoiled(bitnet, f"{Q}.weight", stray)
    write(tmp_path, quantised(bitnet, **auto("offline")), tensors)
    with pytest.raises(
        FormatError, match=r"q_proj\.weight' lies beside a weight_scale but holds 2"
    ):
        open_checkpoint(tmp_path).read("layers.0.mixer.q_proj.weight")
    tensors[f"{Q}.weight"] = np.full((16, 64), 0b11, np.uint8)
    write(tmp_path, quantised(bitnet, **auto("offline")), tensors)
    with pytest.raises(FormatError, match=r"q_proj\.weight' holds the illegal code 3"):
        open_checkpoint(tmp_path).read("layers.0.mixer.q_proj.weight")


def test_a_tied_head_that_differs(tmp_path, bitnet):
    bitnet.floats["lm_head.weight"] = bitnet.floats["model.embed_tokens.weight"].copy()
    assert_holds(write_packed(tmp_path / "same", bitnet, legacy=False), bitnet)
    bitnet.floats["lm_head.weight"][3, 4] += 1
    write_packed(tmp_path / "other", bitnet, legacy=False)
    with pytest.raises(FormatError, match="ties the head to the embedding, but"):
        open_checkpoint(tmp_path / "other")


def test_an_untied_head_that_is_absent(tmp_path, llama):
    del llama.floats["lm_head.weight"]
    write_values(tmp_path, llama)
    with pytest.raises(FormatError, match=r"lacks the tensor 'lm_head\.weight'"):
        open_checkpoint(tmp_path)
