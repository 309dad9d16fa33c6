"""Packing published ternary transformers: what comes quantised is kept exactly."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from gguf_models import write_gguf
from support.published_kinds import KINDS, bitnet, bonsai, falcon, values
from support.published_lm import LLAMA, QWEN3, bfloat16, random_model, write, write_values

from nomatmul import cli
from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.quantise import quantise_rows


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_ternary_matrices_are_kept(tmp_path, rng, kind, packing):
    source = kind(tmp_path / "source", rng)
    result = pack(source, tmp_path / "packed", packing=packing, check=False)
    checkpoint, reader = open_checkpoint(source), PackedReader(tmp_path / "packed")
    assert reader.config == checkpoint.config
    assert (result.packing, result.weights) == (packing, checkpoint.found.words)
    count = 0
    for name in checkpoint.names():
        held = checkpoint.quantised(name)
        if held is None:
            continue
        stored, scale = reader.matrix(name.removesuffix(".weight"))
        shape, group = stored.shape, checkpoint.config.scale_group
        packed = Quantised("ternary", shape, group, scale, lambda rows, s=stored: s[rows])
        np.testing.assert_array_equal(packed.floats(), held.floats(), err_msg=name)
        np.testing.assert_array_equal(packed.floats(), checkpoint.read(name), err_msg=name)
        count += 1
    assert count >= 12
    for name in ("final_norm.weight", "layers.1.mixer_norm.weight"):
        np.testing.assert_array_equal(reader.read(name), checkpoint.read(name))


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        (bitnet, {"ternary": "2bit", "head": "int8", "embedding": "bf16"}),
        (falcon, {"ternary": "2bit", "head": "int8", "embedding": "bf16"}),
        (bonsai, {"ternary": "2bit", "embedding": "2bit", "scale": "f16"}),
        (values, {"ternary": "2bit", "head": "int8", "embedding": "bf16", "scale": "f16"}),
    ],
)
def test_forms_that_are_chosen(tmp_path, rng, kind, forms):
    pack(kind(tmp_path / "source", rng), tmp_path / "packed", check=False)
    assert PackedReader(tmp_path / "packed").forms.to_dict() == forms


def test_scales_that_float16_cannot_hold(tmp_path, rng):
    model = random_model(QWEN3, rng, group=32)
    name = "model.layers.1.mlp.down_proj"
    model.ternary[name][1][5, 2] = 0.1
    source = write_values(tmp_path / "source", model)
    pack(source, tmp_path / "packed", check=False)
    reader = PackedReader(tmp_path / "packed")
    assert reader.forms.scale == "f32"
    _, scale = reader.matrix("layers.1.channel.down_proj")
    np.testing.assert_array_equal(scale, model.ternary[name][1])


@pytest.mark.parametrize(
    ("form", "stored"),
    [("float16", "f16"), ("bf16", "bf16"), ("float32", "f32"), ("int8", "int8")],
)
def test_heads_and_embeddings_as_asked(tmp_path, rng, form, stored):
    source = falcon(tmp_path / "source", rng)
    result = pack(source, tmp_path / "packed", head=form, embedding=form, check=False)
    reader, checkpoint = PackedReader(tmp_path / "packed"), open_checkpoint(source)
    assert (result.head, result.embedding) == (stored, stored)
    for name in ("head", "embedding"):
        floats = checkpoint.read(f"{name}.weight")
        found, scale = reader.matrix(name)
        if form == "int8":
            rows, expected = quantise_rows(floats)
            np.testing.assert_array_equal(found, rows)
            np.testing.assert_array_equal(scale, expected)
        else:  # they are exact in bfloat16
            wide = floats.astype(np.float16) if form == "float16" else floats
            np.testing.assert_array_equal(found, wide.astype(np.float32))


def test_q8_0_is_kept_exactly(tmp_path, rng):
    tensors = write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="TQ1_0", outer="Q8_0")
    result = pack(tmp_path / "m.gguf", tmp_path / "packed", check=False)
    assert (result.head, result.embedding) == ("int8-32", "int8-32")
    reader = PackedReader(tmp_path / "packed")
    assert reader.forms.scale == "f16"
    for name, stored in (("head", "lm_head"), ("embedding", "model.embed_tokens")):
        found, scale = reader.matrix(name)
        whole = found.astype(np.float32) * np.repeat(scale, 32, axis=1)
        np.testing.assert_array_equal(whole, tensors[f"{stored}.weight"])
    with pytest.raises(ValueError, match="head 'int8': the source holds int8 with a scale for 32"):
        pack(tmp_path / "m.gguf", tmp_path / "other", head="int8", check=False)
    floats = pack(tmp_path / "m.gguf", tmp_path / "floats", head="f32", check=False)
    assert (floats.head, floats.embedding) == ("f32", "int8-32")


def test_other_types_become_int8_rows(tmp_path, rng):
    tensors = write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="TQ2_0", outer="Q4_0")
    result = pack(tmp_path, tmp_path / "packed", check=False)
    assert (result.head, result.embedding) == ("int8", "int8")
    found, scale = PackedReader(tmp_path / "packed").matrix("head")
    rows, expected = quantise_rows(tensors["lm_head.weight"])
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(scale, expected)


@pytest.mark.parametrize("values", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("exact", ["bf16", "f16", "f32"])
def test_dense_models_lose_nothing(tmp_path, rng, values, exact):
    model = random_model(values, rng)
    for name, (t, _) in model.ternary.items():
        model.floats[f"{name}.weight"] = rng.standard_normal(t.shape).astype(np.float32)
    rounded = {"bf16": bfloat16, "f16": lambda w: w.astype(np.float16).astype(np.float32)}
    change = rounded.get(exact, lambda w: w)
    source = write(tmp_path / "source", values, {n: change(w) for n, w in model.floats.items()})
    result = pack(source, tmp_path / "packed", check=False)
    assert result.dense == exact
    reader, checkpoint = PackedReader(tmp_path / "packed"), open_checkpoint(source)
    for name in ("layers.1.channel.gate_proj", "layers.0.mixer.k_proj", "head"):
        found, _ = reader.matrix(name)
        np.testing.assert_array_equal(found, checkpoint.read(f"{name}.weight"))


def test_a_tied_head_is_int8_beside_an_exact_embedding(tmp_path, rng):
    source = bitnet(tmp_path / "source", rng)
    pack(source, tmp_path / "packed", check=False)
    reader = PackedReader(tmp_path / "packed")
    floats = open_checkpoint(source).read("embedding.weight")
    np.testing.assert_array_equal(reader.embedding(), floats)
    found, scale = reader.matrix("head")
    rows, expected = quantise_rows(floats)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(scale, expected)


def test_a_float_head_keeps_the_embedding_too(tmp_path, rng):
    """`--head float16` alone says that nothing dense is to be rounded to int8."""
    falcons = pack(falcon(tmp_path / "a", rng), tmp_path / "1", head="float16", check=False)
    assert (falcons.head, falcons.embedding) == ("f16", "bf16")
    tied = pack(bitnet(tmp_path / "b", rng), tmp_path / "2", head="float16", check=False)
    assert (tied.head, tied.embedding) == (None, "f16")
    apart = pack(tmp_path / "b", tmp_path / "5", head="f32", embedding="int8", check=False)
    assert (apart.head, apart.embedding) == ("f32", "int8")
    one = pack(tmp_path / "b", tmp_path / "6", embedding="int8", check=False)
    assert (one.head, one.embedding) == (None, "int8")
    with pytest.warns(UserWarning, match="the head is ternary and is kept as it is"):
        kept = pack(bonsai(tmp_path / "c", rng), tmp_path / "3", head="float16", check=False)
    assert kept.embedding == "2bit"
    with pytest.warns(UserWarning, match="the embedding is ternary and is kept as it is"):
        pack(tmp_path / "c", tmp_path / "4", embedding="int8", check=False)


def test_what_was_found_is_said(tmp_path, rng, capsys):
    source = write_values(tmp_path / "source", random_model(QWEN3, rng, group=32))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "made_by": "a tool"}))
    assert cli.main(["pack", str(source), str(tmp_path / "packed"), "--no-check"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "weights ternary values",
        "one scale for 32 inputs of a row (14 matrices)",
        "activations int8 for each 32 inputs",
        "ignored config keys made_by",
        "head int8",
        "parts ternary ",
    ):
        assert words in shown
    with pytest.warns(UserWarning, match="ignored the unknown key 'made_by'"):
        parts = pack(source, tmp_path / "again", check=False).parts
    weights = (tmp_path / "again" / "model.safetensors").stat().st_size
    assert 0 < weights - sum(parts.values()) < 10_000  # the header


def test_gguf_files_in_a_directory(tmp_path, rng):
    write_gguf(tmp_path / "a.gguf", "llama", rng, kind="TQ2_0")
    assert pack(tmp_path, tmp_path / "packed", check=False).weights == "ternary values"
    write_gguf(tmp_path / "b.gguf", "llama", rng, kind="TQ2_0")
    with pytest.raises(FormatError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        pack(tmp_path, tmp_path / "other", check=False)


def test_packing_needs_little_memory(tmp_path, rng):
    """Ternary floats of 54 MB, the largest tensor 12.6 MB, pack within a few blocks of rows."""
    big = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 6144, "head_dim": 128}
    model = random_model({**QWEN3, **big}, rng, group=128)
    source = write_values(tmp_path / "source", model)
    code = (
        "import nomatmul.formats.files.safetensors, numpy.random\n"
        "from nomatmul.engine.report import memory_of_process\n"
        "from nomatmul.convert import pack\n"
        "before = memory_of_process()[1]\n"
        f"pack({str(source)!r}, {str(tmp_path / 'packed')!r}, check=False)\n"
        "print(memory_of_process()[1] - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    largest = max(tensor.nbytes for tensor in model.floats.values())
    output = sum(file.stat().st_size for file in (tmp_path / "packed").iterdir())
    assert int(done.stdout) < 2 * largest + output


def test_a_ternary_embedding_in_a_gguf(tmp_path, rng):
    tensors = write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="TQ1_0", outer="TQ2_0")
    result = pack(tmp_path / "m.gguf", tmp_path / "packed", check=False)
    assert (result.head, result.embedding) == (None, "2bit")
    reader = PackedReader(tmp_path / "packed")
    assert (reader.config.head_kind, reader.config.embedding_linear) == ("ternary", "ternary")
    np.testing.assert_array_equal(reader.embedding(), tensors["model.embed_tokens.weight"])


def test_int8_blocks_of_a_dense_gguf(tmp_path, rng):
    from gguf import GGMLQuantizationType, quants

    def dense(tensors):
        for name, value in tensors.items():
            if name.startswith("blk.") and value.ndim == 2:
                drawn = rng.standard_normal(value.shape).astype(np.float32)
                stored = quants.quantize(drawn, GGMLQuantizationType.Q8_0)
                tensors[name] = quants.dequantize(stored, GGMLQuantizationType.Q8_0)

    write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="Q8_0", change=dense)
    result = pack(tmp_path / "m.gguf", tmp_path / "packed", check=False)
    assert (result.packing, result.dense, result.head) == ("none", "int8-32", "f32")
    checkpoint, reader = open_checkpoint(tmp_path / "m.gguf"), PackedReader(tmp_path / "packed")
    for name in ("layers.1.channel.gate_proj", "layers.0.mixer.o_proj"):
        found, scale = reader.matrix(name)
        whole = found.astype(np.float32) * np.repeat(scale, 32, axis=1)
        np.testing.assert_array_equal(whole, checkpoint.read(f"{name}.weight"))
