"""What an export rounds, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.matrices import Floats
from nomatmul.formats.files.gguf_blocks import Bytes
from nomatmul.formats.files.gguf_encode import encode_floats, encode_integers
from nomatmul.formats.quantise import (
    fits_float16,
    from_bfloat16,
    quantise_rows,
    to_bfloat16,
    to_float16,
)

INT8_GROUP = 32  # numbers of a block of Q8_0

# Between them float16 keeps all of its 11 bits.
HALF_LEAST, HALF_MOST = 2.0**-14, 65504.0


@dataclass
class Rounding:
    """scale_change: the largest relative change of a scale by rounding to float16, 0 where all are
    float16 numbers; matrices: of how many matrices some scale changed. floats: {published tensor:
    what became of its floats, in words}."""

    scale_change: float = 0.0
    matrices: set[str] = field(default_factory=set)
    floats: dict[str, str] = field(default_factory=dict)

    def half(self, name: str, scale: NDArray[np.float32]) -> NDArray[np.float16]:
        """Scales of a matrix rounded to float16.

        Raises ValueError for one of which nothing would be left.
        """
        stored = to_float16(scale)
        lost = ~np.isfinite(stored) | (stored == 0)
        if lost.any():
            raise ValueError(
                f"{name}: the scale {scale[lost].flat[0]:g} is no number that float16 holds"
                " (6e-08 to 65504); --to unpacked keeps float32"
            )
        change = float(np.max(np.abs(stored.astype(np.float32) - scale) / scale, initial=0.0))
        if change:
            self.matrices.add(name)
        self.scale_change = max(self.scale_change, change)
        return stored

    def rounded(self, name: str, to: str, change: float, largest: float) -> None:
        """Note that floats became another type, by at most `change` of values up to `largest`."""
        words = f"rounded to {to}, by at most {change:.2e} of values up to {largest:.3g}"
        self.floats[name] = words

    def notes(self) -> list[str]:
        """What to tell, a line each."""
        found = [f"{name}: {words}" for name, words in self.floats.items()]
        if self.matrices:
            found.insert(
                0,
                f"scales of {len(self.matrices)} matrices rounded to float16: by at most"
                f" {self.scale_change:.2e} of them",
            )
        return found


def fits_half(scale: NDArray[np.float32]) -> bool:
    """Whether float16 loses no more of these scales than its 11 bits."""
    return bool(np.all((scale >= HALF_LEAST) & (scale <= HALF_MOST)))


def exact_type(blocks: Iterable[Floats]) -> str:
    """The least of F16, BF16 and F32 that holds every value exactly."""
    half = brain = True
    for block in blocks:
        half = half and fits_float16(block)
        brain = brain and not np.any(block.view(np.uint32) & 0xFFFF)
        if not half and not brain:
            return "F32"
    return "F16" if half else "BF16"


def stored_floats(
    name: str, to: str, blocks: Iterable[Floats], rounding: Rounding
) -> Iterator[Bytes]:
    """Rows of a tensor as F32, F16, BF16 or Q8_0, block by block; what that changes is noted.

    Raises ValueError for a value that float16 has not.
    """
    changed = largest = 0.0
    for block in blocks:
        data, kept = _stored(name, to, block)
        changed = max(changed, float(np.abs(kept - block).max(initial=0.0)))
        largest = max(largest, float(np.abs(block).max(initial=0.0)))
        yield data
    if changed:
        rounding.rounded(name, to, changed, largest)


def _stored(name: str, to: str, block: Floats) -> tuple[Bytes, Floats]:
    """(bytes, the values for which they stand)."""
    if to == "Q8_0":
        values, scale = quantise_rows(block.reshape(-1, INT8_GROUP))
        half = to_float16(scale)
        kept = (values * half.astype(np.float32)[:, None]).reshape(block.shape)
        return encode_integers(to, values.reshape(block.shape), half.reshape(len(block), -1)), kept
    kept = block
    if to == "BF16":
        kept = from_bfloat16(to_bfloat16(block))
    elif to == "F16":
        kept = to_float16(block).astype(np.float32)
        if not np.isfinite(kept).all():
            raise ValueError(
                f"{name}: float16 cannot hold {np.abs(block).max():g}, only up to 65504"
                " (--embedding bf16 can)"
            )
    return encode_floats(to, block), kept
