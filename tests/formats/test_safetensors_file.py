"""Files of safetensors: what the header says is checked, and the library reads the same."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from model_files import PUBLISHED, random_tensors
from safetensors.numpy import save_file

from nomatmul.formats.files.safetensors import SafetensorsFile
from nomatmul.formats.published import config_from_published


@pytest.mark.train
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits(tmp_path, dtype):
    """Every number that the type has, as torch reads it; what is none is refused."""
    import torch
    from safetensors.torch import save_file as save_torch

    stored = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    wanted = stored.float().numpy()
    finite = torch.from_numpy(np.isfinite(wanted))
    numbers = stored.view(torch.uint8)[finite].view(stored.dtype)
    save_torch({"all": stored, "finite": numbers}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.read_float32("finite"), wanted[np.isfinite(wanted)])
    np.testing.assert_array_equal(file.read_float32("finite", slice(3, 9)), wanted[3:9])
    with pytest.raises(ValueError, match="not finite"):
        file.read_float32("all")


HEADERS = [
    (b"", "has only 0 bytes"),
    (b"\0" * 7, "has only 7 bytes"),
    (b"GGUF\3\0\0\0" + b"\0" * 50, "truncated or no safetensors file"),
    (struct.pack("<Q", 1 << 60), "claims a header of"),
    (struct.pack("<Q", 0), "its header is no JSON object"),
    (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
    (struct.pack("<Q", 3) + b"{,}", "is not valid JSON"),
    (b'{"a":1}', "is malformed"),
    (b'{"__metadata__":{"a":1}}', "must map names to strings"),
    (b'{"__metadata__":[]}', "must map names to strings"),
]
ENTRY = b'{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}%s}'
ENTRIES = [
    ((b"F31", b"[1]", b"[0,4]", b""), 4, "unknown dtype"),
    ((b"F32", b"[1.5]", b"[0,4]", b""), 4, "malformed shape"),
    ((b"F32", b"[-1]", b"[0,4]", b""), 4, "malformed shape"),
    ((b"F32", b"[true]", b"[0,4]", b""), 4, "malformed shape"),
    ((b"F32", b"[1]", b"[0]", b""), 4, "malformed shape or data range"),
    ((b"F32", b"[2]", b"[0,4]", b""), 4, "8 bytes, but its range"),
    ((b"F32", b"[1]", b"[4,0]", b""), 4, "but its range"),
    ((b"F32", b"[1]", b"[4,8]", b""), 8, "leaves a gap"),
    ((b"F32", b"[4611686018427387903]", b"[0,4]", b""), 4, "but its range"),
    ((b"F32", b"[1]", b"[0,4]", b""), 3, "truncated"),
    ((b"F32", b"[1]", b"[0,4]", b""), 5, "longer than its header says"),
    ((b"F32", b"[1]", b"[0,4]", b',"a":{}'), 4, "appears twice"),
    (
        (b"F32", b"[2]", b"[0,8]", b',"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'),
        8,
        "overlaps another tensor",
    ),
]


@pytest.mark.parametrize(("data", "message"), HEADERS)
def test_headers_that_are_wrong(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data if data.startswith(b"{") else data)
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(("entry", "size", "message"), ENTRIES)
def test_header_entries_that_lie(tmp_path, entry, size, message):
    path = tmp_path / "x.safetensors"
    header = ENTRY % entry
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


def test_the_reader_agrees_with_the_library(tmp_path, rng):
    tensors = random_tensors(config_from_published(PUBLISHED), rng)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    tensors["scalar"] = np.array(2.5, dtype=np.float32)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "np"}
    for name, values in tensors.items():
        np.testing.assert_array_equal(file.read(name), values)
        buffer = bytearray(file.infos[name].nbytes)
        file.read_into(name, buffer)
        assert bytes(buffer) == values.tobytes()
    with pytest.raises(ValueError, match="holds no tensor 'nothing'"):
        file.read("nothing")
    with pytest.raises(ValueError, match="the buffer 3"):
        file.read_into("scalar", bytearray(3))
