"""The packed directory: round trips, atomic writing, and refusals while writing."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from model_files import packed_values, write_packed, write_published, write_tokenizer
from safetensors import safe_open

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import WriteError
from nomatmul.formats.packed import Forms, PackedReader, PackedWriter
from nomatmul.formats.quantise import from_bfloat16, quantise_weight

SMALL = ModelConfig(9, 6, 1, intermediate_size=5)
FORMS = Forms.of(SMALL)


@pytest.fixture
def source(tmp_path, rng):
    write_published(tmp_path / "source", rng)
    return open_checkpoint(tmp_path / "source")


def left_behind(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name != "source")


def write_small(directory: Path, stop_before: str | None = None, **options) -> None:
    """Write SMALL with weights of zeros and ones."""
    with PackedWriter(directory, SMALL, FORMS, **options) as writer:
        for name, (dtype, shape) in writer.layout.tensors().items():
            if name == stop_before:
                return
            if name.endswith(".packed"):
                columns = 5 if "down" in name else 6
                writer.add_packed(name, np.zeros((shape[0], columns), np.int8))
            else:
                kind = {"F32": np.float32, "BF16": np.uint16, "I8": np.int8}[dtype]
                writer.add(name, np.ones(shape, kind))


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
@pytest.mark.parametrize("embedding_form", ["bf16", "int8"])
def test_round_trip(tmp_path, source, packing, embedding_form):
    dst = tmp_path / "packed"
    tokenizer = write_tokenizer(tmp_path / "source")
    write_packed(dst, source, packing, embedding_form, tokenizer)
    reader = PackedReader(dst)
    reader.verify_all()
    assert reader.config == source.config
    assert (reader.packing, reader.embedding_form) == (packing, embedding_form)
    assert reader.tokenizer_path.read_bytes() == tokenizer.read_bytes()
    expected = packed_values(source, packing, embedding_form)
    assert set(reader.infos) == set(expected)
    for name, values in expected.items():
        if name.endswith(".packed"):
            np.testing.assert_array_equal(reader.ternary(name.removesuffix(".packed"))[0], values)
        else:
            np.testing.assert_array_equal(reader.read(name), values)
            buffer = bytearray(reader.infos[name].nbytes)
            reader.read_into(name, buffer)
            reader.verify(name, buffer)
    t, scale = reader.ternary("layers.1.channel.gate_proj")
    wanted, wanted_scale = quantise_weight(source.read("layers.1.channel.gate_proj.weight"))
    np.testing.assert_array_equal(t, wanted)
    assert scale == wanted_scale
    table = source.read("embedding.weight")
    step = np.abs(table).max(axis=1, keepdims=True) / (254 if embedding_form == "int8" else 256)
    assert np.all(np.abs(reader.read_float32("embedding.weight") - table) <= step * 1.001)


def test_the_file_is_plain_safetensors_and_aligned(tmp_path, source):
    write_packed(tmp_path / "packed", source)
    reader = PackedReader(tmp_path / "packed")
    with safe_open(reader.weights_path, "np") as file:
        assert set(file.keys()) == set(reader.infos)
        bounds = file.get_tensor("layers.1.mixer.lower_bound")
    np.testing.assert_array_equal(bounds, reader.read("layers.1.mixer.lower_bound"))
    offsets = {name: info.offset for name, info in reader.infos.items()}
    assert offsets["layers.0.mixer.i_proj.packed"] % 4096 == 0
    assert all(offsets[n] % 32 == 0 for n in offsets if n.endswith(".packed"))
    assert all(offsets[n] % 4 == 0 for n, info in reader.infos.items() if info.dtype == "F32")


def test_a_tied_head_is_packed_from_the_embedding(tmp_path, rng):
    tensors = write_published(tmp_path / "source", rng, tie_word_embeddings=True)
    write_packed(tmp_path / "packed", open_checkpoint(tmp_path / "source"))
    t, _ = PackedReader(tmp_path / "packed").ternary("head")
    np.testing.assert_array_equal(t, quantise_weight(tensors["embedding.weight"])[0])


def test_a_model_without_lower_bounds_carries_zeros(tmp_path, rng):
    write_published(tmp_path / "source", rng, use_lower_bound=False)
    write_packed(tmp_path / "packed", open_checkpoint(tmp_path / "source"))
    assert not PackedReader(tmp_path / "packed").read("layers.1.mixer.lower_bound").any()


def test_open_checkpoint_sees_a_packed_directory(tmp_path, source):
    write_packed(tmp_path / "packed", source)
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert checkpoint.kind == "packed"
    assert checkpoint.config == source.config
    norm = checkpoint.read("final_norm.weight")
    np.testing.assert_array_equal(norm, source.read("final_norm.weight"))
    bits = checkpoint.packed.read("embedding.weight")
    np.testing.assert_array_equal(checkpoint.read("embedding.weight"), from_bfloat16(bits))
    with pytest.raises(ValueError, match="is packed; read it with"):
        checkpoint.read("head.packed")
    with pytest.raises(ValueError, match=r"has no tensor 'head\.weight'"):
        checkpoint.read("head.weight")


def test_tensors_may_come_in_blocks_of_rows(tmp_path, source):
    write_packed(tmp_path / "whole", source)
    values = packed_values(source, "2bit", "bf16")
    with PackedWriter(tmp_path / "blocks", source.config, Forms.of(source.config)) as writer:
        for name in writer.names:
            blocks = [values[name][i : i + 7] for i in range(0, len(values[name]), 7)]
            add = writer.add_packed if name.endswith(".packed") else writer.add
            add(name, iter(blocks))
    whole, blocks = (tmp_path / d / "model.safetensors" for d in ("whole", "blocks"))
    assert whole.read_bytes() == blocks.read_bytes()


@pytest.mark.parametrize("occupied", ["directory", "file", "link"])
def test_an_existing_destination_is_refused_and_kept(tmp_path, occupied):
    dst = tmp_path / "packed"
    if occupied == "directory":
        dst.mkdir()
        (dst / "precious").write_text("x")
    elif occupied == "file":
        dst.write_text("x")
    else:
        dst.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="already exists"):
        PackedWriter(dst, SMALL, FORMS)
    assert left_behind(tmp_path) == ["packed"]


def test_an_empty_destination_is_taken(tmp_path):
    (tmp_path / "packed").mkdir()
    write_small(tmp_path / "packed")
    PackedReader(tmp_path / "packed").verify_all()
    assert left_behind(tmp_path) == ["packed"]


def test_a_missing_tensor_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"lacks the tensor 'final_norm\.weight'"):
        write_small(tmp_path / "packed", stop_before="final_norm.weight")
    assert left_behind(tmp_path) == []


def test_any_exception_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with PackedWriter(tmp_path / "packed", SMALL, FORMS):
            assert left_behind(tmp_path) != []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert left_behind(tmp_path) == []


BAD_TENSORS = [
    ("head.packed", np.zeros((1, 32), np.uint8), "is out of order; 'layers.0.mixer.i_proj.packed'"),
    ("layers.0.mixer.i_proj.packed", np.full((6, 32), 255, np.uint8), "illegal code 3"),
    ("layers.0.mixer.i_proj.packed", np.zeros((6, 32), np.uint8), "padding behind 6 packed"),
    ("layers.0.mixer.i_proj.packed", np.zeros((6, 31), np.uint8), r"must be U8 \[6, 32\]"),
    ("layers.0.mixer.i_proj.packed", np.zeros((6, 32), np.int8), r"must be U8 \[6, 32\]"),
    ("layers.0.mixer.i_proj.packed", np.full((5, 32), 85, np.uint8), "needs 6 rows, got 5"),
]


@pytest.mark.parametrize(("name", "values", "message"), BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path, name, values, message):
    with (
        pytest.raises(ValueError, match=message),
        PackedWriter(tmp_path / "p", SMALL, FORMS) as writer,
    ):
        writer.add(name, values)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.0.mixer.i_proj.scale", 0.0, "must be above 0"),
        ("layers.0.mixer.i_proj.scale", np.nan, "not finite"),
        ("final_norm.weight", np.inf, "not finite"),
        ("embedding.weight", 0x7FC0, "not finite"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, name, value, message):
    real_add = PackedWriter.add

    def add(self, tensor, data):
        real_add(self, tensor, np.full_like(data, value) if tensor == name else data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedWriter, "add", add)
        with pytest.raises(ValueError, match=message):
            write_small(tmp_path / "packed")
    assert left_behind(tmp_path) == []


def test_models_that_cannot_be_packed(tmp_path):
    dense = ModelConfig(9, 6, 1, linear="dense")
    with pytest.raises(ValueError, match="no linear 'dense' in a causal model"):
        PackedWriter(tmp_path / "p", dense, Forms("f32", dense="f32"))
    with pytest.raises(ValueError, match="ternary form '4bit' is unknown"):
        PackedWriter(tmp_path / "p", SMALL, Forms("bf16", ternary="4bit"))
    with pytest.raises(ValueError, match="embedding form 'fp8' is unknown"):
        PackedWriter(tmp_path / "p", SMALL, Forms("fp8", ternary="2bit"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        PackedWriter(tmp_path / "p", SMALL, FORMS, tokenizer_path=tmp_path / "tokenizer.json")
    assert left_behind(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize("limit", [0, 100, 4096, 4200, 5000])
def test_a_full_disk_leaves_nothing(tmp_path, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(WriteError, match=r"cannot write the packed model .*: File too large"):
            write_small(tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*_args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        write_small(tmp_path / "packed")
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind; this is root")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        write_small(tmp_path / "locked" / "packed")
