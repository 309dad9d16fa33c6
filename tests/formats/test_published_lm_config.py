"""Configs of published decoders: what each key means, and what is refused by its name."""

from __future__ import annotations

import pytest
from support.published_lm import (
    BITNET,
    LLAMA,
    QWEN3,
    assert_holds,
    auto,
    quantised,
    random_model,
    write,
    write_config,
    write_masters,
    write_packed,
    write_unpacked,
    write_values,
)

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError


def test_a_config_without_its_key_is_never_dense(tmp_path, bitnet, llama, rng):
    for model, writer in ((bitnet, write_packed), (llama, write_packed)):
        directory = writer(tmp_path / model.values["model_type"], model, legacy=model is llama)
        (directory / "config.json").unlink()
        write_config(directory, model.values)
        with pytest.raises(
            FormatError, match=r"q_proj\.weight', but its config.json has no quanti"
        ):
            open_checkpoint(directory)
    write_config(write_unpacked(tmp_path / "unpacked", bitnet), bitnet.values)
    with pytest.raises(FormatError, match=r"weight_scale', but its config.json has no quantiz"):
        open_checkpoint(tmp_path / "unpacked")
    write_config(write_masters(tmp_path / "masters", bitnet, rng), bitnet.values)
    with pytest.raises(FormatError, match=r"is a BitNet model, but its config.json has no quant"):
        open_checkpoint(tmp_path / "masters")


def test_a_llama_that_says_it_is_a_bitnet(tmp_path, rng):
    """Without its key it may hold ternary values, but no masters, which would run as floats."""
    model = random_model({**LLAMA, "is_bitnet_config": True}, rng)
    write_values(tmp_path / "values", model)
    assert open_checkpoint(tmp_path / "values").config.scale_group == 32
    write_config(write_masters(tmp_path / "masters", model, rng), model.values)
    with pytest.raises(FormatError, match=r"is a BitNet model, but its config.json has no quant"):
        open_checkpoint(tmp_path / "masters")


@pytest.mark.parametrize("window", [None, 64, 100])
def test_mistral_without_a_window(tmp_path, rng, window):
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": window, "head_dim": None}
    mistral |= {"num_key_value_heads": None}
    model = random_model({**mistral, "num_key_value_heads": 4}, rng)
    checkpoint = assert_holds(write(tmp_path, mistral, {**model.floats, **model.weights()}), model)
    assert (checkpoint.config.kv_heads, checkpoint.config.head_size) == (4, 16)


@pytest.mark.parametrize("window", [{}, {"sliding_window": 63}, {"sliding_window": "long"}])
def test_mistral_with_a_window(tmp_path, llama, window):
    write_values(tmp_path, llama)
    write_config(tmp_path, {**llama.values, "model_type": "mistral", **window})
    found = window.get("sliding_window", 4096)
    if found == 4096:  # where nothing says otherwise; the model's longest text is shorter
        open_checkpoint(tmp_path)
        long = {"max_position_embeddings": 8192}
        write_config(tmp_path, {**llama.values, "model_type": "mistral", **long})
    with pytest.raises(FormatError, match=rf"sliding_window {found!r} is shorter than max_pos"):
        open_checkpoint(tmp_path)


def test_mistral_that_leaves_its_longest_text_out(tmp_path, llama):
    """It is then that of transformers' class."""
    write_values(tmp_path, llama)
    values = {k: v for k, v in llama.values.items() if k != "max_position_embeddings"}
    for longest in ({}, {"max_position_embeddings": None}):
        mistral = {**values, **longest, "model_type": "mistral"}
        write_config(tmp_path, {**mistral, "sliding_window": 131072})
        assert open_checkpoint(tmp_path).config.max_position_embeddings == 131072
        write_config(tmp_path, {**mistral, "sliding_window": 4096})
        with pytest.raises(FormatError, match="4096 is shorter than max_position_embeddings 13"):
            open_checkpoint(tmp_path)


def test_layers_that_are_all_of_one_kind(tmp_path, llama):
    write_values(tmp_path, llama)
    plain = open_checkpoint(tmp_path).config
    write_config(tmp_path, {**llama.values, "layer_types": ["full_attention"] * 2})
    assert open_checkpoint(tmp_path).config == plain
    write_config(tmp_path, {**llama.values, "layer_types": ["full_attention", "chunked_attention"]})
    with pytest.raises(FormatError, match=r"layer_types holds 'chunked_attention'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3 does not divide"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is unknown"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"num_experts": 8}, "config key 'num_experts'"),
        ({"scale_emb": 12}, "config key 'scale_emb'"),
        ({"logits_soft_cap": 30.0}, "config key 'logits_soft_cap'"),
        ({"use_mup": True}, "config key 'use_mup'"),
        ({"bitnet": True}, "config key 'bitnet'"),
        ({"is_causal": False}, "is_causal False is not supported; it must be True"),
        ({"use_rope": False}, "use_rope False is not supported"),
        ({"prism.hadamard.size": 128}, r"config key 'prism\.hadamard\.size'"),
        ({"sliding_window": 128}, "config key 'sliding_window'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers 2\.5 must be a whole number"),
        ({"head_dim": "wide"}, "head_dim"),
        ({"rms_norm_eps": "small"}, "norm_eps"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"quantization_config": {"quant_method": "bitnet", "bits": 3}}, "bits 3 is not supported"),
        ({"quantization_config": {"quant_method": "bitnet", "zero": 1}}, "unknown key 'zero'"),
    ],
)
def test_options_that_are_not_computed(tmp_path, llama, options, message):
    write_values(tmp_path, llama)
    write_config(tmp_path, {**llama.values, **options})
    with pytest.raises(FormatError, match=message) as found:
        open_checkpoint(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "in use from"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
    ],
)
def test_windows_in_use(tmp_path, rng, options, message):
    model = random_model(QWEN3, rng, group=32)
    write_values(tmp_path, model)
    write_config(tmp_path, {**QWEN3, **options})
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)
    idle = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    write_config(tmp_path, {**QWEN3, **idle, "layer_types": ["full_attention"] * 2})
    assert open_checkpoint(tmp_path).config.scale_group == 32


@pytest.mark.parametrize(
    "model_type", ["qwen3_5", "qwen3_moe", "minicpm", "gemma3_text", "mixtral", "qwen2"]
)
def test_families_of_another_shape(tmp_path, llama, model_type):
    write_values(tmp_path, llama)
    write_config(tmp_path, {**llama.values, "model_type": model_type})
    with pytest.raises(FormatError, match=f"model_type '{model_type}' is not supported yet"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["lm_head", "model.layers.1.mlp"], r"leaves out 'model\.layers\.1\.mlp\.gate_proj'"),
        (["lm_head", "q_proj"], r"leaves out 'model\.layers\.0\.self_attn\.q_proj'"),
        (["lm_head", r"model.layers.*.mlp.down_proj"], r"leaves out '.*down_proj'"),
        ([], "does not name 'lm_head'"),
        ("lm_head", "must be a list of names"),
        (["lm_head", "(a+)+$"], "is not understood"),
    ],
)
def test_modules_that_are_left_out(tmp_path, llama, modules, message):
    write_packed(tmp_path, llama, legacy=True, modules_to_not_convert=modules)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_modules_that_are_no_linears_of_a_block(tmp_path, llama):
    write_packed(tmp_path, llama, legacy=True, modules_to_not_convert=["lm_head", "mlp.gate"])
    assert open_checkpoint(tmp_path).config.linear == "ternary"


def test_rotary_scalings(tmp_path, rng):
    model = random_model(QWEN3, rng, group=32)
    write_values(tmp_path, model)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for values in ({"rope_scaling": yarn}, {"rope_parameters": {**yarn, "rope_theta": 500.0}}):
        write_config(tmp_path, {**QWEN3, **values})
        config = open_checkpoint(tmp_path).config
        assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("yarn", 4.0)
    assert config.rope_theta == 500.0
    write_config(
        tmp_path, {**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    )
    config = open_checkpoint(tmp_path).config
    assert (config.rope_scaling, config.rope_theta) == (None, 7.0)


def test_keys_that_change_nothing_are_named(tmp_path, llama):
    write_values(tmp_path, llama)
    write_config(tmp_path, {**llama.values, "pretraining_tp": 1, "made_by": "a tool"})
    with pytest.warns(UserWarning, match="ignored the unknown key 'made_by'"):
        checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.ignored == ("made_by",)


ODD = [None, [], {}, "x", "", -1, 0, 1.5, True, 10**30, float("nan"), [1, "a"], {"rope_type": 3}]


def test_any_value_of_a_key_is_read_or_refused_in_one_line(tmp_path, rng):
    model = random_model(QWEN3, rng, group=32)
    write_values(tmp_path / "values", model)
    packed = write_packed(tmp_path / "packed", random_model(LLAMA, rng), legacy=True)
    more = (
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "use_sliding_window",
        "attention_bias",
    )
    more += ("sliding_window", "max_window_layers", "initializer_range", "pad_token_id")
    options = ("quant_method", "linear_class", "quantization_mode", "modules_to_not_convert")
    options += ("use_rms_norm", "rms_norm_eps", "bits")
    cases = [(tmp_path / "values", {**QWEN3, key: odd}) for key in (*QWEN3, *more) for odd in ODD]
    cases += [(packed, quantised(model, **{key: odd})) for key in options for odd in ODD]
    said = []
    for directory, values in cases:
        write_config(directory, values)
        try:
            open_checkpoint(directory)
        except FormatError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not [line for line in said if "\n" in line]


def test_heads_of_keys_that_the_config_leaves_out(tmp_path, rng):
    """null: as many as heads; absent: what the family's configuration class says."""
    full = {**QWEN3, "num_key_value_heads": 4}
    write_values(tmp_path / "null", random_model(full, rng, group=32))
    write_config(tmp_path / "null", {**full, "num_key_value_heads": None})
    assert open_checkpoint(tmp_path / "null").config.num_kv_heads is None
    five = {**BITNET, "num_attention_heads": 10, "hidden_size": 80, "num_key_value_heads": 5}
    directory = write_masters(tmp_path / "absent", random_model(five, rng), rng)
    values = quantised(random_model(five, rng), **auto("online"))
    write_config(directory, {k: v for k, v in values.items() if k != "num_key_value_heads"})
    assert open_checkpoint(directory).config.num_kv_heads == 5
