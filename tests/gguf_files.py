"""GGUF files for tests, written by the `gguf` package; of types that it does not know, as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


def add_blocks(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], number: int, blocks: Any
):
    """Add a tensor of any type from its bytes."""
    writer.add_tensor(name, blocks.view(np.int8), raw_shape=shape, raw_dtype=number)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_blocks(path: Path, tensors: dict[str, tuple[int, tuple[int, ...], Any]]) -> Path:
    """Write a file of {name: (ggml's number of the type, shape, bytes)}."""
    writer = gguf.GGUFWriter(path, "qwen3")
    for name, (number, shape, blocks) in tensors.items():
        add_blocks(writer, name, shape, number, np.asarray(blocks))
    finish(writer)
    return path


def random_blocks(
    rng: np.random.Generator, count: int, size: int, scale_at: int | None
) -> NDArray[np.uint8]:
    """Blocks [count, size] of random bytes, with a finite float16 scale at a byte of each."""
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if scale_at is not None:
        scale = (0.5 + rng.random(count)).astype("<f2")
        blocks[:, scale_at : scale_at + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks


def without_twos(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes of 2-bit codes in which no code is 3."""
    high = codes & (codes >> 1) & 0x55
    return codes & ~high
