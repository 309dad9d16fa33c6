"""Rows of a matrix as ggml's blocks: what `gguf_types` reads, written.

A type that holds whole numbers gets them as they are, with float16 scales; nothing is rounded here.
Legend: n rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.files.gguf_blocks import Bytes
from nomatmul.formats.files.gguf_types import TYPES
from nomatmul.formats.packing import pack_ternary
from nomatmul.formats.quantise import to_bfloat16, to_float16

# Name -> (ggml's number, which of its layouts is written).
_WRITTEN = {
    "F32": (0, 0),
    "F16": (1, 0),
    "Q8_0": (8, 0),
    "BF16": (30, 0),
    "TQ2_0": (35, 0),
    "Q2_0": (42, 0),
    "PQ2_0": (142, 0),
}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class WrittenType:
    """A type of tensor that is written: ggml's number, weights and bytes of a block."""

    name: str
    number: int
    group: int
    size: int


def _written(name: str) -> WrittenType:
    number, which = _WRITTEN[name]
    layout = TYPES[number][which]
    assert layout.name == name
    return WrittenType(name, number, layout.group, layout.size)


WRITTEN = {name: _written(name) for name in _WRITTEN}


def encode_floats(name: str, values: NDArray[np.float32]) -> Bytes:
    """Float32 [n, K] or [K] as F32, F16 or BF16, rounded to nearest: bytes."""
    if name == "BF16":
        stored: NDArray[np.generic] = to_bfloat16(values).astype("<u2")
    else:
        stored = to_float16(values) if name == "F16" else values.astype("<f4", copy=False)
    return np.ascontiguousarray(stored).view(np.uint8).reshape(-1)


def encode_integers(name: str, values: NDArray[np.int8], scale: NDArray[np.float16]) -> Bytes:
    """Int8 [n, K] with a scale for each block [n, K / group] as TQ2_0, PQ2_0, Q2_0 or Q8_0: bytes.

    Ternary types take -1, 0 and 1. Raises ValueError for other values.
    """
    blocks = len(values) * values.shape[1] // WRITTEN[name].group
    scales = np.ascontiguousarray(scale, "<f2").view(np.uint8).reshape(blocks, 2)
    if name == "Q8_0":
        codes = np.ascontiguousarray(values).view(np.uint8).reshape(blocks, -1)
    elif name == "TQ2_0":
        codes = _planes(values)
    else:  # exactly the order of our packed rows, which are padded
        codes = pack_ternary(values, "2bit")[:, : values.shape[1] // 4].reshape(blocks, -1)
    parts = [codes, scales] if name == "TQ2_0" else [scales, codes]
    return np.concatenate(parts, axis=1).reshape(-1)


def _planes(values: NDArray[np.int8]) -> Bytes:
    """2-bit codes of 128 weights in 32 bytes: weight 32 l + m in bits 2 l of byte m."""
    if values.size and (values.min() < -1 or values.max() > 1):
        raise ValueError(f"ternary weights must lie in -1..1, found {values.min()}..{values.max()}")
    runs = (values + np.int8(1)).view(np.uint8).reshape(-1, 2, 4, 32)
    places = runs << np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes: Bytes = np.bitwise_or.reduce(places, axis=2)
    return codes.reshape(len(runs), 64)
