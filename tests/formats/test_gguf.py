"""GGUF files: types of weights against the `gguf` package or the layout in words, and refusals."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf_files import finish, random_blocks, without_twos, write_blocks

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile

KNOWN = {
    "Q4_0": 0,
    "Q8_0": 0,
    "Q6_K": 208,
    "TQ1_0": 52,
    "TQ2_0": 64,
}  # byte of the float16 scale


def known_blocks(rng, name, rows, columns):
    number = gguf.GGMLQuantizationType[name]
    group, size = gguf.GGML_QUANT_SIZES[number]
    blocks = random_blocks(rng, rows * columns // group, size, KNOWN[name])
    if name == "TQ2_0":
        blocks[:, :64] = without_twos(blocks[:, :64])
    return number, blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_are_what_the_gguf_package_makes_of_them(tmp_path, rng, name):
    number, blocks = known_blocks(rng, name, 6, 512)
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, (6, 512), blocks)}))
    wanted = gguf.quants.dequantize(blocks, number)
    assert file.tensors["w"].type == name
    np.testing.assert_array_equal(file.read("w"), wanted)
    np.testing.assert_array_equal(file.read("w", slice(1, 4)), wanted[1:4])
    assert file.read("w", slice(4, 4)).shape == (0, 512)


# Of types with several scales a block: the bytes of its float16 numbers.
SEVERAL = {
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_blocks_with_several_scales(tmp_path, rng, name):
    number, shape = gguf.GGMLQuantizationType[name], (5, 512)
    group, size = gguf.GGML_QUANT_SIZES[number]
    blocks = random_blocks(rng, 5 * 512 // group, size, None)
    for at in SEVERAL[name]:
        blocks[:, at : at + 2] = random_blocks(rng, len(blocks), 2, 0)
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, shape, blocks)}))
    wanted = gguf.quants.dequantize(blocks.reshape(5, -1), number)
    np.testing.assert_array_equal(file.read("w"), wanted)
    assert file.quantised("w") is None


def test_signs_alone(tmp_path, rng):
    """Q1_0: a scale for 128 bits, the lowest first; only a scale of 0 says zeros."""
    blocks = random_blocks(rng, 6, 18, 0)
    blocks[1, :2] = 0
    blocks[2, :2] = np.array([-0.5], "<f2").view(np.uint8)
    table = {"w": (41, (3, 256), blocks), "v": (0, (4,), np.ones(4, np.float32))}
    file = GgufFile(write_blocks(tmp_path / "x.gguf", table))
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    bits = [[block[2 + j // 8] >> j % 8 & 1 for j in range(128)] for block in blocks]
    wanted = (scale * (2 * np.array(bits, np.float32) - 1)).reshape(3, 256)
    np.testing.assert_array_equal(file.read("w"), wanted)
    found = file.quantised("w")
    assert (found.kind, found.group, bool((found.scale > 0).all())) == ("ternary", 128, True)
    np.testing.assert_array_equal(found.floats(), wanted)
    assert not found.read(slice(0, 1))[0, 128:].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bf16"])
def test_floats(tmp_path, rng, dtype):
    values = rng.standard_normal((3, 4, 8)).astype(
        np.float16 if dtype == np.float16 else np.float32
    )
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    if dtype == "bf16":
        values.view(np.uint32)[:] &= 0xFFFF0000
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        writer.add_tensor("w", stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor("w", values)
    writer.add_tensor("v", values[0, 0].astype(np.float32))
    finish(writer)
    file = GgufFile(tmp_path / "x.gguf")
    np.testing.assert_array_equal(file.read("w"), values.astype(np.float32))
    np.testing.assert_array_equal(file.read("w", slice(1, 3)), values[1:3].astype(np.float32))
    np.testing.assert_array_equal(file.read("v"), values[0, 0].astype(np.float32))
    np.testing.assert_array_equal(file.read("v", slice(2, 5)), values[0, 0, 2:5].astype(np.float32))
    assert file.quantised("w") is None


def two_bit(block, j):
    """Q2_0, PQ2_0: the scale first, weight j in bits 2 (j mod 4) of byte j div 4."""
    return ((block[2 + j // 4] >> 2 * (j % 4)) & 3) - 1


def digit(byte, n):
    """Digit n of ternary digits in a byte, which is a fraction in units of 1 / 256."""
    return (byte * 3**n % 256 * 3) // 256 - 1


def ptq1(block, j):
    """PTQ1_0: 16 bytes of five digits, 8 bytes of five, 2 of four; then the scale."""
    if j < 80:
        return digit(block[j % 16], j // 16)
    if j < 120:
        return digit(block[16 + (j - 80) % 8], (j - 80) // 8)
    return digit(block[24 + (j - 120) % 2], (j - 120) // 2)


def i2_s(block, j):
    """I2_S: c[j] << 6 | c[32 + j] << 4 | c[64 + j] << 2 | c[96 + j]."""
    return ((block[j % 32] >> (6 - 2 * (j // 32))) & 3) - 1


# name: number, weights and bytes of a block, byte of its scale, bytes of codes, weight of a block
LAYOUTS = {
    "Q2_0/64": (42, 64, 18, 0, slice(2, 18), two_bit),
    "Q2_0/128": (42, 128, 34, 0, slice(2, 34), two_bit),
    "PQ2_0": (142, 128, 34, 0, slice(2, 34), two_bit),
    "PTQ1_0": (143, 128, 28, 26, None, ptq1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ternary_blocks_that_the_gguf_package_does_not_know(tmp_path, rng, layout):
    number, group, size, scale_at, codes, weight = LAYOUTS[layout]
    shape = (20, 256)
    blocks = random_blocks(rng, 20 * 256 // group, size, scale_at)
    if codes is not None:
        blocks[:, codes] = without_twos(blocks[:, codes])
    table = {"w": (number, shape, blocks), "v": (0, (4,), np.ones(4, np.float32))}
    file = GgufFile(write_blocks(tmp_path / "x.gguf", table))
    scale = np.ascontiguousarray(blocks[:, scale_at : scale_at + 2]).view("<f2").astype(np.float32)
    values = np.array([[weight(b, j) for j in range(group)] for b in blocks.astype(int)])
    found = file.quantised("w")
    assert (found.kind, found.shape, found.group) == ("ternary", shape, group)
    np.testing.assert_array_equal(found.scale, scale.reshape(20, -1))
    np.testing.assert_array_equal(found.read(slice(None)), values.reshape(shape))
    np.testing.assert_array_equal(found.read(slice(3, 9)), values.reshape(shape)[3:9])
    np.testing.assert_array_equal(file.read("w"), (values * scale).reshape(shape))


# Two blocks of Q2_0 and what llama.cpp's dequantize_row_q2_0 made of them (ggml 0.25.3).
Q2_0_BYTES = "00385999a650aa2a85661585906950454859003ea02689a262008a29a4aa6a60504a5a64"
Q2_0_SIGNS = (
    "0+000+0++0++--00+++++++-00-++0+0000-00-+--0+0++0--0000-0-+-00+00"
    "--+++0+-0+-++-+++-+0----++-+0++--0+++++++++0--+0--00++-0++00-0+0"
)


def test_blocks_that_llama_cpp_read(tmp_path):
    blocks = np.frombuffer(bytes.fromhex(Q2_0_BYTES), np.uint8)
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (42, (2, 64), blocks)}))
    signs = np.array(["-0+".index(sign) - 1 for sign in Q2_0_SIGNS]).reshape(2, 64)
    found = file.quantised("w")
    np.testing.assert_array_equal(found.read(slice(None)), signs)
    assert found.scale.tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize("tail", [4, 32])
def test_one_scale_behind_all_blocks(tmp_path, rng, tail):
    blocks = without_twos(rng.integers(0, 256, (8, 32), dtype=np.uint8))
    behind = np.zeros(tail, np.uint8)
    behind[:4] = np.array([0.375], "<f4").view(np.uint8)
    data = np.concatenate([blocks.reshape(-1), behind])
    path = write_blocks(tmp_path / "x.gguf", {"w": (36, (4, 256), data)})
    for content in (path.read_bytes(), path.read_bytes()[: tail - 32 or None]):  # not padded
        path.write_bytes(content)
        file = GgufFile(path)
        values = [[i2_s(b, j) for j in range(128)] for b in blocks.astype(int)]
        found = file.quantised("w")
        assert (found.kind, found.group, found.scale.tolist()) == ("ternary", 0, [0.375])
        np.testing.assert_array_equal(found.read(slice(None)), np.reshape(values, (4, 256)))
        np.testing.assert_array_equal(file.read("w"), np.reshape(values, (4, 256)) * 0.375)


@pytest.mark.parametrize("name", ["Q8_0", "TQ1_0", "TQ2_0"])
def test_whole_numbers_and_scales_are_the_floats(tmp_path, rng, name):
    number, blocks = known_blocks(rng, name, 6, 512)
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, (6, 512), blocks)}))
    found = file.quantised("w")
    group = 32 if name == "Q8_0" else 256
    assert (found.kind, found.group) == ("int8" if name == "Q8_0" else "ternary", group)
    assert found.scale.shape == (6, 512 // group)
    values = found.read(slice(None)).astype(np.float32).reshape(-1, group)
    np.testing.assert_array_equal(
        (values * found.scale.reshape(-1, 1)).reshape(6, 512), file.read("w")
    )


def with_scales(blocks, at, scales):
    """Blocks [rows, bytes] whose first rows begin with blocks of these scales."""
    for row, scale in enumerate(scales):
        blocks[row, at : at + 2] = np.array([scale], "<f2").view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", ["Q8_0", "TQ2_0"])
def test_scales_below_zero_and_of_blocks_of_zeros_become_legal(tmp_path, rng, name):
    number, blocks = known_blocks(rng, name, 3, 512)
    if name == "Q8_0":
        blocks[blocks == 128] = 1
        blocks[1, 2:34] = 0
    else:
        blocks[1, :64] = 0b01010101
    with_scales(blocks, KNOWN[name], [-0.75, 0.0])
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, (3, 512), blocks)}))
    found = file.quantised("w")
    assert found.scale[:2, 0].tolist() == [0.75, 0.75]
    values = found.read(slice(None)).astype(np.float32).reshape(3, -1, found.group)
    wanted = gguf.quants.dequantize(blocks, number)
    np.testing.assert_array_equal((values * found.scale[:, :, None]).reshape(3, -1), wanted)
    np.testing.assert_array_equal(file.read("w"), wanted)
    np.testing.assert_array_equal(found.read(slice(1, 3)), values[1:].reshape(2, -1))


@pytest.mark.parametrize("name", ["Q8_0", "TQ2_0"])
def test_a_scale_of_zero_beside_values_is_refused(tmp_path, rng, name):
    number, blocks = known_blocks(rng, name, 3, 512)
    with_scales(blocks, KNOWN[name], [0.5, 0.0])
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, (3, 512), blocks)}))
    found = file.quantised("w")
    assert found.read(slice(0, 1)).any()
    for use in (lambda: found.read(slice(1, 2)), lambda: file.read("w")):
        with pytest.raises(FormatError, match="w has a scale of 0 beside values that are not 0"):
            use()


def test_only_scales_of_zero(tmp_path):
    blocks = np.full((2, 66), 0b01010101, np.uint8)
    blocks[:, 64:] = 0
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (35, (2, 256), blocks)}))
    assert file.quantised("w").scale.tolist() == [[1.0], [1.0]]
    assert not file.quantised("w").read(slice(None)).any()


def test_a_value_that_cannot_change_its_sign_is_refused(tmp_path):
    blocks = np.full((2, 34), 0x80, np.uint8)
    with_scales(blocks, 0, [1.0, -1.0])
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (8, (2, 32), blocks)}))
    assert file.quantised("w").read(slice(0, 1)).min() == -128
    with pytest.raises(FormatError, match="w holds -128 with a scale below 0"):
        file.quantised("w").read(slice(1, 2))


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(tmp_path, rng, scale):
    number, blocks = known_blocks(rng, "TQ2_0", 2, 256)
    blocks[1, 64:66] = np.array([scale], "<f2").view(np.uint8)
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, (2, 256), blocks)}))
    for use in (file.read, file.quantised):
        with pytest.raises(FormatError, match="w holds a value that is not finite"):
            use("w")


@pytest.mark.parametrize("layout", ["TQ2_0", "Q2_0/64", "PQ2_0", "I2_S"])
def test_a_code_that_is_not_ternary_is_refused(tmp_path, rng, layout):
    number, group, size, at = {
        "TQ2_0": (35, 256, 66, 64), "Q2_0/64": (42, 64, 18, 0),
        "PQ2_0": (142, 128, 34, 0), "I2_S": (36, 128, 32, None),
    }[layout]  # fmt: skip
    blocks = np.zeros((4 * 512 // group, size), np.uint8)
    blocks[-1, 5] = 0xC0
    data = blocks.reshape(-1)
    if at is None:
        data = np.concatenate([data, np.ones(8, "<f4").view(np.uint8)])
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (number, (4, 512), data)}))
    for read in (file.read, lambda name: file.quantised(name).read(slice(None))):
        with pytest.raises(FormatError, match=r"w is .* but not ternary: 0\.05% of its codes"):
            read("w")


def test_a_group_that_the_bytes_do_not_tell_is_refused(tmp_path):
    blocks = np.zeros(68, np.uint8)  # 2 rows of 128: 68 or 72 bytes, both padded to 96
    table = {"w": (42, (2, 128), blocks), "v": (0, (4,), np.ones(4, np.float32))}
    with pytest.raises(FormatError, match=r"'w' is Q2_0 in 96 bytes, .* of 64 and of 128 weights"):
        GgufFile(write_blocks(tmp_path / "x.gguf", table))


@pytest.mark.parametrize("nbytes", [1120, 1184])
def test_q2_0_of_another_size_is_refused(tmp_path, nbytes):
    table = {
        "w": (42, (8, 512), np.zeros(nbytes, np.uint8)),
        "v": (0, (4,), np.ones(4, np.float32)),
    }
    with pytest.raises(FormatError, match=r"'w' is Q2_0 \[8, 512\] of 1152 or 1088 bytes, but"):
        GgufFile(write_blocks(tmp_path / "x.gguf", table))


def test_i2_s_of_another_size_is_refused(tmp_path):
    """One scale a block, as some forks write it."""
    table = {
        "w": (36, (8, 256), np.zeros(16 * 36, np.uint8)),
        "v": (0, (4,), np.ones(4, np.float32)),
    }
    with pytest.raises(FormatError, match=r"'w' is I2_S .* layout that is not known"):
        GgufFile(write_blocks(tmp_path / "x.gguf", table))


@pytest.mark.parametrize(
    ("number", "name"), [(16, "IQ2_XXS"), (39, "MXFP4, or TL2 in bitnet.cpp"), (99, "number 99")]
)
def test_types_that_are_not_read_are_named(tmp_path, number, name):
    with pytest.raises(FormatError, match=f"'w' is of the type {name}, which is not read"):
        GgufFile(
            write_blocks(tmp_path / "x.gguf", {"w": (number, (1, 256), np.zeros(32, np.uint8))})
        )


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path):
    with pytest.raises(FormatError, match="'w' has rows of 192 weights, but TQ2_0 has blocks of"):
        GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (35, (4, 192), np.zeros(198, np.uint8))}))


def test_an_absent_tensor_is_named(tmp_path):
    file = GgufFile(write_blocks(tmp_path / "x.gguf", {"w": (0, (4,), np.ones(4, np.float32))}))
    for use in (file.read, file.quantised):
        with pytest.raises(FormatError, match="holds no tensor 'v'"):
            use("v")
