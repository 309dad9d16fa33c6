"""Exports: what is read back is the model, scales rounded to float16.

What has no form is in test_export_refused.py, the second witnesses, llama.cpp and
transformers, in test_export_witnesses.py.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from gguf_models import write_gguf
from support.exported import EVERY, GROUPS, TENSOR, assert_same_model, computed, packed, trained
from support.published_lm import LLAMA, QWEN3, random_model, write_values

from nomatmul.convert import pack
from nomatmul.convert.export import export
from nomatmul.convert.exportable import ExportSource
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.files.safetensors import SafetensorsFile
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.quantise import fits_float16
from nomatmul.formats.rotary import RopeScaling

TYPES = {256: "TQ2_0", 128: "PQ2_0", 64: "Q2_0"}


@pytest.mark.filterwarnings("ignore:.*int8 activations")
@pytest.mark.parametrize("make", [trained, packed])
@pytest.mark.parametrize("name", EVERY)
def test_a_gguf_file_is_the_model(tmp_path, rng, make, name):
    config = EVERY[name]
    source = make(tmp_path / "source", config, rng)
    result = export(source, tmp_path / "x.gguf")
    assert result.type == TYPES.get(config.scale_group, "TQ2_0")
    file = GgufFile(tmp_path / "x.gguf")
    assert {t.type for n, t in file.tensors.items() if n.startswith("blk.") and len(t.shape) == 2} \
        == {result.type}  # fmt: skip
    assert_same_model(computed(tmp_path / "x.gguf"), computed(source), exact=False)
    again = open_checkpoint(tmp_path / "x.gguf").config
    for field in (
        "hidden_size",
        "num_kv_heads",
        "qk_norm",
        "rope_theta",
        "norm_eps",
        "eos_token_id",
    ):
        assert getattr(again, field) == getattr(config, field), field
    assert again.bos_token_id == 0


@pytest.mark.filterwarnings("ignore:.*int8 activations")
@pytest.mark.parametrize("make", [trained, packed])
@pytest.mark.parametrize("name", [*EVERY, "group 32"])
def test_unpacked_floats_are_the_model_and_pack_finds_it(tmp_path, rng, make, name):
    config = {**EVERY, "group 32": GROUPS[32]}[name]
    source = make(tmp_path / "source", config, rng)
    out = tmp_path / "out"
    result = export(source, out)
    wanted = computed(source)
    assert (result.to, result.family) == ("unpacked", "qwen3" if config.qk_norm else "llama")
    assert_same_model(computed(out), wanted)
    dtypes = {n: i.dtype for n, i in SafetensorsFile(out / "model.safetensors").infos.items()}
    assert {dtypes[n] for n, value in wanted.items() if isinstance(value, tuple)} == {"F16"}
    pack(out, tmp_path / "again", check=False)
    again = computed(tmp_path / "again")
    exact = {n for n, value in wanted.items() if isinstance(value, tuple) or value.ndim == 1}
    assert_same_model({n: again[n] for n in exact}, {n: wanted[n] for n in exact})
    found = PackedReader(tmp_path / "again").config
    assert found.scale_group == (config.scale_group or 256)
    assert found.bos_token_id == 0


def test_what_was_rounded_is_said(tmp_path, rng):
    source = trained(tmp_path / "source", GROUPS[256], rng)
    result = export(source, tmp_path / "x.gguf")
    scale = ExportSource(source).quantised(_first(source)).scale
    change = np.abs(scale.astype(np.float16).astype(np.float32) - scale) / scale
    assert change.max() <= result.scale_change <= 2**-11
    assert result.notes[0].startswith("scales of 14 matrices rounded to float16: by at most ")
    assert f"{result.scale_change:.2e}" in result.notes[0]
    assert "model.embed_tokens.weight: rounded to F16, by at most" in "".join(result.notes[1:])
    (tmp_path / "again").mkdir()
    exact = export(tmp_path / "x.gguf", tmp_path / "again" / "x.gguf")
    assert (exact.scale_change, exact.notes) == (0.0, [])
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "again" / "x.gguf").read_bytes()


def _first(path):
    return next(t for t in ExportSource(path).tensors.values() if "q_proj" in t.name)


@pytest.mark.parametrize(
    ("form", "type_name"), [("f32", "F32"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("f16", "F16")]
)
def test_forms_of_the_embedding(tmp_path, rng, form, type_name):
    source = trained(tmp_path / "source", GROUPS[128], rng)
    export(source, tmp_path / "x.gguf", embedding=form)
    file = GgufFile(tmp_path / "x.gguf")
    tensors = ExportSource(source).tensors
    for stored, name in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        assert file.tensors[f"{stored}.weight"].type == type_name
        wanted = np.concatenate(list(ExportSource(source).floats(tensors[f"{name}.weight"])))
        limit = {"f32": 0, "q8_0": np.abs(wanted).max() / 250, "bf16": 0.01, "f16": 1e-3}[form]
        assert np.abs(file.read(f"{stored}.weight") - wanted).max() <= limit


def test_int8_that_the_source_holds_stays_so(tmp_path, rng):
    path = tmp_path / "source.gguf"
    write_gguf(path, "llama", rng, kind="TQ2_0", outer="Q8_0")
    with pytest.warns(UserWarning, match="has no tokenizer"):
        result = export(path, tmp_path / "x.gguf")
    assert (result.type, result.notes) == ("TQ2_0", [])
    one, other = GgufFile(path), GgufFile(tmp_path / "x.gguf")
    assert {n: t.type for n, t in one.tensors.items()} == {
        n: t.type for n, t in other.tensors.items()
    }
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name), name)


def test_int8_rows_of_a_packed_model_become_blocks(tmp_path, rng):
    source = packed(tmp_path / "source", GROUPS[256], rng, embedding="int8")
    export(source, tmp_path / "x.gguf")
    file, reader = GgufFile(tmp_path / "x.gguf"), PackedReader(source)
    found = file.quantised("token_embd.weight")
    values, scale = reader.matrix("embedding")
    np.testing.assert_array_equal(found.read(slice(None)), values)
    np.testing.assert_allclose(found.scale, np.repeat(scale[:, None], 8, axis=1), rtol=2**-11)


def test_a_dense_model_goes_too(tmp_path, rng):
    config = dataclasses.replace(TENSOR, linear="dense", linear_norm="all", rounding="away",
                                 split_gate=False, num_kv_heads=None)  # fmt: skip
    source = trained(tmp_path / "source", config, rng)
    result = export(source, tmp_path / "x.gguf")
    assert result.type == ""
    wanted = computed(source)
    assert_same_model(computed(tmp_path / "x.gguf"), wanted, exact=False)
    export(source, tmp_path / "out")
    assert_same_model(computed(tmp_path / "out"), wanted)


ROTARY = {
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    "linear": RopeScaling("linear", 4.0),
    "yarn": RopeScaling("yarn", 4.0, original_max_position_embeddings=32),
    "yarn, more": RopeScaling(
        "yarn", 4.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0,
        attention_factor=1.25,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_scaling_goes_along(tmp_path, rng, name):
    config = dataclasses.replace(GROUPS[128], rope_scaling=ROTARY[name])
    source = trained(tmp_path / "source", config, rng)
    for out in ("x.gguf", "out"):
        export(source, tmp_path / out)
        found = open_checkpoint(tmp_path / out).config.rope_scaling
        assert dataclasses.replace(found, attention_factor=None) == dataclasses.replace(
            ROTARY[name], attention_factor=None
        )
        if (factor := ROTARY[name].attention_factor) is not None:
            assert found.attention_factor == pytest.approx(factor, rel=1e-6)


def test_text_and_sampling_go_along(tmp_path, rng):
    source = trained(tmp_path / "source", GROUPS[128], rng)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    (source / "generation_config.json").write_text('{"temperature": 0.5}', "utf-8")
    export(source, tmp_path / "out")
    export(source, tmp_path / "x.gguf")
    assert (tmp_path / "out" / "chat_template.jinja").read_text("utf-8") == (
        "{{ messages[0].content }}"
    )
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))
    assert said == {"temperature": 0.5, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    metadata = GgufFile(tmp_path / "x.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert metadata["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("target", ["x.gguf", "out"])
def test_int8_activations_are_warned_of(tmp_path, rng, target):
    source = trained(tmp_path / "source", TENSOR, rng)
    words = "llama.cpp computes with int8 for each 256" if target == "x.gguf" else "with floats"
    with pytest.warns(UserWarning, match=f"computes with int8 activations a token; .*{words}"):
        export(source, tmp_path / target)


def test_packed_is_what_pack_writes(tmp_path, rng):
    source = trained(tmp_path / "source", GROUPS[128], rng)
    result = export(source, tmp_path / "a", to="packed")
    pack(source, tmp_path / "b", check=False)
    assert (result.to, result.tokenizer) == ("packed", "copied")
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()


def test_a_published_model_whose_scales_are_floats(tmp_path, rng):
    """Bit for bit where float16 holds the scales; and the other way where they are too small."""
    source = write_values(tmp_path / "source", random_model(QWEN3, rng, group=32))
    result = export(source, tmp_path / "out")
    assert (result.notes, result.scale_change) == ([], 0.0)
    assert_same_model(computed(tmp_path / "out"), computed(source))
    small = random_model(LLAMA, rng)
    for name, (t, scale) in small.ternary.items():
        small.ternary[name] = t, (scale * np.float32(1e-7)).astype(np.float32)
    export(write_values(tmp_path / "small", small), tmp_path / "floats")
    checkpoint, again = open_checkpoint(tmp_path / "small"), open_checkpoint(tmp_path / "floats")
    for name in checkpoint.names():
        np.testing.assert_array_equal(again.read(name), checkpoint.read(name), name)
    assert not fits_float16(checkpoint.read("layers.0.mixer.q_proj.weight"))


@pytest.mark.filterwarnings("ignore:.*int8 activations")
def test_other_types_hold_coarser_scales_too(tmp_path, rng):
    source = trained(tmp_path / "source", TENSOR, rng)
    wanted = computed(source)
    for kind in ("pq2_0", "q2_0"):
        export(source, tmp_path / f"{kind}.gguf", type=kind)
        assert_same_model(computed(tmp_path / f"{kind}.gguf"), wanted, exact=False)
