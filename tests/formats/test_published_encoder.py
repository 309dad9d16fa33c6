"""Published crammedBERT configs and tensors: every supported variant, every other one refused."""

from __future__ import annotations

import warnings

import crammed
import numpy as np
import pytest

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.published.crammed_bert import encoder_from_published
from nomatmul.formats.published.crammed_bert_source import published_encoder_name


def test_the_recorded_checkpoint(crammed_tiny):
    checkpoint = open_checkpoint(crammed_tiny)
    assert checkpoint.kind == "published"
    assert checkpoint.config == ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        token_mixer="attention",
        channel_mixer="fff",
        linear="dense",
        causal=False,
        num_heads=4,
        max_position_embeddings=64,
        norm="layer",
        norm_eps=1e-12,
        positions="sinusoidal",
        embedding_norm=True,
        tie_embeddings=True,
        pad_token_id=0,
        fff_trees=1,
        fff_depth=4,
        fff_bias=True,
    )
    assert checkpoint.shape("layers.1.channel.w_out") == (31, 64)
    assert checkpoint.reading.task == "masked"
    assert checkpoint.reading.labels == ()
    assert checkpoint.reading.head.pooler_size == 1024


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("embedding.weight", "encoder.embedding.word_embedding.weight"),
        ("position_scale", "encoder.embedding.pos_embedding.scale_factor"),
        ("embedding_norm.bias", "encoder.embedding.norm.bias"),
        (
            "layers.11.mixer.k_proj.weight",
            "encoder.layers.11.attn.self_attention.query_key_value.weight",
        ),
        ("layers.0.mixer.o_proj.weight", "encoder.layers.0.attn.dense.weight"),
        ("layers.0.mixer_norm.weight", "encoder.layers.0.norm1.weight"),
        ("layers.0.channel_norm.bias", "encoder.layers.0.norm2.bias"),
        ("layers.3.channel.bias", "encoder.layers.3.ffn.linear_in.bias"),
        ("layers.3.channel.w_out", "encoder.layers.3.ffn.linear_out.weight"),
        ("layers.3.channel.down_proj.weight", "encoder.layers.3.ffn.dense_out.weight"),
        ("final_norm.weight", "encoder.final_norm.weight"),
        ("pooler.bias", "pooler.dense.bias"),
        ("classifier.weight", "head.weight"),
    ],
)
def test_names(name, published):
    assert published_encoder_name(name) == published


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"fff_trees": 3, "fff_depth": 2, "fff_bias": True, "activation": "gelu"}),
        # names such as 128x4: 128 trees, deepest level 4; 1x11 is one tree of 4095 nodes
        ({"intermed_size": 128, "intermed_depth": 4}, {"fff_trees": 128, "fff_depth": 4}),
        ({"intermed_size": 1, "intermed_depth": 11}, {"fff_trees": 1, "fff_depth": 11}),
        ({"nonlin": "ReLU"}, {"activation": "relu"}),
        (crammed.VARIANTS["dense"], {"channel_mixer": "ffn", "intermediate_size": 20}),
        (crammed.VARIANTS["dense silu"], {"channel_mixer": "ffn", "activation": "silu"}),
        (crammed.VARIANTS["glu"], {"channel_mixer": "glu", "intermediate_size": 10}),
        (crammed.VARIANTS["glu"], {"glu_activation": "silu", "activation": "gelu"}),
        (crammed.VARIANTS["gelu glu"], {"channel_mixer": "glu", "glu_activation": "gelu"}),
        (crammed.VARIANTS["glu"] | {"nonlin": "ReLUglu"}, {"glu_activation": "relu"}),
        ({"embedding.pos_embedding": None}, {"positions": "none"}),
        ({"embedding.normalization": False}, {"embedding_norm": False}),
        ({"norm_eps": 1e-5}, {"norm_eps": 1e-5}),
        ({"init.std": 0.01}, {"initializer_range": 0.01}),
        ({"init.type": "wang"}, {"initializer_range": 0.02}),
        ({"attention.seq_op_in_fp32": True}, {}),
        ({"embedding.stable_low_precision": True}, {}),
    ],
)
def test_options_that_are_translated(changes, expected):
    config, _ = encoder_from_published(crammed.config(changes))
    assert {name: getattr(config, name) for name in expected} == expected


def test_tree_nodes_are_those_of_the_authors():
    config, _ = encoder_from_published(crammed.config({"intermed_depth": 11, "intermed_size": 1}))
    assert {trees.nodes for trees in architecture_of(config).trees().values()} == {4095}


def test_the_head_of_a_masked_model_is_still_to_be_trained():
    _, head = encoder_from_published(crammed.config({"classification_head.nonlin": "GELUglu"}))
    assert (head.pooler, head.pooler_size, head.pooler_activation) == ("avg", 12, "gelu")
    assert not head.pool_padding
    _, head = encoder_from_published(
        crammed.config({"classification_head.include_ff_layer": False})
    )
    assert head.pooler_size is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.type": "flash"}, r"arch.attention.type 'flash' is not supported"),
        ({"attention.type": "fourier"}, r"it must be 'self-attention'"),
        ({"attention.rotary_embedding": True}, r"arch.attention.rotary_embedding True"),
        ({"attention.rotary_embedding": "llama"}, r"arch.attention.rotary_embedding 'llama'"),
        ({"attention.causal_attention": True}, r"arch.attention.causal_attention True"),
        ({"attention.qkv_bias": True}, r"arch.attention.qkv_bias True"),
        ({"attention.sequence_op": "cumsum"}, r"arch.attention.sequence_op 'cumsum'"),
        ({"attention.skip_output_projection": True}, r"skip_output_projection True"),
        ({"norm_scheme": "post"}, r"arch.norm_scheme 'post' is not supported"),
        ({"norm": "ScaleNorm"}, r"arch.norm 'ScaleNorm' is not supported"),
        ({"final_norm": False}, r"arch.final_norm False"),
        ({"use_bias": True}, r"arch.use_bias True"),
        ({"decoder_bias": True}, r"arch.decoder_bias True"),
        ({"tie_weights": False}, r"arch.tie_weights False"),
        ({"skip_head_transform": False}, r"arch.skip_head_transform False"),
        ({"objective_layout": "SCRIPT"}, r"arch.objective_layout 'SCRIPT'"),
        ({"ffn_layer_frequency": 2}, r"arch.ffn_layer_frequency 2"),
        ({"architectures": ["ScriptableFunnelLM"]}, r"ScriptableFunnelLM"),
        ({"nonlin": "Mish"}, r"arch.nonlin 'Mish' is not supported"),
        ({"intermed_type": "ff", "nonlin": "Mishglu"}, r"arch.nonlin 'Mishglu' is not supported"),
        ({"nonlin": "GELUglu"}, r"arch.nonlin 'GELUglu' is not supported in an 'fff'"),
        ({"nonlin": "SiLUglu"}, r"arch.nonlin 'SiLUglu' is not supported in an 'fff'"),
        ({"intermed_type": "moe"}, r"arch.intermed_type 'moe' is not supported"),
        ({"intermed_type": "ff", "nonlin": "SiLUglu", "intermed_size": 7}, r"even number"),
        ({"intermed_depth": None}, r"fff_depth must be a whole number, got None"),
        ({"intermed_depth": 40}, r"fff_depth 40 is out of range"),
        ({"intermed_size": 0}, r"fff_trees 0 is out of range"),
        ({"embedding.pos_embedding": "learned"}, r"arch.embedding.pos_embedding 'learned'"),
        ({"embedding.embedding_dim": 8}, r"arch.embedding.embedding_dim 8 is not supported"),
        ({"attention.num_attention_heads": 3}, r"num_heads 3 does not divide"),
        ({"classification_head.pooler": "median"}, r"pooler 'median' is unknown"),
        ({"classification_head.nonlin": "Mish"}, r"pooler_activation 'mish' is unknown"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout 1.5 must be"),
        ({"attention.window": 5}, r"unknown published config key 'arch.attention.window'"),
        ({"surprise": 1}, r"unknown published config key 'arch.surprise'"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        encoder_from_published(crammed.config(changes))


def test_keys_that_switch_nothing_on_or_nobody_knows():
    plain = encoder_from_published(crammed.config())
    nothing = {"attention.window": None, "rotary": False, "norm_scheme": None}
    top = {"rope_scaling": None, "quantization_config": None, "model_max_length": 512}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder_from_published(crammed.config(nothing, **top)) == plain
    with pytest.warns(UserWarning, match="'tuned_by'"):
        assert encoder_from_published(crammed.config(tuned_by="a tool")) == plain


def test_a_config_without_its_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs the object 'arch'"):
        encoder_from_published({"model_type": "crammedBERT"})
    values = crammed.config()
    del values["arch"]["norm_eps"]
    with pytest.raises(ValueError, match=r"lacks 'arch.norm_eps'"):
        encoder_from_published(values)
    with pytest.raises(ValueError, match="unknown published config key 'sparse'"):
        encoder_from_published(crammed.config(sparse=True))
    values = crammed.config(architectures=["ScriptableLMForSCRIPTTraining"])
    directory = crammed.write(tmp_path, values, crammed.tensors(values))
    with pytest.raises(ValueError, match=r"ScriptableLMForSCRIPTTraining.*is unknown"):
        open_checkpoint(directory)


def test_fused_and_turned_matrices(tmp_path):
    values = crammed.config()
    stored = crammed.tensors(values)
    checkpoint = open_checkpoint(crammed.write(tmp_path / "trees", values, stored))
    fused = stored["encoder.layers.1.attn.self_attention.query_key_value.weight"]
    # two heads of eight: rows 0..7 are q of head 0, then its k, its v, then q of head 1
    k = checkpoint.read("layers.1.mixer.k_proj.weight")
    assert np.array_equal(k, np.concatenate([fused[8:16], fused[32:40]]))
    rows = checkpoint.read("layers.1.mixer.v_proj.weight", slice(6, 10))
    assert np.array_equal(rows, np.concatenate([fused[22:24], fused[40:42]]))
    w_out = checkpoint.read("layers.0.channel.w_out")
    assert w_out.shape == (21, 16)
    assert np.array_equal(w_out, stored["encoder.layers.0.ffn.linear_out.weight"].T)

    values = crammed.config(crammed.VARIANTS["glu"])
    stored = crammed.tensors(values)
    checkpoint = open_checkpoint(crammed.write(tmp_path / "glu", values, stored))
    theirs = stored["encoder.layers.0.ffn.dense_in.weight"]
    gate_first = np.concatenate([theirs[10:], theirs[:10]])
    assert np.array_equal(checkpoint.read("layers.0.channel.gate_proj.weight"), gate_first)


@pytest.mark.parametrize("pickled", [False, pytest.param(True, marks=pytest.mark.train)])
def test_stored_forms(tmp_path, pickled):
    """Safetensors or a pickle; a stored tied head; names of the bare encoder; 16-bit values."""
    values = crammed.config()
    stored = crammed.tensors(values)
    plain = open_checkpoint(crammed.write(tmp_path / "plain", values, stored, pickled))
    tied = {**stored, "decoder.weight": stored["encoder.embedding.word_embedding.weight"].copy()}
    other = open_checkpoint(crammed.write(tmp_path / "tied", values, tied, pickled))
    bare = {name.removeprefix("encoder."): value for name, value in stored.items()}
    values["architectures"] = ["ScriptableLM"]
    third = open_checkpoint(crammed.write(tmp_path / "bare", values, bare, pickled))
    half = {name: value.astype(np.float16) for name, value in stored.items()}
    fourth = open_checkpoint(crammed.write(tmp_path / "half", values, half, pickled))
    assert plain.names() == other.names() == third.names() == fourth.names()
    for name in plain.names():
        assert np.array_equal(plain.read(name), other.read(name))
        assert np.array_equal(plain.read(name), third.read(name))
        assert np.array_equal(plain.read(name).astype(np.float16), fourth.read(name))


def test_an_embedding_stored_as_the_decoder_only(tmp_path):
    """Of two tied names some savers keep only this one; the authors' loader knows such files."""
    values = crammed.config()
    stored = crammed.tensors(values)
    embedding = stored.pop("encoder.embedding.word_embedding.weight")
    stored["decoder.weight"] = embedding
    checkpoint = open_checkpoint(crammed.write(tmp_path / "tied", values, stored))
    assert np.array_equal(checkpoint.read("embedding.weight"), embedding)
    stored["decoder.weight"] = embedding[:-1]
    with pytest.raises(ValueError, match=r"'decoder.weight' has shape \[47, 16\]"):
        open_checkpoint(crammed.write(tmp_path / "short", values, stored))


def _damage(change):
    values = crammed.config()
    stored = crammed.tensors(values)
    change(stored)
    return values, stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.final_norm.bias"), "lacks the tensor 'encoder.final_norm.bias'"),
        (
            lambda t: t.update({"encoder.layers.0.ffn.linear_in.bias": np.zeros(15, np.float32)}),
            r"linear_in.bias' has shape \[15\], the config asks for \[21\]",
        ),
        (
            lambda t: t.update(
                {"encoder.layers.1.ffn.linear_out.weight": np.zeros((21, 16), np.float32)}
            ),
            r"linear_out.weight' has shape \[21, 16\], the config asks for \[16, 21\]",
        ),
        (lambda t: t.update({"encoder.more": np.zeros(3, np.float32)}), "'encoder.more' is unkn"),
        (
            lambda t: t.update({"decoder.weight": np.zeros((48, 16), np.float32)}),
            "'decoder.weight' differs from the embedding",
        ),
        (
            lambda t: t.update(
                {"encoder.layers.0.attn.self_attention.norm_factor": np.array(0.5, np.float32)}
            ),
            r"norm_factor' is 0.5; the number of heads asks for 0.353553",
        ),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, change, message):
    crammed.write(tmp_path, *_damage(change))
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path):
    def change(stored):
        stored["encoder.layers.0.attn.self_attention.query_key_value.weight"][3, 3] = np.nan

    checkpoint = open_checkpoint(crammed.write(tmp_path, *_damage(change)))
    with pytest.raises(ValueError, match="query_key_value"):
        checkpoint.read("layers.0.mixer.q_proj.weight")


def test_a_published_classifier(tmp_path):
    values = crammed.config()
    stored = crammed.tensors(values)
    crammed.add_classifier(values, stored, labels=3)
    values["id2label"] = {"0": "no", "1": "maybe", "2": "yes"}
    checkpoint = open_checkpoint(crammed.write(tmp_path, values, stored))
    assert checkpoint.reading.task == "sequence"
    assert checkpoint.reading.labels == ("no", "maybe", "yes")
    assert checkpoint.reading.head.pool_padding
    assert checkpoint.shape("pooler.weight") == (12, 16)
    assert np.array_equal(checkpoint.read("classifier.weight"), stored["head.weight"])
    values["id2label"] = {"0": "no", "2": "yes"}
    crammed.write(tmp_path, values, stored)
    with pytest.raises(ValueError, match=r"must name the labels 0..1"):
        open_checkpoint(tmp_path)
