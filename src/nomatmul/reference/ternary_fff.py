"""The ternary FFF of docs/numerics.md in plain numpy: trees of neurons, decided on integers.

Legend: V rows (trees * nodes of a tree), D hidden size, L levels (depth + 1), A active rows of a
token (trees * L); `...` any leading shape (tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.quantise import quantise_activation
from nomatmul.reference.ops import Float, rms_norm, silu, ternary_product


def walk_trees(acc: NDArray[np.int32], trees: int, depth: int) -> NDArray[np.int32]:
    """Return the rows that each token visits, int32 [..., trees * (depth + 1)], tree by tree.

    acc int32 [..., V]: every row's product with the token. A product above 0 goes to the right
    child 2j + 2, all else (0 among it) to the left child 2j + 1 (arXiv 2311.10770, algorithm 1).
    """
    nodes = 2 ** (depth + 1) - 1
    first = np.arange(trees, dtype=np.int32) * nodes
    node = np.zeros((*acc.shape[:-1], trees), dtype=np.int32)
    levels = []
    for _ in range(depth + 1):
        rows = first + node
        levels.append(rows)
        right = np.take_along_axis(acc, rows, axis=-1) > 0
        node = 2 * node + np.where(right, np.int32(2), np.int32(1))
    return np.stack(levels, axis=-1).reshape(*acc.shape[:-1], -1)


@dataclass(frozen=True)
class TernaryFFF:
    """Trees of ternary neurons between two quantisers; see docs/numerics.md.

    t_in, t_out int8 [V, D] of -1, 0, 1; scales float32 [2] of both; norm_in [D], norm_out [V].
    As an oracle it takes the products of all rows and picks the visited ones.
    """

    t_in_VD: NDArray[np.int8]
    t_out_VD: NDArray[np.int8]
    scales: NDArray[np.float32]
    norm_in_D: Float
    norm_out_V: Float
    trees: int
    depth: int
    eps: float

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        name: str,
        t_in_VD: NDArray[np.int8],
        t_out_VD: NDArray[np.int8],
        scales: NDArray[np.float32],
        vector: Callable[[str], Float],
    ) -> TernaryFFF:
        """The FFF of a layer's channel mixer `name`; vector reads a float32 tensor by its name."""
        assert config.fff_trees is not None
        assert config.fff_depth is not None
        norms = vector(f"{name}.norm_in.weight"), vector(f"{name}.norm_out.weight")
        sizes = config.fff_trees, config.fff_depth
        return cls(t_in_VD, t_out_VD, scales, *norms, *sizes, config.linear_norm_eps)

    def quantised_input(self, x: Float) -> tuple[NDArray[np.int8], Float]:
        """Return (q int8 [..., D], step float32 [..., 1]) of the normalised input."""
        return quantise_activation(rms_norm(x, self.norm_in_D, self.eps))

    def walk(self, q: NDArray[np.int8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return (visited rows, their accumulators), both int32 [..., A], of int8 [..., D]."""
        acc = ternary_product(q, self.t_in_VD)
        rows = walk_trees(acc, self.trees, self.depth)
        return rows, np.take_along_axis(acc, rows, axis=-1)

    def quantised_hidden(self, h: Float, rows: NDArray[np.int32]) -> tuple[NDArray[np.int8], Float]:
        """Return (q int8 [..., A], step [..., 1]) of the visited neurons' activations."""
        return quantise_activation(rms_norm(h, self.norm_out_V[rows], self.eps))

    def combine(self, q: NDArray[np.int8], rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return int32 [..., D], the sum over visited rows of q * t_out[row], exact."""
        spread = np.zeros((*q.shape[:-1], len(self.t_out_VD)), dtype=np.int8)
        np.put_along_axis(spread, rows, q, axis=-1)  # a token visits no row twice
        return ternary_product(spread, np.ascontiguousarray(self.t_out_VD.T))

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., D] of float32 [..., D]."""
        q, step = self.quantised_input(x)
        rows, acc = self.walk(q)
        h = silu(acc.astype(np.float32) * (self.scales[0] * step))
        q_h, step_h = self.quantised_hidden(h, rows)
        return self.combine(q_h, rows).astype(np.float32) * (self.scales[1] * step_h)
