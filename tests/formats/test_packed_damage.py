"""A damaged packed directory is refused in one line, or, where a flip is harmless, reads equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_packed, write_published, write_tokenizer
from packed_files import DECODERS, ENCODERS, KINDS, SIZES, WITH_ATTENTION, edit_header, refused

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.packed import PackedReader

FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Tests of a tensor or a key that only these have.
decoders = pytest.mark.parametrize("packed", DECODERS, indirect=True)
encoders = pytest.mark.parametrize("packed", ENCODERS, indirect=True)
everything = pytest.mark.parametrize("packed", [*KINDS, *WITH_ATTENTION], indirect=True)


def contents(directory: Path) -> tuple[Any, ...]:
    """Everything a packed directory says."""
    reader = PackedReader(directory)
    arrays = {name: reader.read(name).tobytes() for name in sorted(reader.infos)}
    path = reader.tokenizer_path
    tokenizer = path.read_bytes() if path else None
    return reader.config, reader.forms, reader.reading, arrays, tokenizer


def equal_or_refused(directory: Path, sound: Path) -> None:
    try:
        found = contents(directory)
    except ValueError as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"]
        assert found == contents(sound)
    assert len(lines) == 1


@everything
@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flip_cut_or_splice_is_refused_or_harmless(packed, data):
    name = data.draw(st.sampled_from(FILES))
    original = bytearray((packed / name).read_bytes())
    kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "append", "swap"]))
    # Headers and JSON are small beside the data: aim at them half of the time.
    near = min(len(original) - 1, data.draw(st.sampled_from([len(original) - 1, 3000, 20])))
    at = data.draw(st.integers(0, near))
    if kind == "flip":
        original[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "set":
        original[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del original[at:]
    elif kind == "insert":
        original[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "append":
        original += data.draw(st.binary(min_size=1, max_size=9))
    else:
        other = data.draw(st.integers(0, len(original) - 1))
        original[at], original[other] = original[other], original[at]
    (packed / "spare").mkdir(exist_ok=True)
    for file in FILES:
        (packed / "spare" / file).write_bytes(
            bytes(original) if file == name else (packed / file).read_bytes()
        )
    equal_or_refused(packed / "spare", packed)


@given(blob=st.binary(max_size=200), name=st.sampled_from(FILES))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_foreign_bytes_are_refused(packed, blob, name):
    (packed / "spare").mkdir(exist_ok=True)
    for file in FILES:
        data = blob if file == name else (packed / file).read_bytes()
        (packed / "spare" / file).write_bytes(data)
    refused(packed / "spare")


@pytest.mark.parametrize("name", FILES)
def test_every_missing_file_is_named(copy, name):
    (copy / name).unlink()
    refused(copy, name)


def test_a_tokenizer_that_was_added_is_named(tmp_path, rng):
    write_published(tmp_path / "source", rng, **SIZES)
    write_packed(tmp_path / "packed", open_checkpoint(tmp_path / "source"))
    PackedReader(tmp_path / "packed").verify_all()
    write_tokenizer(tmp_path / "packed")
    refused(tmp_path / "packed", "missing metadata 'tokenizer_sha256'")


@everything
def test_a_flip_in_every_tensor_is_found(copy):
    reader = PackedReader(copy)
    data = reader.weights_path.read_bytes()
    for name, info in reader.infos.items():
        for place in (info.offset, info.offset + info.nbytes - 1):
            damaged = bytearray(data)
            damaged[place] ^= 16
            reader.weights_path.write_bytes(damaged)
            refused(copy, f"{name} does not match its checksum")


def with_checksum(directory: Path, name: str, values: bytes) -> None:
    """Replace a tensor's bytes and its checksum, as a careless tool would."""
    import zlib

    reader = PackedReader(directory)
    info = reader.infos[name]
    data = bytearray(reader.weights_path.read_bytes())
    data[info.offset : info.offset + info.nbytes] = values
    reader.weights_path.write_bytes(data)

    def change(header):
        table = json.loads(header["__metadata__"]["crc32"])
        table[name] = f"{zlib.crc32(values):08x}"
        header["__metadata__"]["crc32"] = json.dumps(table)

    edit_header(directory, change)


FLOATS = [
    ("final_norm.weight", np.nan, "holds a value that is not finite"),
    ("layers.0.mixer.f_proj.norm.weight", np.inf, "holds a value that is not finite"),
    ("head.scale", -1.0, "must be above 0"),
    ("head.scale", 0.0, "must be above 0"),
]
ENCODER_FLOATS = [
    ("layers.0.mixer_norm.bias", np.nan, "holds a value that is not finite"),
    ("layers.0.channel.bias", np.inf, "holds a value that is not finite"),
    ("layers.0.mixer.qkv_proj.scale", 0.0, "must be above 0"),
    ("layers.0.channel.row_scale", -1.0, "must be above 0"),
    ("classifier.scale", np.nan, "holds a value that is not finite"),
]


HALVES = [
    ("layers.0.mixer.q_proj.scale", np.nan, "holds a value that is not finite"),
    ("layers.1.channel.down_proj.scale", np.inf, "holds a value that is not finite"),
    ("embedding.scale", 0.0, "must be above 0"),
]


@pytest.mark.parametrize("packed", ["bonsai", "repack"], indirect=True)
@pytest.mark.parametrize(("name", "value", "message"), HALVES)
def test_bad_float16_scales_behind_a_right_checksum(copy, name, value, message):
    scale = PackedReader(copy).read(name)
    assert scale.dtype == np.float16
    scale.reshape(-1)[-1] = value
    with_checksum(copy, name, scale.tobytes())
    refused(copy, f"{name}.*{message}")


@decoders
@pytest.mark.parametrize(("name", "value", "message"), FLOATS)
def test_bad_floats_behind_a_right_checksum(copy, name, value, message):
    count = PackedReader(copy).infos[name].nbytes // 4
    with_checksum(copy, name, np.full(count, value, np.float32).tobytes())
    refused(copy, f"{name}.*{message}")


@encoders
@pytest.mark.parametrize(("name", "value", "message"), ENCODER_FLOATS)
def test_bad_floats_of_encoders(copy, name, value, message):
    count = PackedReader(copy).infos[name].nbytes // 4
    with_checksum(copy, name, np.full(count, value, np.float32).tobytes())
    refused(copy, f"{name}.*{message}")


@decoders
def test_bad_codes_behind_a_right_checksum(copy):
    reader = PackedReader(copy)
    legal = reader.read("head.packed")
    legal[0, 0] = 0b11 if reader.packing == "2bit" else 1
    with_checksum(copy, "head.packed", legal.tobytes())
    refused(copy, "packed weights hold the illegal")


@decoders
def test_bad_padding_behind_a_right_checksum(copy):
    packed = PackedReader(copy).read("head.packed")
    packed[0, -1] = 0
    with_checksum(copy, "head.packed", packed.tobytes())
    refused(copy, "padding behind 12 packed elements")


# their tables are bfloat16
@pytest.mark.parametrize("packed", ["2bit", "2bit-v1", "encoder", "encoder-v1"], indirect=True)
def test_a_bfloat16_nan_behind_a_right_checksum(copy):
    reader = PackedReader(copy)
    assert reader.embedding_form == "bf16"
    table = reader.read("embedding.weight")
    table[3, 3] = 0x7F80
    with_checksum(copy, "embedding.weight", table.tobytes())
    refused(copy, r"embedding\.weight holds a value that is not finite")


def rename(header, old, new):
    header[new] = header.pop(old)


def drop_checksum(header):
    table = json.loads(header["__metadata__"]["crc32"])
    table.pop("final_norm.weight")
    header["__metadata__"]["crc32"] = json.dumps(table)


NORM = "final_norm.weight"
HEADER_EDITS = [
    (lambda h: h.pop("__metadata__"), "is not the weights of a packed model"),
    (lambda h: h["__metadata__"].pop("crc32"), "missing metadata 'crc32'"),
    (lambda h: h["__metadata__"].pop("config_sha256"), "missing metadata 'config_sha256'"),
    (lambda h: h["__metadata__"].update(colour="red"), "unexpected metadata 'colour'"),
    (lambda h: h["__metadata__"].update(crc32="x"), "is not valid JSON"),
    (lambda h: h["__metadata__"].update(config_sha256="0" * 64), "config.json does not match"),
    (lambda h: h["__metadata__"].update(tokenizer_sha256=""), "tokenizer.json does not match"),
    (drop_checksum, "checksums and tensors do not pair up"),
    (lambda h: rename(h, NORM, "first_norm.weight"), "do not pair up"),
    (lambda h: h[NORM].update(dtype="I32"), r"is I32 \[12\], the config asks for F32"),
    (lambda h: h[NORM].update(shape=[3, 4]), r"is F32 \[3, 4\], the config asks for"),
    (lambda h: h[NORM].update(data_offsets=[0, 48]), "overlaps|gap"),
    (lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 48]), "overlaps|gap"),
]


@pytest.mark.parametrize(("change", "message"), HEADER_EDITS)
def test_headers_that_lie(copy, change, message):
    edit_header(copy, change)
    refused(copy, message)


def test_no_directory(tmp_path):
    refused(tmp_path / "none", "none does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file is not a directory")
    (tmp_path / "file").unlink()
    refused(tmp_path, r"cannot read .*config\.json")


def test_a_directory_in_place_of_a_file(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    refused(copy, r"cannot read .*model\.safetensors: Is a directory")
