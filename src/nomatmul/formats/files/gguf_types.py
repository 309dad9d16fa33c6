"""How ggml lays out blocks of weights: the types of tensors that are read, one function a layout.

Facts: ggml-common.h and ggml-quants.c of llama.cpp; bitnet.cpp for I2_S; PrismML's fork for
PQ2_0 and PTQ1_0. A block is `size` bytes and holds `group` consecutive weights of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.files import gguf_blocks
from nomatmul.formats.files.gguf_blocks import Bytes, Floats
from nomatmul.formats.quantise import from_bfloat16


@dataclass(frozen=True)
class BlockType:
    """One type of tensor.

    kind: "ternary", "int8", or "float" for what has no scale that belongs to a whole block.
    decode: blocks [n, size] -> their weights [n, group]: float32 of kind "float", else int8, in
    which 2 stands for a code that is not ternary. scale_at: byte of a block's float16 scale.
    tail: bytes behind the last block. signs: are the codes signs alone, so that a block of zeros
    is one whose scale is 0?
    """

    name: str
    kind: str
    group: int
    size: int
    decode: Callable[[Bytes], NDArray[np.float32] | NDArray[np.int8]]
    scale_at: int = 0
    tail: int = 0
    signs: bool = False


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return from_bfloat16(np.ascontiguousarray(blocks).view("<u2"))


def _q8_0(blocks: Bytes) -> NDArray[np.int8]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _trits(blocks: Bytes, stages: tuple[tuple[int, int, int], ...]) -> NDArray[np.int8]:
    """Ternary digits, stage by stage (first byte, bytes, digits a byte): all bytes' first digits,
    then all their second ones. A byte is a fraction in units of 1 / 256: three times it, and what
    is whole is the next digit.
    """
    parts = []
    for first, width, digits in stages:
        rest = blocks[:, first : first + width].astype(np.uint16)
        part = np.empty((len(blocks), digits, width), np.int8)
        for n in range(digits):
            rest *= 3
            part[:, n] = rest >> 8
            rest &= 255
        part -= 1
        parts.append(part.reshape(len(blocks), -1))
    return np.concatenate(parts, axis=1)


def _planes(blocks: Bytes, shifts: tuple[int, ...]) -> NDArray[np.int8]:
    """2-bit codes of 32 bytes at a time: all codes at the first shift, then at the second, ..."""
    runs = blocks[:, : blocks.shape[1] // 32 * 32].reshape(len(blocks), -1, 1, 32)
    codes = (runs >> np.array(shifts, np.uint8)[:, None]) & 3
    return codes.reshape(len(blocks), -1).view(np.int8) - np.int8(1)


# The four weights of a byte of 2-bit codes, the lowest bits first, as one number.
_FOURS = ((np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3) - 1
_FOURS = np.ascontiguousarray(_FOURS.astype(np.int8)).view(np.uint32)[:, 0]


def _in_order(blocks: Bytes) -> NDArray[np.int8]:
    """2-bit codes behind a scale, weight j in bits 2 * (j % 4) of byte j // 4."""
    weights: NDArray[np.int8] = _FOURS[blocks[:, 2:]].view(np.int8)
    return weights


def _signs(blocks: Bytes) -> NDArray[np.int8]:
    """A bit a weight behind a scale, the lowest first: set for +1, else -1."""
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").view(np.int8)
    return bits * np.int8(2) - np.int8(1)


_TQ1 = partial(_trits, stages=((0, 32, 5), (32, 16, 5), (48, 4, 4)))
_PTQ1 = partial(_trits, stages=((0, 16, 5), (16, 8, 5), (24, 2, 4)))
_TQ2 = partial(_planes, shifts=(0, 2, 4, 6))
_I2S = partial(_planes, shifts=(6, 4, 2, 0))


def _i2_s(tail: int) -> BlockType:
    """One float32 scale stands behind all blocks, at the start of the tail."""
    return BlockType("I2_S", "ternary", 128, 32, _I2S, tail=tail)


# ggml's number of a type -> its layouts. Where one number stands for two (Q2_0 has 64 weights a
# block in llama.cpp, 128 in older forks), the tensor's bytes say which it is.
TYPES: dict[int, tuple[BlockType, ...]] = {
    0: (BlockType("F32", "float", 1, 4, _f32),),
    1: (BlockType("F16", "float", 1, 2, _f16),),
    2: (BlockType("Q4_0", "float", 32, 18, gguf_blocks.q4_0),),
    3: (BlockType("Q4_1", "float", 32, 20, gguf_blocks.q4_1),),
    6: (BlockType("Q5_0", "float", 32, 22, gguf_blocks.q5_0),),
    7: (BlockType("Q5_1", "float", 32, 24, gguf_blocks.q5_1),),
    8: (BlockType("Q8_0", "int8", 32, 34, _q8_0),),
    10: (BlockType("Q2_K", "float", 256, 84, gguf_blocks.q2_k),),
    11: (BlockType("Q3_K", "float", 256, 110, gguf_blocks.q3_k),),
    12: (BlockType("Q4_K", "float", 256, 144, gguf_blocks.q4_k),),
    13: (BlockType("Q5_K", "float", 256, 176, gguf_blocks.q5_k),),
    14: (BlockType("Q6_K", "float", 256, 210, gguf_blocks.q6_k),),
    20: (BlockType("IQ4_NL", "float", 32, 18, gguf_blocks.iq4_nl),),
    23: (BlockType("IQ4_XS", "float", 256, 136, gguf_blocks.iq4_xs),),
    30: (BlockType("BF16", "float", 1, 2, _bf16),),
    34: (BlockType("TQ1_0", "ternary", 256, 54, _TQ1, scale_at=52),),
    35: (BlockType("TQ2_0", "ternary", 256, 66, _TQ2, scale_at=64),),
    # bitnet.cpp on x86. On Arm it wrote blocks of 64 in as many bytes: files of it look the same.
    36: (_i2_s(tail=32), _i2_s(tail=4)),
    41: (BlockType("Q1_0", "ternary", 128, 18, _signs, signs=True),),
    42: (
        BlockType("Q2_0", "ternary", 64, 18, _in_order),
        BlockType("Q2_0", "ternary", 128, 34, _in_order),
    ),
    142: (BlockType("PQ2_0", "ternary", 128, 34, _in_order),),
    143: (BlockType("PTQ1_0", "ternary", 128, 28, _PTQ1, scale_at=26),),
}
# Types of llama.cpp and bitnet.cpp that are not read, to name them in the refusal.
_OTHERS = (
    *((9, "Q8_1"), (15, "Q8_K"), (16, "IQ2_XXS"), (17, "IQ2_XS"), (18, "IQ3_XXS"), (19, "IQ1_S")),
    *((21, "IQ3_S"), (22, "IQ2_S"), (24, "I8"), (25, "I16"), (26, "I32"), (27, "I64"), (28, "F64")),
    *((29, "IQ1_M"), (38, "TL1"), (39, "MXFP4, or TL2 in bitnet.cpp"), (40, "NVFP4")),
)
OTHER_NAMES = dict(_OTHERS)
