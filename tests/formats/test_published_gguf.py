"""GGUF models as published models: config, names, order of rows, and what is refused by name."""

from __future__ import annotations

import json
import re

import gguf
import gguf_models as models
import numpy as np
import pytest
from gguf_models import HEAD_SIZE, KV_HEADS, sizes, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.published.gguf import open_gguf, read_gguf
from nomatmul.formats.rotary import RopeScaling, frequencies

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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blk.0.attn_q.scale", [0.0], r"is 0\.0; it must be above 0"),
        ("blk.0.attn_q.scale", [1.0, 2.0], "which is not understood"),
        ("blk.0.attn_norm.scale", [1.0], "which is not understood"),
        ("blk.0.attn_q.input_scale", [1.0], "which is not understood"),
        ("output.scale", [1.0], "which is not understood"),
    ],
)
def test_factors_that_are_none(tmp_path, rng, name, value, message):
    def add(tensors):
        tensors[name] = np.array(value, np.float32)

    write_gguf(tmp_path / "x.gguf", "llama", rng, kind="TQ2_0", change=add)
    with pytest.raises(FormatError, match=rf"'{re.escape(name)}',? {message}"):
        open_gguf(tmp_path / "x.gguf")


def test_bitnet_keeps_scales_that_differ(tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", "bitnet-b1.58", rng, kind="TQ2_0", tied=True)
    assert open_gguf(tmp_path / "x.gguf")[1].quantised(K_PROJ).group == 256


def test_bitnet_in_floats_is_refused(tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", "bitnet-b1.58", rng, kind="F32", tied=True)
    with pytest.raises(FormatError, match=r"'blk\.0\.attn_q\.weight' is F32; it must be a ternary"):
        open_gguf(tmp_path / "x.gguf")


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


def scaling_of(tmp_path, rng, keys, change=lambda tensors: None):
    def all_keys(writer):
        sizes(writer)
        keys(writer)

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=all_keys, change=change)
    scaling = open_gguf(tmp_path / "x.gguf")[0]["rope_scaling"]
    RopeScaling.from_dict(scaling or {"rope_type": "default"})
    return scaling


def test_linear_rotary_scaling(tmp_path, rng):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert scaling_of(tmp_path, rng, keys) == {"rope_type": "linear", "factor": 4.0}


def test_no_rotary_scaling(tmp_path, rng):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    assert scaling_of(tmp_path, rng, keys) is None


def test_yarn(tmp_path, rng):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 16.0)

    assert scaling_of(tmp_path, rng, keys) == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
    }  # fmt: skip


def llama3_factors(factor, base=500000.0, low=1.0, high=4.0, original=8192):
    """The table that llama.cpp's converter writes."""
    found = []
    for freq in 1.0 / base ** (np.arange(0, HEAD_SIZE, 2, dtype=np.float32) / HEAD_SIZE):
        wave = 2 * np.pi / freq
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0, 1.0])
def test_a_table_of_llama3_is_recognised(tmp_path, rng, factor):
    table = llama3_factors(factor)

    def change(tensors):
        tensors["rope_freqs.weight"] = table

    scaling = scaling_of(tmp_path, rng, lambda writer: None, change)
    if factor == 1.0:
        assert scaling is None
        return
    assert scaling == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = frequencies(HEAD_SIZE, 500000.0)[0]
    scaled = frequencies(HEAD_SIZE, 500000.0, RopeScaling.from_dict(scaling))[0]
    np.testing.assert_allclose(plain / scaled, table, rtol=1e-5)


@pytest.mark.parametrize("table", [llama3_factors(8.0, original=4096), np.zeros(32, np.float32)])
def test_another_table_is_refused(tmp_path, rng, table):
    def change(tensors):
        tensors["rope_freqs.weight"] = table

    with pytest.raises(FormatError, match=r"rope_freqs\.weight"):
        scaling_of(tmp_path, rng, lambda writer: None, change)


OTHERS = ["qwen35", "qwen3moe", "gemma3", "minicpm", "llama4", "falcon"]


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_are_refused_by_name(tmp_path, rng, architecture):
    write_gguf(tmp_path / "x.gguf", architecture, rng)
    with pytest.raises(FormatError, match=f"has the architecture '{architecture}'; it must be one"):
        open_gguf(tmp_path / "x.gguf")


def add(key, value, kind):
    """Gives the key a value, whether `sizes` gave it one or not."""

    def change(writer):
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])

    return change


REFUSED_KEYS = {
    "rotation": (
        add("prism.hadamard.block_size", 1024, "UINT32"),
        r"'prism\.hadamard\.block_size': weights behind a Hadamard rotation",
    ),
    "experts": (add("llama.expert_count", 8, "UINT32"), r"llama\.expert_count is 8; it must be 0"),
    "window": (
        add("llama.attention.sliding_window", 512, "UINT32"),
        r"llama\.attention\.sliding_window is 512; it must be 0",
    ),
    "not causal": (add("llama.attention.causal", False, "BOOL"), "is False; it must be True"),
    "softcap": (
        add("llama.final_logit_softcapping", 30.0, "FLOAT32"),
        r"unknown metadata key 'llama\.final_logit_softcapping'",
    ),
    "multiplier": (add("llama.residual_scale", 0.2, "FLOAT32"), "llama.residual_scale"),
    "foreign": (add("other.attention.scale", 0.2, "FLOAT32"), r"other\.attention\.scale"),
    "adapter": (add("general.type", "adapter", "STRING"), "is of general.type 'adapter'"),
    "split": (add("split.count", 3, "UINT16"), "is one of 3 parts .* llama-gguf-split --merge"),
    "longrope": (
        add("llama.rope.scaling.type", "longrope", "STRING"),
        r"llama\.rope\.scaling\.type is 'longrope'; it must be",
    ),
    "partial rotary": (
        add("llama.rope.dimension_count", 32, "UINT32"),
        r"rope\.dimension_count is 32; it must be the head size 64",
    ),
    "values": (add("llama.attention.value_length", 32, "UINT32"), "it must be the head size 64"),
    "heads": (add("llama.attention.head_count", 3, "UINT32"), "3 heads do not divide"),
    "odd heads": (add("llama.attention.key_length", 63, "UINT32"), "heads of 63 elements cannot"),
    "no heads": (add("llama.attention.head_count", 0, "UINT32"), "head_count is 0; it must be"),
    "head words": (add("llama.attention.head_count", "4", "STRING"), "head_count is '4'; it must"),
    "eps": (
        add("llama.attention.layer_norm_rms_epsilon", float("nan"), "FLOAT32"),
        "layer_norm_rms_epsilon is nan; it must be a number above 0",
    ),
    "layers": (add("llama.block_count", 3, "UINT32"), r"lacks the tensor 'blk\.2\.attn_norm"),
    "many layers": (add("llama.block_count", 1 << 31, "UINT32"), r"lacks the tensor 'blk\.2\."),
    "few layers": (add("llama.block_count", 1, "UINT32"), r"has the tensor 'blk\.1\."),
    "vocabulary": (
        add("llama.vocab_size", 41, "UINT32"),
        r"'token_embd\.weight' has shape \[40, 256\], the metadata ask for \[41, 256\]",
    ),
    "inner": (
        add("llama.feed_forward_length", 256, "UINT32"),
        r"'blk\.0\.ffn_gate\.weight' has shape \[512, 256\], the metadata ask for \[256, 256\]",
    ),
    "kv heads": (
        add("llama.attention.head_count_kv", 1, "UINT32"),
        r"'blk\.0\.attn_k\.weight' has shape",
    ),
    "end": (add("tokenizer.ggml.eos_token_id", 40, "UINT32"), "eos_token_id is 40; the voc"),
}


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_keys_that_are_not_understood_are_refused_by_name(tmp_path, rng, name):
    change, message = REFUSED_KEYS[name]

    def keys(writer):
        sizes(writer)
        change(writer)

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=keys)
    with pytest.raises(FormatError, match=message) as caught:
        open_gguf(tmp_path / "x.gguf")
    assert len(str(caught.value).splitlines()) == 1


def test_per_layer_sizes_are_refused(tmp_path, rng):
    def keys(writer):
        sizes(writer)
        del writer.kv_data[0]["llama.attention.head_count"]
        writer.add_head_count([4, 2])

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=keys)
    with pytest.raises(FormatError, match=r"head_count is an array of 2; it must be one value"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "key",
    ["block_count", "context_length", "embedding_length", "attention.layer_norm_rms_epsilon"],
)
def test_a_missing_key_is_named(tmp_path, rng, key):
    def keys(writer):
        sizes(writer)
        del writer.kv_data[0][f"llama.{key}"]

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=keys)
    with pytest.raises(FormatError, match=rf"lacks the metadata key 'llama\.{key}'"):
        open_gguf(tmp_path / "x.gguf")


def test_a_tool_s_key_is_ignored_with_a_warning(tmp_path, rng):
    def keys(writer):
        sizes(writer)
        writer.add_string("acme.url", "here")

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=keys)
    with pytest.warns(UserWarning, match=r"ignored the unknown key 'acme\.url'"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.1.attn_k.weight", "blk.0.ffn_norm.weight"],
)
def test_a_missing_tensor_is_named(tmp_path, rng, name):
    write_gguf(tmp_path / "x.gguf", "qwen3", rng, change=lambda tensors: tensors.pop(name))
    with pytest.raises(FormatError, match=f"lacks the tensor '{name}'"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.0.attn_q.scale", "rope_factors_long.weight"]
)
def test_a_tensor_that_is_not_known_is_named(tmp_path, rng, name):
    def change(tensors):
        tensors[name] = np.ones(KV_HEADS, np.float32)

    write_gguf(tmp_path / "x.gguf", "qwen3", rng, change=change)
    with pytest.raises(FormatError, match=f"has the tensor '{name}', which is not understood"):
        open_gguf(tmp_path / "x.gguf")


def test_an_absent_tensor_is_named_when_it_is_read(tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", "qwen3", rng, tied=True)
    _, source = open_gguf(tmp_path / "x.gguf")
    for use in (source.read, source.quantised):
        with pytest.raises(FormatError, match=r"lacks the tensor 'lm_head\.weight'"):
            use("lm_head.weight")


@pytest.fixture(scope="module")
def metadata_and_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write_gguf(path, "llama", np.random.default_rng(0))
    file = GgufFile(path)
    return dict(file.metadata), file


ARRAYS = st.lists(st.integers(0, 255), max_size=3).map(np.array)
SCALARS = (st.integers(-9, 300), st.integers(0, 1 << 64), st.floats(), st.booleans(), st.text())
KEYS = (
    *("llama.block_count", "llama.attention.head_count", "llama.attention.key_length"),
    *("llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor"),
    *("llama.rope.scaling.attn_factor", "llama.x", "general.type", "split.count", "prism.x"),
    *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"),
)


@given(
    changes=st.dictionaries(
        st.sampled_from(KEYS),
        st.one_of(*SCALARS, ARRAYS, st.lists(st.text(max_size=3), max_size=3), st.none()),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:published config. ignored the unknown key")
def test_any_value_of_a_key_is_read_or_refused_in_one_line(metadata_and_file, changes):
    metadata, file = metadata_and_file
    file.metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    try:
        lines = json.dumps(read_gguf(file)[0]).splitlines()
    except FormatError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1


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
