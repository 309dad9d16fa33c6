"""Published configs and names: every supported variant is right, every other one is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from model_files import PUBLISHED, write_json, write_published

from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.published import config_from_published, published_name


def test_the_recorded_checkpoint(tiny):
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.kind == "published"
    config = checkpoint.config
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (512, 128, 2)
    assert config.intermediate_size == 512
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert len(checkpoint.names()) == 35
    assert checkpoint.shape("layers.1.channel.gate_proj.weight") == (1024, 128)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("embedding.weight", "model.embeddings.weight"),
        ("lower_bounds", "model.lower_bounds"),
        ("layers.11.mixer.i_proj.norm.weight", "model.layers.11.attn.i_proj.norm.weight"),
        ("layers.0.mixer.g_norm.weight", "model.layers.0.attn.g_norm.weight"),
        ("layers.0.mixer_norm.weight", "model.layers.0.attn_norm.weight"),
        ("layers.3.channel.down_proj.weight", "model.layers.3.mlp.down_proj.weight"),
        ("layers.3.channel_norm.weight", "model.layers.3.mlp_norm.weight"),
        ("final_norm.weight", "model.norm.weight"),
        ("head.norm.weight", "lm_head.norm.weight"),
    ],
)
def test_names(name, published):
    assert published_name(name) == published


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"intermediate_size": None}, {"intermediate_size": 256}),
        ({"intermediate_size": None, "hidden_ratio": None}, {"intermediate_size": 256}),
        ({"intermediate_size": None, "hidden_ratio": 13}, {"intermediate_size": 512}),
        ({"intermediate_size": None, "hidden_ratio": 12.5}, {"intermediate_size": 512}),
        ({"intermediate_size": 72, "hidden_ratio": 8}, {"intermediate_size": 72}),
        ({"num_heads": 4}, {"num_heads": 4}),
        ({"use_lower_bound": False}, {"use_lower_bound": False}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"hidden_act": "silu", "expand_ratio": 1.0}, {}),
        ({"eos_token_id": [7, 2]}, {"eos_token_id": (7, 2), "end_token_ids": (7, 2)}),
        ({"eos_token_id": [7]}, {"eos_token_id": 7, "end_token_ids": (7,)}),
        ({"eos_token_id": [-1]}, {"eos_token_id": None, "end_token_ids": ()}),
        ({"bos_token_id": [3, 1]}, {"bos_token_id": 3}),
        ({"pad_token_id": -1}, {"pad_token_id": None}),
        # The fused BitLinear's epsilon is a constant of the authors' code; g_norm's is not.
        (
            {"rms_norm_eps": 1e-5},
            {"norm_eps": 1e-5, "gate_norm_eps": 1e-5, "linear_norm_eps": 1e-6},
        ),
        ({}, {"norm_eps": 1e-6, "gate_norm_eps": 1e-6, "linear_norm_eps": 1e-6}),
        (
            {
                "transformers_version": "4.41.0",
                "torch_dtype": "bfloat16",
                "dtype": "float16",
                "use_cache": True,
                "auto_map": {"AutoConfig": "x.Y"},
                "architectures": ["HGRNBitForCausalLM"],
                "_name_or_path": "somewhere",
                "id2label": {"0": "LABEL_0"},
                "conv_size": 4,
                "share_conv_kernel": True,
                "fuse_cross_entropy": False,
                "rotary_embeddings": False,
            },
            {},
        ),
    ],
)
def test_options_that_are_understood(options, expected):
    config = config_from_published({**PUBLISHED, **options})
    for key, value in expected.items():
        assert getattr(config, key) == value, key


def test_absent_keys_take_the_authors_defaults():
    config = config_from_published({"model_type": "hgrn_bit"})
    assert config == ModelConfig(
        32000, 2048, 24, bos_token_id=1, eos_token_id=2, gate_norm_eps=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_short_conv": True}, "use_short_conv True is not supported; it must be False"),
        ({"expand_ratio": 2}, "expand_ratio 2 is not supported; it must be 1"),
        ({"attn_mode": "chunk"}, "attn_mode 'chunk' is not supported"),
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported; it must be 'swish' or 'silu'",
        ),
        ({"rotary_embeddings": True}, "rotary_embeddings True is not supported"),
        ({"quantization_config": {}}, "unknown published config key 'quantization_config'"),
        ({"rope_scaling": {"factor": 2}}, "unknown published config key 'rope_scaling'"),
        ({"attn": {"layers": [3]}}, "unknown published config key 'attn'"),
        ({"slidingWindow": 64}, "unknown published config key 'slidingWindow'"),
        ({"logit_scale": 0.5}, "'logit_scale': it may change what the model computes"),
        ({"model_type": "llama"}, "model_type 'llama' is not the published 'hgrn_bit'"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 32"),
        ({"hidden_ratio": "4"}, "hidden_ratio '4' must be a number above 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number, got 32.0"),
        ({"rms_norm_eps": -1}, "norm_eps -1 must be finite and above 0"),
    ],
)
def test_options_that_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        config_from_published({**PUBLISHED, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling": None, "attn": None, "use_qk_norm": False, "quantization_config": None},
        {"fuse_norm": True, "fuse_swiglu": True, "fuse_linear_cross_entropy": True},
        {"pretraining_tp": 1, "model_max_length": 4096, "use_l2warp": True, "unk_token_id": 0},
        {"use_short_conv": None, "expand_ratio": None, "hidden_act": None, "attn_mode": None},
        {"num_heads": None, "rms_norm_eps": None, "hidden_ratio": None, "use_lower_bound": None},
    ],
)
def test_keys_that_switch_nothing_on(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_published({**PUBLISHED, **options}) == config_from_published(PUBLISHED)


@pytest.mark.parametrize(
    "key",
    [
        *("use_cla", "yoco", "sink", "attentionSinks", "mscale", "use_mrope"),
        *(
            "softmax_temperature",
            "swiglu_limit",
            "use_dynamic_ntk",
            "use_logn",
            "compression_config",
        ),
    ],
)
def test_a_key_whose_words_are_of_the_mathematics_is_refused(key):
    with pytest.raises(ValueError, match=f"config key '{key}': it may change what the model"):
        config_from_published({**PUBLISHED, key: 1})


def test_a_key_that_nobody_knows_is_named_and_ignored(tmp_path, rng):
    values = {**PUBLISHED, "tuned_by": "a tool", "run_mark": True}
    with pytest.warns(UserWarning, match="ignored the unknown key 'run_mark', 'tuned_by'"):
        assert config_from_published(values) == config_from_published(PUBLISHED)
    write_published(tmp_path / "d", rng, tuned_by="a tool")
    with pytest.warns(UserWarning, match="'tuned_by'"):
        assert open_checkpoint(tmp_path / "d").ignored == ("tuned_by",)
    with pytest.warns(UserWarning, match="'tuned_by'"):
        result = pack(tmp_path / "d", tmp_path / "packed", check=False)
    assert result.ignored_keys == ("tuned_by",)


def test_a_directory_names_itself_in_the_refusal(tmp_path, rng):
    write_published(tmp_path, rng)
    write_json(tmp_path / "config.json", {**PUBLISHED, "use_short_conv": True})
    with pytest.raises(ValueError, match=f"{tmp_path}: use_short_conv True"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_lower_bound": False},
        {"num_heads": 4},
        {"intermediate_size": None, "hidden_ratio": 2},
        {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 61},
    ],
)
def test_every_tensor_is_found_under_our_name(tmp_path, rng, options):
    tensors = write_published(tmp_path, rng, **options)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(tensors)
    for name, values in tensors.items():
        assert checkpoint.shape(name) == values.shape
        np.testing.assert_array_equal(checkpoint.read(name), values)
        np.testing.assert_array_equal(np.concatenate(list(checkpoint.read_blocks(name))), values)
        np.testing.assert_array_equal(checkpoint.read(name, slice(1, 3)), values[1:3])


def test_lower_bounds_that_the_config_switches_off_are_ignored(tmp_path, rng):
    write_published(tmp_path, rng)
    write_json(tmp_path / "config.json", {**PUBLISHED, "use_lower_bound": False})
    checkpoint = open_checkpoint(tmp_path)
    assert "lower_bounds" not in checkpoint.names()
