"""ggml's blocks whose weights have more than one scale, or a minimum: what each makes of its bytes.

Facts: ggml-common.h and ggml-quants.c of llama.cpp. Such types hold embeddings and heads beside
ternary matrices, where rows that no 256 divides make llama.cpp fall back to blocks of 32.
Each function takes blocks [n, bytes] and returns weights, float32 [n, weights].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# The magnitudes of IQ4_NL's and IQ4_XS's codes.
_NON_LINEAR = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)


def half(blocks: Bytes, at: int) -> Floats:
    """The float16 numbers at byte `at` of each block, as float32 [n]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32)


def q4_0(blocks: Bytes) -> Floats:
    values: Floats = half(blocks, 0)[:, None] * (_nibbles(blocks[:, 2:]) - np.float32(8))
    return values


def q4_1(blocks: Bytes) -> Floats:
    values: Floats = half(blocks, 0)[:, None] * _nibbles(blocks[:, 4:])
    return values + half(blocks, 2)[:, None]


def q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) + _fifth_bits(blocks[:, 2:6])
    values: Floats = half(blocks, 0)[:, None] * (codes - np.float32(16))
    return values


def q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) + _fifth_bits(blocks[:, 4:8])
    return half(blocks, 0)[:, None] * codes + half(blocks, 2)[:, None]


def _halves(codes: Bytes, axis: int = 1) -> Bytes:
    """The low halves of all bytes, then, along the axis, the high ones."""
    found: Bytes = np.concatenate([codes & 15, codes >> 4], axis=axis)
    return found


def _nibbles(codes: Bytes) -> Floats:
    return _halves(codes).astype(np.float32)


def _fifth_bits(masks: Bytes) -> Floats:
    """16 where a weight's bit is set, lowest first."""
    bits: Floats = np.unpackbits(masks, axis=1, bitorder="little").astype(np.float32)
    return bits * np.float32(16)


def iq4_nl(blocks: Bytes) -> Floats:
    values: Floats = half(blocks, 0)[:, None] * _NON_LINEAR[_halves(blocks[:, 2:])]
    return values


def iq4_xs(blocks: Bytes) -> Floats:
    """Eight sub-blocks of 32, whose 6-bit scales lie as 4 low bits apart from 2 high ones."""
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    high = ((blocks[:, 2:4, None] >> shifts) & 3).reshape(-1, 8)
    scales = (low | (high << 4)).astype(np.float32) - np.float32(32)
    step: Floats = half(blocks, 0)[:, None] * scales
    codes = _halves(blocks[:, 8:].reshape(-1, 8, 16), axis=2)
    values: Floats = step[:, :, None] * _NON_LINEAR[codes]
    return values.reshape(-1, 256)


def _two_bits(codes: Bytes) -> Bytes:
    """Of 32 bytes at a time: all codes at the lowest two bits, then at the next, [n, 16, 16]."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    found: Bytes = (codes.reshape(len(codes), -1, 1, 32) >> shifts) & np.uint8(3)
    return found.reshape(len(codes), 16, 16)


def q2_k(blocks: Bytes) -> Floats:
    """Sixteen sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum."""
    step = half(blocks, 80)[:, None] * (blocks[:, :16] & 15).astype(np.float32)
    least = half(blocks, 82)[:, None] * (blocks[:, :16] >> 4).astype(np.float32)
    codes = _two_bits(blocks[:, 16:80]).astype(np.float32)
    values: Floats = step[:, :, None] * codes - least[:, :, None]
    return values.reshape(-1, 256)


def q3_k(blocks: Bytes) -> Floats:
    """Sixteen sub-blocks of 16, each with a 6-bit scale; the third bit of a code takes off 4 where
    it is not set."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = _halves(blocks[:, 96:104])
    high = ((blocks[:, None, 104:108] >> shifts) & 3).reshape(-1, 16)
    scales = (low | (high << 4)).astype(np.float32) - np.float32(32)
    step: Floats = half(blocks, 108)[:, None] * scales
    bits = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    third = bits.reshape(-1, 16, 16).astype(np.float32)
    codes = _two_bits(blocks[:, 32:96]).astype(np.float32) + np.float32(4) * third - np.float32(4)
    values: Floats = step[:, :, None] * codes
    return values.reshape(-1, 256)


def q4_k(blocks: Bytes) -> Floats:
    """Eight sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum."""
    return _with_minima(blocks, _eighths(blocks[:, 16:]).astype(np.float32))


def q5_k(blocks: Bytes) -> Floats:
    """As Q4_K, with a fifth bit of all codes apart."""
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _with_minima(blocks, (_eighths(blocks[:, 48:]) | (bits << 4)).astype(np.float32))


def _eighths(codes: Bytes) -> Bytes:
    """Of 32 bytes at a time: the low halves, then the high ones, [n, 8, 32]."""
    return _halves(codes.reshape(-1, 4, 1, 32), axis=2).reshape(-1, 8, 32)


def _with_minima(blocks: Bytes, codes: Floats) -> Floats:
    """Codes [n, 8, 32] times the scales at the start of blocks, less their minima."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    step = half(blocks, 0)[:, None] * scales.astype(np.float32)
    least = half(blocks, 2)[:, None] * minima.astype(np.float32)
    values: Floats = step[:, :, None] * codes - least[:, :, None]
    return values.reshape(-1, 256)


def q6_k(blocks: Bytes) -> Floats:
    """Sixteen sub-blocks of 16, each with an int8 scale; 4 low bits apart from 2 high ones."""
    low = _halves(blocks[:, :128].reshape(-1, 2, 1, 64), axis=2).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 8, 32)
    codes = (low | (high << 4)).astype(np.float32) - np.float32(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    step: Floats = half(blocks, 208)[:, None] * scales
    values: Floats = step[:, :, None] * codes.reshape(-1, 16, 16)
    return values.reshape(-1, 256)
