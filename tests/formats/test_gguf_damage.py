"""A damaged GGUF file is refused in one line, or reads as something of the sizes that it has."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import finish, random_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile

fuzz = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    """A file with metadata of each type, and tensors of each kind."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -300)
    writer.add_int32("a.i32", -70000)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_int64("a.i64", -(1 << 40))
    writer.add_float64("a.f64", 0.1)
    writer.add_array("a.texts", ["", "vier", "drei\n", "ü"])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.floats", [1.5, -2.0])
    writer.add_array("a.ints", [7, -9])
    writer.add_tensor("norm", np.ones(48, np.float32))
    for name, kind, at in (("w", "TQ2_0", 64), ("e", "Q8_0", 0)):
        number = gguf.GGMLQuantizationType[kind]
        group, size = gguf.GGML_QUANT_SIZES[number]
        blocks = random_blocks(rng, 3 * 256 // group, size, at)
        writer.add_tensor(name, blocks.reshape(3, -1), raw_dtype=number)
    finish(writer)
    return path.read_bytes()


def header_bytes(data: bytes) -> int:
    return data.rindex(b"e\x02\x00\x00\x00") + 40


def test_metadata_of_each_type(sound, tmp_path):
    (tmp_path / "x.gguf").write_bytes(sound)
    found = GgufFile(tmp_path / "x.gguf").metadata
    assert {k: v for k, v in found.items() if not isinstance(v, np.ndarray)} == {
        "general.architecture": "qwen3", "a.u8": 200, "a.i8": -3, "a.u16": 60000, "a.i16": -300,
        "a.i32": -70000, "a.f32": 0.5, "a.bool": True, "a.u64": 1 << 40, "a.i64": -(1 << 40),
        "a.f64": 0.1, "a.texts": ["", "vier", "drei\n", "ü"], "a.bools": [True, False],
    }  # fmt: skip
    assert found["a.floats"].tolist() == [1.5, -2.0]
    assert found["a.ints"].tolist() == [7, -9]


def read_or_refuse(path: Path, data: bytes) -> str:
    """Read everything; the refusal's line or nothing. No other error, no memory beyond reason."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = GgufFile(path)
        for name, tensor in file.tensors.items():
            assert file.read(name).shape == tensor.shape
            matrix = file.quantised(name)
            if matrix is not None:
                assert matrix.read(slice(None)).shape == matrix.shape
                assert np.isfinite(matrix.scale).all()
                assert (matrix.scale > 0).all()
        line = ""
    except FormatError as error:
        line = str(error)
        assert line.startswith(str(path))
        assert len(line.splitlines()) == 1
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    return line


@pytest.mark.parametrize("kind", ["whole", "every"])
def test_cut_files_are_refused(sound, tmp_path, kind):
    end = header_bytes(sound)
    places = range(end) if kind == "every" else range(end, len(sound) - 32, 37)
    assert len(places) > 30
    for place in places:
        assert read_or_refuse(tmp_path / "x.gguf", sound[:place]), place


@given(data=st.data())
@fuzz
def test_any_flip_or_splice_is_refused_or_read(sound, tmp_path, data):
    changed = bytearray(sound)
    near = data.draw(st.sampled_from([header_bytes(sound), header_bytes(sound), len(sound) - 1]))
    at = data.draw(st.integers(0, near))
    kind = data.draw(st.sampled_from(["flip", "set", "insert", "remove", "long"]))
    if kind == "flip":
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "set":
        changed[at] = data.draw(st.integers(0, 255))
    elif kind == "insert":
        changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "remove":
        del changed[at : at + data.draw(st.integers(1, 9))]
    else:  # a huge number where one may be
        value = data.draw(st.sampled_from([1 << 63, 1 << 40, 1 << 31, 1 << 20, len(sound), 0]))
        changed[at : at + 8] = struct.pack("<Q", value)
    read_or_refuse(tmp_path / "x.gguf", bytes(changed))


@given(body=st.binary(max_size=300), head=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0"]))
@fuzz
def test_foreign_bytes_are_refused(tmp_path, body, head):
    line = read_or_refuse(tmp_path / "x.gguf", head + body)
    assert line or (head + body)[:24] == b"GGUF\3\0\0\0" + bytes(16)


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(*, version=3, tensors=0, keys=(), magic=b"GGUF", order="<") -> bytes:
    return magic + struct.pack(f"{order}IQQ", version, tensors, len(keys)) + b"".join(keys)


def key(name: str, kind: int, value: bytes) -> bytes:
    return packed(name) + struct.pack("<I", kind) + value


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return packed(name) + sizes + struct.pack("<IQ", kind, offset)


def with_data(begin: bytes, nbytes: int) -> bytes:
    return begin + bytes(-len(begin) % 32) + bytes(nbytes)


ONE = struct.pack("<I", 1)
TWO = header(tensors=2)
F32_8 = (8,), 0  # 32 bytes
REFUSED = {
    "foreign": (b"PK\3\4" + bytes(30), "begins with b'PK"),
    "empty": (b"", "it is empty"),
    "version 1": (header(version=1), "GGUF of version 1; it must be 2 or 3"),
    "version 4": (header(version=4), "GGUF of version 4"),
    "big-endian": (header(order=">"), "is a big-endian GGUF file"),
    "many keys": (header()[:16] + b"\xff" * 8 + b"\0" * 99, r"claims \d+ metadata keys"),
    "many tensors": (header(tensors=1 << 60), r"claims \d+ tensors, but"),
    "key twice": (header(keys=[key("a", 4, ONE)] * 2), "has the metadata key 'a' twice"),
    "long key": (header(keys=[struct.pack("<Q", 1 << 50) + bytes(9)]), "at most 65535 are read"),
    "long text": (header(keys=[key("a", 8, struct.pack("<Q", 500))]), "needs 500 bytes of"),
    "key no UTF-8": (header(keys=[struct.pack("<Q", 1) + b"\xff" + ONE + ONE]), "is not UTF-8"),
    "text no UTF-8": (header(keys=[key("a", 8, struct.pack("<Q", 1) + b"\xff")]), "is not UTF-8"),
    "texts no UTF-8": (
        header(keys=[key("a", 9, struct.pack("<IQQ", 8, 1, 1) + b"\xff")]),
        "a string of 'a' is not UTF-8",
    ),
    "bad bool": (header(keys=[key("a", 7, b"\2")]), "the truth value 2"),
    "bad type": (header(keys=[key("a", 13, ONE)]), "'a' has the unknown type 13"),
    "bad elements": (header(keys=[key("a", 9, struct.pack("<IQ", 77, 0))]), "unknown type 77"),
    "nested": (header(keys=[key("a", 9, struct.pack("<IQ", 9, 0))]), "array of arrays"),
    "long array": (
        header(keys=[key("a", 9, struct.pack("<IQ", 4, 1 << 61))]),
        r"claims \d+ elements of 'a'",
    ),
    "alignment": (
        header(keys=[key("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment 24 must be a power of 2",
    ),
    "alignment 0": (
        header(keys=[key("general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment 0 must be",
    ),
    "no dimensions": (header(tensors=1) + entry("a", (), 0, 0) + bytes(99), "has 0 dimensions"),
    "dimensions": (header(tensors=1) + entry("a", (1,) * 5, 0, 0) + bytes(99), "5 dimensions"),
    "size 0": (header(tensors=1) + entry("a", (0,), 0, 0) + bytes(99), "the illegal shape"),
    "huge": (
        header(tensors=1) + entry("a", (1 << 39,) * 4, 0, 0) + bytes(99),
        "bytes, 84 are there",
    ),
    "long name": (header(tensors=1) + entry("a" * 65, (8,), 0, 0) + bytes(99), "has 65 bytes"),
    "tensor twice": (
        with_data(TWO + entry("a", *F32_8, 0) + entry("a", *F32_8, 32), 64),
        "has the tensor 'a' twice",
    ),
    "overlap": (
        with_data(TWO + entry("a", *F32_8, 0) + entry("b", *F32_8, 16), 64),
        "the file has 16 for it",
    ),
    "same place": (
        with_data(TWO + entry("a", *F32_8, 0) + entry("b", *F32_8, 0), 64),
        "the file has 0 for it",
    ),
    "gap": (
        with_data(TWO + entry("a", *F32_8, 0) + entry("b", *F32_8, 64), 96),
        "the file has 64 for it",
    ),
    "late": (with_data(header(tensors=1) + entry("a", *F32_8, 32), 64), "'a' at 32 leaves a gap"),
    "out of range": (
        with_data(header(tensors=1) + entry("a", *F32_8, 1 << 62), 64),
        "leaves a gap",
    ),
    "too long": (with_data(header(tensors=1) + entry("a", *F32_8, 0), 96), "longer than its"),
    "too short": (
        with_data(header(tensors=1) + entry("a", *F32_8, 0), 31),
        "is truncated: of the tensor .a., F32 .8. of 32 bytes, 31 are there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_header_is_refused_by_name(tmp_path, name):
    data, message = REFUSED[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        GgufFile(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"cannot read .*x\.gguf: No such file"):
        GgufFile(tmp_path / "x.gguf")


def test_version_2_and_another_alignment_and_order_are_read(tmp_path):
    keys = [key("general.alignment", 4, struct.pack("<I", 64))]
    begin = header(version=2, tensors=2, keys=keys)
    begin += entry("late", (8,), 0, 64) + entry("early", (2, 2), 0, 0)
    values = np.arange(8, dtype="<f4")
    body = values[:4].tobytes() + bytes(48) + values.tobytes()
    (tmp_path / "x.gguf").write_bytes(begin + bytes(-len(begin) % 64) + body)
    file = GgufFile(tmp_path / "x.gguf")
    assert list(file.tensors) == ["late", "early"]
    assert file.read("late").tolist() == values.tolist()
    assert file.read("early").tolist() == [[0, 1], [2, 3]]
