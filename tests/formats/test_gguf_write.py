"""GGUF files that are written: blocks and headers against the `gguf` package and our reader."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.files.gguf_encode import encode_floats, encode_integers
from nomatmul.formats.files.gguf_write import GgufRows, write_gguf

GROUPS = {"TQ2_0": 256, "PQ2_0": 128, "Q2_0": 64, "Q8_0": 32}
KNOWN = ("TQ2_0", "Q8_0")  # to the package


def whole_numbers(rng, name, rows, columns):
    low, high = (-128, 128) if name == "Q8_0" else (-1, 2)
    values = rng.integers(low, high, (rows, columns)).astype(np.int8)
    return values, (0.5 + rng.random((rows, columns // GROUPS[name]))).astype(np.float16)


def write(path, tensors, metadata=None):
    rows = [
        GgufRows(name, shape, kind, lambda data=data: [data])
        for name, (kind, shape, data) in tensors.items()
    ]
    write_gguf(path, metadata or {"general.architecture": "llama"}, rows)
    return path


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (6, 512), (3, 768)])
def test_whole_numbers_are_kept(tmp_path, rng, name, rows, columns):
    values, scale = whole_numbers(rng, name, rows, columns)
    data = encode_integers(name, values, scale)
    path = write(tmp_path / "x.gguf", {"w": (name, (rows, columns), data)})
    found = GgufFile(path).quantised("w")
    assert (found.kind, found.group) == ("int8" if name == "Q8_0" else "ternary", GROUPS[name])
    np.testing.assert_array_equal(found.read(slice(None)), values)
    np.testing.assert_array_equal(found.scale, scale.astype(np.float32))
    if name in KNOWN:
        (tensor,) = gguf.GGUFReader(path).tensors
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(floats.reshape(rows, columns), found.floats())


def test_a_group_of_64_whose_rows_are_no_multiple_of_128(tmp_path, rng):
    values, scale = whole_numbers(rng, "Q2_0", 5, 192)
    data = encode_integers("Q2_0", values, scale)
    found = GgufFile(write(tmp_path / "x.gguf", {"w": ("Q2_0", (5, 192), data)})).quantised("w")
    np.testing.assert_array_equal(found.read(slice(None)), values)


@pytest.mark.parametrize("name", ["TQ2_0", "PQ2_0", "Q2_0"])
def test_what_is_not_ternary_is_refused(name):
    values = np.full((1, 256), 2, np.int8)
    scale = np.ones((1, 256 // GROUPS[name]), np.float16)
    with pytest.raises(ValueError, match=r"must lie in -1\.\.1"):
        encode_integers(name, values, scale)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats(tmp_path, rng, name):
    values = rng.standard_normal((3, 40)).astype(np.float32)
    data = encode_floats(name, values)
    path = write(tmp_path / "x.gguf", {"v": (name, (3, 40), data), "w": (name, (3, 40), data)})
    (tensor, _) = gguf.GGUFReader(path).tensors
    floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(3, 40)
    np.testing.assert_array_equal(GgufFile(path).read("w"), floats)
    assert np.abs(floats - values).max() <= {"F32": 0, "F16": 2e-3, "BF16": 2e-2}[name]


METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.text": "größe <|end|>",
    "a.u32": np.uint32(7),
    "a.f32": np.float32(1e-5),
    "a.texts": ["", "a b", "\u2581\U0001f600"],
    "a.i32s": np.array([1, -3], np.int32),
    "a.f32s": np.array([0.5, -1e6], np.float32),
}


def test_metadata_are_read_as_they_were_written(tmp_path):
    one = ("F32", (2,), encode_floats("F32", np.ones(2, np.float32)))
    path = write(tmp_path / "x.gguf", {"w": one}, METADATA)
    found = GgufFile(path).metadata
    assert list(found) == list(METADATA)
    for key, value in METADATA.items():
        np.testing.assert_array_equal(found[key], value)
    reader = gguf.GGUFReader(path)
    for key in ("a.bool", "a.text", "a.u32", "a.texts", "a.i32s"):
        np.testing.assert_array_equal(reader.fields[key].contents(), METADATA[key])


ONE = np.zeros(4, np.uint8)
BAD = {
    "a width": ({"w": ("TQ2_0", (2, 128), ONE)}, {}, "rows of 128 weights, but TQ2_0 has blocks"),
    "a name": ({"w" * 65: ("F32", (1,), ONE)}, {}, "a tensor's name has 65 bytes; at most 64"),
    "too few bytes": ({"w": ("F32", (2,), ONE)}, {}, "'w' has 4 bytes, its shape asks 8"),
    "a key": ({}, {"k" * 65536: "x"}, "a metadata key has 65536 bytes"),
    "half a pair": ({}, {"k": "\ud800"}, "the value of 'k' is no Unicode text"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_left_of_what_is_refused(tmp_path, case):
    tensors, metadata, words = BAD[case]
    with pytest.raises(FormatError, match=words):
        write(tmp_path / "x.gguf", tensors, metadata)
    assert list(tmp_path.iterdir()) == []
