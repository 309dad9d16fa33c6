"""GGUF models that are not understood: refused in one line, by the name of what is wrong."""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import pytest
from gguf_models import KV_HEADS, sizes, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.published.gguf import open_gguf, read_gguf


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


def test_bitnet_in_floats_is_refused(tmp_path, rng):
    write_gguf(tmp_path / "x.gguf", "bitnet-b1.58", rng, kind="F32", tied=True)
    with pytest.raises(FormatError, match=r"'blk\.0\.attn_q\.weight' is F32; it must be a ternary"):
        open_gguf(tmp_path / "x.gguf")


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
