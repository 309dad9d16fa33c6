"""Published decoders of Llama's shape: every form of their weights reads as the same matrices."""

from __future__ import annotations

import numpy as np
import pytest
from support.published_lm import (
    BITNET,
    LLAMA,
    QWEN3,
    auto,
    bfloat16,
    quantised,
    random_model,
    spread,
    write,
    write_masters,
    write_packed,
    write_unpacked,
    write_values,
)

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError

OURS = {
    "self_attn.q_proj": "mixer.q_proj",
    "self_attn.k_proj": "mixer.k_proj",
    "self_attn.v_proj": "mixer.v_proj",
    "self_attn.o_proj": "mixer.o_proj",
    "mlp.down_proj": "channel.down_proj",
}


def assert_holds(directory, model, matrices=None):
    """Every matrix as whole numbers with scales, every other tensor as it was written."""
    checkpoint = open_checkpoint(directory)
    weights = model.weights() if matrices is None else matrices
    for layer in range(model.values["num_hidden_layers"]):
        at, ours = f"model.layers.{layer}.", f"layers.{layer}."
        found = {ours + name: weights[f"{at}{key}.weight"] for key, name in OURS.items()}
        gate, up = (weights[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        if checkpoint.config.split_gate and checkpoint.config.linear_norm == "all":
            found |= {f"{ours}channel.gate_proj": gate, f"{ours}channel.up_proj": up}
        else:
            found[f"{ours}channel.gate_proj"] = np.concatenate([gate, up])
        for name, expected in found.items():
            held = checkpoint.quantised(f"{name}.weight")
            assert held.kind == "ternary"
            assert held.group == checkpoint.config.scale_group
            assert set(np.unique(held.read(slice(3, 40)))) <= {-1, 0, 1}
            np.testing.assert_array_equal(held.floats(), expected, err_msg=name)
            part = checkpoint.read(f"{name}.weight", slice(7, 41))
            np.testing.assert_array_equal(part, expected[7:41], err_msg=name)
    np.testing.assert_array_equal(
        checkpoint.read("final_norm.weight"), model.floats["model.norm.weight"]
    )
    return checkpoint


@pytest.fixture
def bitnet(rng):
    return random_model(BITNET, rng)


@pytest.fixture
def llama(rng):
    return random_model(LLAMA, rng)


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


@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_pruned_models_are_dense(tmp_path, rng, zeros):
    model = random_model({**QWEN3, "num_hidden_layers": 1}, rng)
    tensors = {**model.floats}
    for name, (t, _) in model.ternary.items():
        kept = rng.random(t.shape) >= zeros
        tensors[f"{name}.weight"] = (kept * rng.standard_normal(t.shape)).astype(np.float32)
    write(tmp_path, model.values, tensors)
    assert open_checkpoint(tmp_path).config.linear == "dense"


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


def test_layers_that_are_all_of_one_kind(tmp_path, llama):
    write_values(tmp_path, llama)
    plain = open_checkpoint(tmp_path).config
    write_config(tmp_path, {**llama.values, "layer_types": ["full_attention"] * 2})
    assert open_checkpoint(tmp_path).config == plain
    write_config(tmp_path, {**llama.values, "layer_types": ["full_attention", "chunked_attention"]})
    with pytest.raises(FormatError, match=r"layer_types holds 'chunked_attention'"):
        open_checkpoint(tmp_path)


def write_config(directory, values):
    from model_files import write_json

    write_json(directory / "config.json", values)


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
    from model_files import write_json
    from safetensors.numpy import load_file, save_file

    directory = write_packed(tmp_path, bitnet, legacy=False)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        names = sorted(tensors)[part::2]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    assert_holds(directory, bitnet)


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


def test_tables_that_follow_from_the_config(tmp_path, llama):
    tables = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
    for name in tables:
        llama.floats[f"model.layers.0.self_attn.rotary_emb.{name}"] = np.ones(12, np.float32)
    llama.floats["model.rotary_emb.inv_freq"] = np.ones(12, np.float32)
    write_values(tmp_path, llama)
    assert_holds(tmp_path, llama)
