"""A damaged packed directory is refused in one line, or, where a flip is harmless, reads equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_files import encoder_config, write_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_json, write_packed, write_published, write_tokenizer
from packed_files import edit_header, sign_config, to_version_1

from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.packed import PackedReader

FILES = ("config.json", "model.safetensors", "tokenizer.json")
OPTIONS = {"hidden_size": 12, "intermediate_size": 7, "vocab_size": 11, "num_hidden_layers": 1}


ENCODER = {
    "vocab_size": 11, "hidden_size": 12, "num_layers": 1, "num_heads": 2,
    "channel_mixer": "fff", "fff_trees": 2, "fff_depth": 1, "fff_bias": True,
}  # fmt: skip


def write_decoder(root: Path, packing: str) -> None:
    write_published(root / "source", np.random.default_rng(1), **OPTIONS)
    tokenizer = write_tokenizer(root / "source", words=8)
    form = "bf16" if packing == "2bit" else "int8"
    write_packed(root / "sound", open_checkpoint(root / "source"), packing, form, tokenizer)


def write_encoder_of_trees(root: Path) -> None:
    write_encoder(root / "source", encoder_config(**ENCODER), "sequence", ("no", "yes"))
    write_tokenizer(root / "source", words=8)
    forms = {"rows": "int8", "dense": "int8", "embedding": "bf16"}
    pack(root / "source", root / "sound", check=False, **forms)


KINDS = ("2bit", "1.6bit", "encoder")
# Tests of a tensor or a key that only these have.
decoders = pytest.mark.parametrize("packed", ["2bit", "1.6bit", "2bit-v1"], indirect=True)
encoders = pytest.mark.parametrize("packed", ["encoder", "encoder-v1"], indirect=True)


@pytest.fixture(scope="module", params=[*KINDS, "2bit-v1", "1.6bit-v1", "encoder-v1"])
def packed(request, tmp_path_factory) -> Path:
    """A small sound packed directory of some kind and version, not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    kind, _, version = request.param.partition("-")
    if kind == "encoder":
        write_encoder_of_trees(root)
    else:
        write_decoder(root, kind)
    if version:
        to_version_1(root / "sound")
    return root / "sound"


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def contents(directory: Path) -> tuple[Any, ...]:
    """Everything a packed directory says."""
    reader = PackedReader(directory)
    arrays = {name: reader.read(name).tobytes() for name in sorted(reader.infos)}
    path = reader.tokenizer_path
    tokenizer = path.read_bytes() if path else None
    return reader.config, reader.forms, reader.reading, arrays, tokenizer


def refused(directory: Path, match: str = ".") -> None:
    with pytest.raises(ValueError, match=match) as caught:
        PackedReader(directory).verify_all()
    assert "\n" not in str(caught.value)


def equal_or_refused(directory: Path, sound: Path) -> None:
    try:
        found = contents(directory)
    except ValueError as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"]
        assert found == contents(sound)
    assert len(lines) == 1


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
    write_published(tmp_path / "source", rng, **OPTIONS)
    write_packed(tmp_path / "packed", open_checkpoint(tmp_path / "source"))
    PackedReader(tmp_path / "packed").verify_all()
    write_tokenizer(tmp_path / "packed")
    refused(tmp_path / "packed", "missing metadata 'tokenizer_sha256'")


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


# Of every kind and version.
CONFIG_EDITS = [
    (lambda c: c.update(colour=1), "unknown config key 'colour'"),
    (lambda c: c["model"].update(colour=1), "unknown config key 'colour'"),
    (lambda c: c["model"].update(token_mixer="lstm"), "token_mixer 'lstm' is unknown"),
    (lambda c: c["model"].update(norm_eps=1e-4), "does not match the checksum"),
    (lambda c: c.update(format_version=3), "format_version 3 is unknown|format .* is not"),
    (lambda c: c.update(format_version=True), "format_version True is unknown|format .* is not"),
    (lambda c: c.pop("format_version"), "format_version None is unknown|format .* is not"),
    (lambda c: c.update(format="gguf"), "format 'gguf' is not 'nomatmul-packed'"),
    (lambda c: c.update(format=["nomatmul-packed"]), "format .* is not 'nomatmul-packed'"),
    (lambda c: c.pop("model"), "missing config key 'model'"),
    (lambda c: c.update(model=[]), "a model config must be a JSON object"),
]
_TERNARY = [
    (lambda c: c["model"].update(linear="dense"), "has no linear 'dense' in a causal model"),
    (lambda c: c["model"].update(hidden_size=13), "does not match the checksum"),
]
_HEADS = [
    (lambda c: c.pop("head"), "an encoder needs a task head|missing config key 'head'"),
    (lambda c: c.update(head=[]), "key of head: a JSON object is needed, found list"),
    (lambda c: c["head"].update(colour=1), "unknown key of head 'colour'"),
    (lambda c: c["head"].pop("pooler"), "missing key of head 'pooler'"),
    (lambda c: c["head"].update(task="poem"), "task 'poem' is unknown"),
    (lambda c: c["head"].update(task=["token"]), "task .* is unknown"),
    (lambda c: c["head"].update(labels=[]), "task 'sequence' does not go with 0 labels"),
    (lambda c: c["head"].update(task="masked"), "task 'masked' does not go with 2 labels"),
    (lambda c: c["head"].update(labels="no"), "labels must be a list of names"),
    (lambda c: c["head"].update(labels=["a", "b", "c"]), "does not match the checksum"),
    (lambda c: c["head"].update(pooler="sum"), "pooler 'sum' is unknown"),
    (lambda c: c["head"].update(pool_padding=1), "pool_padding must be true or false"),
    (lambda c: c["head"].update(pooler_activation="relu2"), "pooler_activation .* is unknown"),
    (lambda c: c["head"].update(pooler_size=0), "pooler_size must be a whole number above 0"),
    (lambda c: c["model"].update(causal=True), "a causal model has no task head"),
    (lambda c: c["model"].update(linear="ternary"), "has no|fff_bias"),
    (lambda c: c["model"].update(token_mixer="mlgru"), "has no|sinusoidal"),
    (lambda c: c.update(forms={}), "missing key of forms"),
    (lambda c: c.update(forms=1), "key of forms: a JSON object is needed, found int"),
    (lambda c: c["forms"].update(colour="red"), "unknown key of forms 'colour'"),
    (lambda c: c["forms"].update(dense="2bit"), "dense form '2bit' is unknown"),
    (lambda c: c["forms"].update(rows=None), "rows form None is unknown"),
    (lambda c: c["forms"].update(embedding=["f32"]), "embedding form .* is unknown"),
]
KIND_EDITS = {
    "2bit": [
        *_TERNARY,
        (lambda c: c.pop("forms"), "missing config key 'forms'"),
        (lambda c: c["forms"].update(ternary="4bit"), "ternary form '4bit' is unknown"),
        (lambda c: c["forms"].update(ternary=["2bit"]), "ternary form .* is unknown"),
        (lambda c: c["forms"].update(embedding=None), "embedding form None is unknown"),
        (lambda c: c["forms"].update(rows="2bit"), "unknown key of forms 'rows'"),
        (lambda c: c["forms"].pop("ternary"), "missing key of forms 'ternary'"),
        (lambda c: c.update(head={}), "missing key of head"),
        (lambda c: c.update(format_version=1), "unknown config key 'forms'"),
    ],
    "2bit-v1": [
        *_TERNARY,
        (lambda c: c.update(packing="4bit"), "ternary form '4bit' is unknown"),
        (lambda c: c.update(packing=["2bit"]), "ternary form .* is unknown"),
        (lambda c: c.update(embedding=None), "embedding form None is unknown"),
        (lambda c: c.pop("packing"), "missing config key 'packing'"),
        (lambda c: c.update(format_version=2), "unknown config key 'embedding'"),
        (lambda c: c.update(forms={}), "unknown config key 'forms'"),
    ],
    "encoder": [
        *_HEADS,
        (lambda c: c["forms"].update(ternary="2bit"), "unknown key of forms 'ternary'"),
        (lambda c: c.update(format_version=1), "unknown config key 'forms'"),
    ],
    "encoder-v1": [
        *_HEADS,
        (lambda c: c.update(format="nomatmul-packed"), "unknown config key 'forms'"),
        (lambda c: c.update(format_version=2), "format 'nomatmul-packed-encoder' is not"),
    ],
}


def change_config(directory: Path, change) -> None:
    values = json.loads((directory / "config.json").read_text())
    change(values)
    write_json(directory / "config.json", values)


@pytest.mark.parametrize(("change", "message"), CONFIG_EDITS)
def test_configs_that_lie(copy, change, message):
    change_config(copy, change)
    refused(copy, message)


@pytest.mark.parametrize(
    ("packed", "change", "message"),
    [(kind, *edit) for kind, edits in KIND_EDITS.items() for edit in edits],
    indirect=["packed"],
)
def test_configs_of_one_kind_that_lie(copy, change, message):
    change_config(copy, change)
    refused(copy, message)


def test_a_form_of_rows_that_version_1_says_without_trees(tmp_path):
    dials = {**ENCODER, "channel_mixer": "ffn"}
    dials = {name: value for name, value in dials.items() if not name.startswith("fff_")}
    write_encoder(tmp_path / "source", encoder_config(**dials))
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    to_version_1(tmp_path / "packed")
    PackedReader(tmp_path / "packed").verify_all()
    change_config(tmp_path / "packed", lambda c: c["forms"].update(rows="red"))
    refused(tmp_path / "packed", "rows form 'red' is unknown")


# with a right checksum the shapes tell
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("2bit", r"head\.packed is U8 \[11, 32\], the config asks for U8 \[12, 32\]"),
        ("2bit-v1", r"head\.packed is U8 \[11, 32\], the config asks for U8 \[12, 32\]"),
        ("encoder", r"embedding\.weight is BF16 \[11, 12\], .* asks for BF16 \[12, 12\]"),
        ("encoder-v1", r"embedding\.weight is BF16 \[11, 12\], .* asks for BF16 \[12, 12\]"),
    ],
    indirect=["packed"],
)
def test_a_config_that_asks_for_another_shape(copy, message):
    change_config(copy, lambda c: c["model"].update(vocab_size=12))
    sign_config(copy)
    refused(copy, message)


@decoders
def test_a_config_that_asks_for_another_form(copy):
    def change(values):
        forms, key = (values["forms"], "ternary") if "forms" in values else (values, "packing")
        forms[key] = "1.6bit" if forms[key] == "2bit" else "2bit"

    change_config(copy, change)
    sign_config(copy)
    refused(copy, "illegal|padding|asks for")


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
