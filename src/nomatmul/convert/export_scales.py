"""What an export rounds, and by how much."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.quantise import to_float16

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
