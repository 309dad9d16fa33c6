"""Lower bounds of MLGRU's forget gates, from the learned table to the values the gate uses.

Legend: L layers, D hidden size. Source: arXiv 2406.02528 and its published code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cumulative_lower_bounds(table_LD: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return float32 [L, D]: p = softmax over layers; bounds = cumsum(p) - p[0].

    The first row is exactly zero. Computed in float64 and rounded once.
    """
    table = np.asarray(table_LD, dtype=np.float64)
    p_LD = np.exp(table - table.max(axis=0, keepdims=True))
    p_LD /= p_LD.sum(axis=0, keepdims=True)
    bounds_LD: NDArray[np.float32] = (np.cumsum(p_LD, axis=0) - p_LD[0]).astype(np.float32)
    return bounds_LD
